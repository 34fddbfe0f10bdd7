"""The pass over compiled graphs that hands two terms of a gradient to the short convolution."""

from __future__ import annotations

import operator

import pytest
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

import kernels.conv  # noqa: F401 - registers the operators
from bench.graph_passes import Passes
from bench.two_terms import TakeTwoTerms
from tests.unit.traced import Traced

aten, ops = torch.ops.aten, torch.ops.mixer_bench
MEMBERS, EACH, LENGTH, WIDTH = 2, 3, 8, 5
BATCH = MEMBERS * EACH


def graph_of(kind: str) -> fx.GraphModule:
    """The end of a backward pass: what the convolution's users send back, added, and what the convolution makes of it."""
    graph = Traced()
    with FakeTensorMode():
        x, weight, bias = (
            graph.given("x", BATCH, LENGTH, WIDTH),
            graph.given("w", MEMBERS, WIDTH, 4),
            graph.given("b", MEMBERS, WIDTH),
        )
        low, up = graph.given("low", MEMBERS, EACH * LENGTH, 2), graph.given("up", MEMBERS, 2, WIDTH)
        other = graph.given("other", MEMBERS, EACH, LENGTH, WIDTH)
        product = graph.add(aten.view.default, graph.add(aten.bmm.default, low, up), [MEMBERS, EACH, LENGTH, WIDTH])
        scanned = graph.add(
            ops.short_conv.default, graph.add(aten.view.default, other, [BATCH, LENGTH, WIDTH]), weight, bias, False
        )
        stored = graph.add(aten.view.default, scanned, [MEMBERS, EACH, LENGTH, WIDTH])
        term = graph.add(aten.permute.default, stored, [0, 1, 2, 3])
        if kind == "computed":
            term = graph.add(aten.mul.Tensor, term, other)
        added = graph.add(aten.add.Tensor, product, term)
        dy = graph.add(aten.view.default, added, [BATCH, LENGTH, WIDTH])
        if kind == "turned":
            dy = graph.add(aten.permute.default, graph.add(aten.view.default, added, [BATCH, WIDTH, LENGTH]), [0, 2, 1])
        found = graph.add(ops.short_conv_backward.default, dy, None, x, weight, bias, True)
        outputs = [graph.call_function(operator.getitem, (found, index)) for index in range(3)]
    graph.output((*outputs, added) if kind == "used" else tuple(outputs))
    return fx.GraphModule(torch.nn.Module(), graph)


def passed(module: fx.GraphModule) -> fx.Node:
    """The convolution's gradient behind the pass."""
    Passes(TakeTwoTerms())(module.graph)
    module.graph.lint()
    module.recompile()
    (found,) = module.graph.find_nodes(op="call_function", target=ops.short_conv_backward.default)
    return found


def test_terms_that_lie_in_memory_are_not_added() -> None:
    module = graph_of("stored")
    both = passed(module)
    assert aten.add.Tensor not in [node.target for node in module.graph.nodes]
    assert [term.meta["val"].shape for term in both.args[:2]] == [(BATCH, LENGTH, WIDTH)] * 2
    shapes = [one.shape for one in ops.short_conv_backward.default(*(of_meta(of) for of in both.args))]
    assert shapes == [(BATCH, LENGTH, WIDTH), (MEMBERS, WIDTH, 4), (MEMBERS, WIDTH)]
    assert passed(module) is both  # which has its second term already


def of_meta(argument: object) -> object:
    return argument.meta["val"] if isinstance(argument, fx.Node) else argument


@pytest.mark.parametrize("kind", ["computed", "used", "turned"])
def test_others_are_left_alone(kind: str) -> None:
    """A term that a compiler makes on the way, a sum that is read elsewhere too, one whose axes move."""
    assert passed(graph_of(kind)).args[1] is None
