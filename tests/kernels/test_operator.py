"""Operators registered directly: torch's own checks, gradients under torch.func, and members."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels._operator import operator


@operator("mixer_bench_test::weighted")
def weighted(x: Tensor, weight: Tensor | None, factor: float) -> Tensor:
    """x weight factor."""
    return x * factor if weight is None else x * weight * factor


@weighted.register_fake
def _(x: Tensor, weight: Tensor | None, factor: float) -> Tensor:
    return x.new_empty(x.shape)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor | None, float], output: Tensor) -> None:
    x, weight, ctx.factor = inputs
    ctx.save_for_backward(x, weight)


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    if weight is None:
        return weighted(dy, None, ctx.factor), None, None
    return weighted(dy, weight, ctx.factor), dy * x * ctx.factor, None


weighted.register_autograd(_differentiate, setup_context=_save)


@weighted.register_vmap
def _(info: Any, in_dims: tuple[int | None, ...], x: Tensor, weight: Tensor | None, factor: float) -> tuple[Tensor, int]:
    x, weight = (None if t is None or dim is None else t.movedim(dim, 0) for t, dim in zip((x, weight), in_dims[:2], strict=True))
    return weighted(x, weight, factor), 0


def test_torch_accepts_it():
    x, weight = torch.randn(3, requires_grad=True), torch.randn(3, requires_grad=True)
    torch.library.opcheck(weighted.overload, (x, weight, 2.0))
    torch.library.opcheck(weighted.overload, (x, None, 2.0))


def test_gradients():
    x, weight = torch.randn(3, dtype=torch.float64, requires_grad=True), torch.randn(3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, weight: weighted(x, weight, 2.0), (x, weight))
    inside = torch.func.grad(lambda x: weighted(x, weight.detach(), 2.0).sum())(x.detach())
    torch.testing.assert_close(inside, 2 * weight.detach())


def test_members_have_gradients():
    x, weight = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    y = torch.vmap(lambda x, weight: weighted(x, weight, 0.5))(x, weight)
    dx, dweight = torch.autograd.grad(y.sum(), (x, weight))
    torch.testing.assert_close((dx, dweight), (0.5 * weight.detach(), 0.5 * x.detach()))
