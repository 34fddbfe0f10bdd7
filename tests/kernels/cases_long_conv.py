"""Cases of the long convolution by Toeplitz products, for the interpreter and for a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.conv import long_conv
from kernels.dispatch import use_backend
from tests.kernels.oracle import SIXTEEN_BIT, poisoned, require_close

SHAPES = ((1, 1, 1, 1), (2, 5, 3, 9), (3, 64, 2, 64), (2, 130, 3, 100), (1, 200, 2, 20))
"""Batch, length, channels and taps: whole and broken chunks, filters shorter, much shorter and longer than the sequence."""


def run(x: Tensor, taps: Tensor, weight: Tensor) -> dict[str, Tensor]:
    """Output and gradients."""
    y = long_conv(x, taps)
    dx, dtaps = torch.autograd.grad((y * weight).sum(), (x, taps))
    return {"y": y, "dx": dx, "dtaps": dtaps}


def definition(x: Tensor, taps: Tensor, weight: Tensor) -> dict[str, Tensor]:
    """The sum over earlier tokens, one tap after the other, in fp64."""
    x, taps, weight = (a.detach().double().cpu() for a in (x, taps, weight))
    x, taps = x.requires_grad_(), taps.requires_grad_()
    y = torch.zeros_like(x)
    for lag in range(min(taps.shape[1], x.shape[1])):
        y = y + torch.cat((torch.zeros_like(x[:, :lag]), x[:, : x.shape[1] - lag] * taps[:, lag]), 1)
    dx, dtaps = torch.autograd.grad((y * weight).sum(), (x, taps))
    return {"y": y, "dx": dx, "dtaps": dtaps}


def check(shape: tuple[int, int, int, int], device: str, dtype: torch.dtype) -> None:
    """Output and gradients against fp64, fresh memory poisoned; repeats are equal to the bit."""
    batch, length, width, n_taps = shape
    x = torch.randn(batch, length, width, device=device).to(dtype).requires_grad_()
    taps = (torch.randn(width, n_taps, device=device) / n_taps**0.5).requires_grad_()
    weight = torch.randn(batch, length, width, device=device).to(dtype)
    with use_backend("triton"), poisoned():
        got, again = run(x, taps, weight), run(x, taps, weight)
    assert all(torch.equal(tensor, again[name]) for name, tensor in got.items())
    require_close(got, definition(x, taps, weight), SIXTEEN_BIT)


def check_members(device: str) -> None:
    """Members with filters of their own are one launch and come out as they do alone."""
    x = torch.randn(3, 2, 70, 4, device=device, dtype=torch.float16).requires_grad_()
    taps = torch.randn(3, 4, 70, device=device).requires_grad_()
    with use_backend("triton"), poisoned():
        y = torch.vmap(long_conv)(x, taps)
        together = torch.autograd.grad(y.float().square().sum(), (x, taps))
        for member in range(3):
            alone = long_conv(x[member], taps[member])
            own = torch.autograd.grad(alone.float().square().sum(), (x, taps))
            assert torch.equal(alone, y[member])
            assert all(torch.equal(a[member], b[member]) for a, b in zip(together, own, strict=True))
