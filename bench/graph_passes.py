"""What passes over compiled graphs share, and several of them where torch takes one."""

from __future__ import annotations

import torch
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass

aten = torch.ops.aten
VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
"""Of which shapes and orders of dense tensors come."""


class Passes(CustomGraphPass):
    """Passes one after the other.

    Args:
        passes: in their order.
    """

    def __init__(self, *passes: CustomGraphPass) -> None:
        self.passes = passes

    def __call__(self, graph: fx.Graph) -> None:
        """Changes the graph in place."""
        for one in self.passes:
            one(graph)

    def uuid(self) -> tuple[object, ...]:
        """What tells compiled graphs of other versions of the passes apart."""
        return tuple(one.uuid() for one in self.passes)


def before_views(node: fx.Node) -> fx.Node | None:
    """What a tensor is another shape of, its numbers in the same order, if nothing else uses it."""
    while len(node.users) == 1:
        same = node.target == aten.permute.default and node.args[1] == list(range(node.meta["val"].ndim))
        if node.target not in VIEWS and not same:
            return node
        node = node.all_input_nodes[0]
    return None


def erase_unused(graph: fx.Graph, node: fx.Node) -> None:
    """Takes out a node without users, and those before it that lose their last one."""
    if node.users or node.op != "call_function":
        return
    before = node.all_input_nodes
    graph.erase_node(node)
    for one in before:
        erase_unused(graph, one)
