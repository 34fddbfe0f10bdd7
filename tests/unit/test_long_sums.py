"""Long sums of batched products: the shares add up, and the pass over compiled graphs cuts these products and no others."""

from __future__ import annotations

import pytest
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from bench.long_sums import LONG, CutLongSums
from kernels.products import product_over_rows


@pytest.mark.parametrize(("members", "rows"), [(1, 1), (3, 7), (2, 1024), (2, 1536), (700, 3)])
def test_shares_add_up(members: int, rows: int) -> None:
    a, b = torch.randn(members, rows, 5, dtype=torch.float64), torch.randn(members, rows, 4, dtype=torch.float64)
    torch.testing.assert_close(product_over_rows(a, b), a.mT @ b)
    narrow = product_over_rows(a.bfloat16(), b.bfloat16())
    assert narrow.dtype == torch.float32
    torch.testing.assert_close(narrow.double(), a.mT @ b, rtol=0.1, atol=0.02 * rows**0.5)


def graph_of(members: int, length: int, width: int, device: str, *, transposed: bool = True) -> fx.GraphModule:
    """A batched product as a compiler sees it, with the shapes of fake tensors."""
    graph = fx.Graph()
    a, b = graph.placeholder("a"), graph.placeholder("b")
    with FakeTensorMode():
        shape = (members, length, width)
        a.meta["val"] = torch.empty(shape if transposed else (members, width, length), device=device)
        b.meta["val"] = torch.empty(shape, device=device)
        left = graph.call_function(torch.ops.aten.permute.default, (a, [0, 2, 1])) if transposed else a
        if transposed:
            left.meta["val"] = a.meta["val"].permute(0, 2, 1)
        product = graph.call_function(torch.ops.aten.bmm.default, (left, b))
        product.meta["val"] = torch.bmm(left.meta["val"], b.meta["val"])
    graph.output(product)
    return fx.GraphModule(torch.nn.Module(), graph)


def cut(module: fx.GraphModule) -> bool:
    CutLongSums()(module.graph)
    module.recompile()
    module.graph.lint()
    return any(node.target == torch.ops.mixer_bench.product_over_rows.default for node in module.graph.nodes)


def test_a_weights_gradient_is_cut_and_stays_the_same() -> None:
    module = graph_of(4, LONG, 128, "cuda")
    assert cut(module)
    a, b = torch.randn(4, 96, 128), torch.randn(4, 96, 128)
    torch.testing.assert_close(module(a, b), a.mT @ b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("members", "length", "width", "device", "transposed"),
    [
        (1, LONG, 128, "cuda", True),  # a single run, whose products torch cuts itself
        (4, LONG // 2, 128, "cuda", True),
        (4, LONG, 1024, "cuda", True),  # many results
        (4, LONG, 128, "cpu", True),
        (4, LONG, 128, "cuda", False),  # not rows, but columns
    ],
)
def test_other_products_are_left_alone(members: int, length: int, width: int, device: str, transposed: bool) -> None:
    assert not cut(graph_of(members, length, width, device, transposed=transposed))
