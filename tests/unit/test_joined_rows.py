"""The pass over compiled graphs that lets a gate and a short convolution write into the same rows."""

from __future__ import annotations

import operator

import pytest
import torch
from torch import fx
from torch._higher_order_ops.auto_functionalize import auto_functionalized
from torch._subclasses.fake_tensor import FakeTensorMode

import kernels.conv
import kernels.gated_norm  # noqa: F401 - registers the operators, as the line above
from bench.joined_rows import JoinRows
from kernels.between import gated_norm_operator  # noqa: F401
from tests.unit.traced import Traced

aten, ops = torch.ops.aten, torch.ops.mixer_bench
MEMBERS, EACH, LENGTH, WIDTH = 2, 3, 8, 4
TOKENS = EACH * LENGTH


def graph_of(kind: str) -> fx.GraphModule:
    """The end of a backward pass: the gate's gradients, the convolution's, and both side by side."""
    graph = Traced()
    with FakeTensorMode():
        gate = [graph.given(name, MEMBERS, TOKENS, WIDTH) for name in ("dy", "y", "z")]
        x, weight = graph.given("x", MEMBERS * EACH, LENGTH, WIDTH), graph.given("w", MEMBERS, WIDTH, 4)
        gated = graph.add(ops.gated_norm_backward.default, *gate, None, 1e-5)
        dscan, dz = (result(graph, gated, index) for index in range(2))
        dscan = graph.add(aten.view.default, dscan, [MEMBERS * EACH, LENGTH, WIDTH])
        second = x if kind == "two terms" else None
        convolved = graph.add(ops.short_conv_backward.default, dscan, second, x, weight, None, True)
        dx, dweight = (result(graph, convolved, index) for index in range(2))
        shape = [MEMBERS, EACH, LENGTH, WIDTH]
        halves = [graph.add(aten.view.default, dx, shape), graph.add(aten.view.default, dz, shape)]
        if kind == "turned":
            halves.reverse()
        both = graph.add(aten.cat.default, halves, 2 if kind == "stacked" else 3)
        rows = graph.add(aten.view.default, both, [MEMBERS, TOKENS, -1])
    graph.output((rows, dweight, dz) if kind == "used" else (rows, dweight))
    return fx.GraphModule(torch.nn.Module(), graph)


def result(graph: Traced, node: fx.Node, index: int) -> fx.Node:
    found = graph.call_function(operator.getitem, (node, index))
    found.meta["val"] = node.meta["val"][index]
    return found


def joined(module: fx.GraphModule) -> bool:
    JoinRows()(module.graph)
    module.graph.lint()
    module.recompile()
    targets = [node.target for node in module.graph.nodes]
    parts = (ops.gated_norm_backward.default, aten.cat.default)
    found = auto_functionalized in targets
    assert found != any(part in targets for part in parts)
    return found


@pytest.mark.parametrize("kind", ["one term", "two terms"])
def test_both_write_into_the_same_rows(kind: str) -> None:
    module = graph_of(kind)
    (before,) = (node.args[0] for node in module.graph.nodes if node.op == "output")
    shapes = [node.meta["val"].shape for node in before]
    assert joined(module)
    (after,) = (node.args[0] for node in module.graph.nodes if node.op == "output")
    assert [node.meta["val"].shape for node in after] == shapes
    (into,) = (node for node in module.graph.nodes if node.target == auto_functionalized)
    assert (into.kwargs["beside_BTD"] is None) == (kind == "one term")
    assert into.kwargs["rows_BTR"].meta["val"].shape == (MEMBERS * EACH, LENGTH, 2 * WIDTH)


@pytest.mark.parametrize("kind", ["turned", "stacked", "used"])
def test_others_are_left_alone(kind: str) -> None:
    """The gate first, rows one after the other, a gradient that is read elsewhere too."""
    assert not joined(graph_of(kind))
