"""A pass over compiled graphs: gradients of a projection's two halves are written into one tensor where they are made.

Mamba projects its input and its gate together. The gradient of the one comes from the short convolution, that of the other from the
gate, and joining them is a pass that reads and writes both. Here the gate's kernel makes the rows, and the convolution fills in.
"""

from __future__ import annotations

import operator

import torch
from torch import fx
from torch._higher_order_ops.auto_functionalize import auto_functionalized
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

from bench import graph_passes
from bench.graph_passes import before_views, erase_unused
from kernels.between import gated_norm_operator
from kernels.convolutions import conv_operator

aten, ops = torch.ops.aten, torch.ops.mixer_bench
INTO: tuple[str, ...] = ("dy_BTD", "beside_BTD", "x_BTD", "weight_MDK", "bias_MD", "silu", "rows_BTR")


class JoinRows(CustomGraphPass):
    """Replaces concatenations of what a short convolution and a gate send back."""

    def __call__(self, graph: fx.Graph) -> None:
        """Changes the graph in place."""
        place = {node: at for at, node in enumerate(graph.nodes)}
        for cat in graph.find_nodes(op="call_function", target=aten.cat.default):
            halves = _halves(cat)
            if halves is not None and place[halves[1].all_input_nodes[0]] < place[halves[0].all_input_nodes[0]]:
                _join(graph, cat, *halves)

    def uuid(self) -> bytes:
        """What tells compiled graphs of other versions of this pass apart."""
        return get_hash_for_files((__file__, graph_passes.__file__, conv_operator.__file__, gated_norm_operator.__file__))


def _halves(cat: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The convolution's dx and the gate's gradient, if these are what is put side by side."""
    own, inputs = cat.meta["val"], cat.all_input_nodes
    axis = cat.args[1] if len(cat.args) > 1 else 0
    if len(inputs) != 2 or axis not in (-1, own.ndim - 1):
        return None
    left, right = (before_views(one) for one in inputs)
    if left is None or right is None or not _is_result(left, 0, ops.short_conv_backward.default):
        return None
    widths = {one.meta["val"].shape[-1] for one in (left, right, *inputs)}
    return (left, right) if _is_result(right, 1, ops.gated_norm_backward.default) and len(widths) == 1 else None


def _is_result(node: fx.Node, index: int, target: object) -> bool:
    """Whether a node is a certain result of an operator."""
    source = node.all_input_nodes[0] if node.all_input_nodes else None
    return source is not None and node.target == operator.getitem and bool(node.args[1] == index) and source.target == target


def _join(graph: fx.Graph, cat: fx.Node, left: fx.Node, right: fx.Node) -> None:
    """Has the gate's kernel make rows for both, and the convolution write into them."""
    conv, gate = left.all_input_nodes[0], right.all_input_nodes[0]
    with graph.inserting_before(gate):
        beside = graph.call_function(ops.gated_norm_backward_beside.default, gate.args)
    dx, dgate, dweight = gate.meta["val"]
    rows = dgate.new_empty(*dgate.shape[:-1], 2 * dgate.shape[-1])
    beside.meta["val"] = dx, rows, dweight
    with graph.inserting_before(conv):
        made = _result(graph, beside, 1)
        shape = [*left.meta["val"].shape[:-1], rows.shape[-1]]
        made = _viewed(graph, made, shape)
        arguments = dict(zip(INTO, (*conv.args, made), strict=True))
        into = graph.call_function(auto_functionalized, (ops.short_conv_backward_into.default,), arguments)
        into.meta["val"] = (*conv.meta["val"][1:], made.meta["val"])
        filled = _viewed(graph, _result(graph, into, 2), list(cat.meta["val"].shape))
        for index in (1, 2):
            for user in [user for user in conv.users if user.args[1] == index]:
                user.replace_all_uses_with(_result(graph, into, index - 1))
    cat.replace_all_uses_with(filled)
    erase_unused(graph, cat)
    for user in list(conv.users):
        erase_unused(graph, user)
    gate.replace_all_uses_with(beside)
    erase_unused(graph, gate)


def _result(graph: fx.Graph, node: fx.Node, index: int) -> fx.Node:
    """One of several results."""
    found = graph.call_function(operator.getitem, (node, index))
    found.meta["val"] = node.meta["val"][index]
    return found


def _viewed(graph: fx.Graph, node: fx.Node, shape: list[int]) -> fx.Node:
    """A dense tensor in another shape."""
    view = graph.call_function(aten.view.default, (node, shape))
    view.meta["val"] = node.meta["val"].view(shape)
    return view
