"""A pass over compiled graphs: the short convolution's gradient takes two terms of its outputs' gradient as they lie.

A mixer reads what the convolution gives more than once, as Mamba's scan and projection do, and autograd adds what comes back. Where
both terms lie in memory already, their sum would be written only to be read once.
"""

from __future__ import annotations

import operator

import torch
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

from bench.graph_passes import VIEWS, before_views, erase_unused
from kernels.convolutions import conv_operator

aten = torch.ops.aten
RENAMED = (*VIEWS, aten.permute.default, aten.alias.default)


class TakeTwoTerms(CustomGraphPass):
    """Replaces gradients of short convolutions behind an addition."""

    def __call__(self, graph: fx.Graph) -> None:
        """Changes the graph in place."""
        for node in graph.find_nodes(op="call_function", target=torch.ops.mixer_bench.short_conv_backward.default):
            gradient = node.all_input_nodes[0]
            added = before_views(gradient)
            if node.args[1] is not None or added is None or not _is_sum_of_stored(added):
                continue
            with graph.inserting_before(node):
                terms = [_shaped(graph, term, gradient.meta["val"]) for term in added.all_input_nodes]
                both = graph.call_function(node.target, (*terms, *node.args[2:]))
            both.meta.update({key: of for key, of in node.meta.items() if key != "eager_input_vals"})  # of other arguments
            node.replace_all_uses_with(both)
            erase_unused(graph, node)

    def uuid(self) -> bytes:
        """What tells compiled graphs of other versions of this pass apart."""
        return get_hash_for_files((__file__, conv_operator.__file__))


def _is_sum_of_stored(node: fx.Node) -> bool:
    """Whether this adds two dense tensors of its own shape and dtype which a product or an operator of this package wrote."""
    terms = node.all_input_nodes
    if node.target != aten.add.Tensor or node.kwargs or len(terms) != len(node.args):
        return False
    own, found = node.meta["val"], [term.meta["val"] for term in terms]
    alike = all(of.shape == own.shape and of.dtype == own.dtype and of.is_contiguous() for of in found)
    return alike and all(_is_stored(term) for term in terms)


def _is_stored(node: fx.Node) -> bool:
    """Whether a product or an operator of this package wrote this."""
    while node.target in RENAMED:
        node = node.all_input_nodes[0]
    if node.target == operator.getitem:
        node = node.all_input_nodes[0]
    return node.target in (aten.bmm.default, aten.mm.default) or getattr(node.target, "namespace", "") == "mixer_bench"


def _shaped(graph: fx.Graph, term: fx.Node, like: torch.Tensor) -> fx.Node:
    """The term in another shape."""
    view = graph.call_function(aten.view.default, (term, list(like.shape)))
    view.meta["val"] = term.meta["val"].view(like.shape)
    return view
