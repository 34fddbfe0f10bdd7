"""Cases of Mamba-2 between projection and gate, for the interpreter and for a GPU."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.dispatch import use_backend
from kernels.ssd import Conv, Heads, Sizes, ssd
from tests.kernels.oracle import poisoned, require_close

SMALL = ("dstep_bias", "dlog_rate", "dskip")
"""A number of each head, sums over all tokens that may cancel."""
SINGLE = dict.fromkeys(SMALL, 1e-4) | {"other": 1e-5}
SIXTEEN_BIT = dict.fromkeys(SMALL, 2e-2) | {"other": 5e-3}


class Shape(NamedTuple):
    """Sequences, tokens, heads, groups, head width and states."""

    B: int
    T: int
    H: int
    G: int
    P: int
    N: int


SHAPES = (Shape(1, 1, 1, 1, 16, 8), Shape(1, 37, 4, 2, 16, 24), Shape(2, 16, 2, 1, 32, 16))
"""A broken chunk alone, several with a broken one, a whole one; padded states; groups; in fp32, chunks are of 16 tokens."""
LONG = (Shape(3, 200, 4, 1, 64, 16), Shape(2, 64, 2, 1, 64, 24), Shape(2, 130, 8, 2, 64, 8), Shape(1, 333, 2, 1, 32, 32))
"""For a GPU, where chunks have more tokens."""
SPARE, TAPS = 3, 4
NAMES = ("row", "taps", "bias", "step_bias", "log_rate", "skip")


def call(
    row: Tensor, taps: Tensor, bias: Tensor | None, step_bias: Tensor, log_rate: Tensor, skip: Tensor, shape: Shape
) -> tuple[Tensor, Tensor]:
    """`ssd` from nothing: y, and the convolved x."""
    sizes = Sizes(shape.G, shape.N, shape.P)
    return ssd(row, Conv(taps, bias), Heads(step_bias, log_rate, skip), sizes)[:2]


def definition(
    row: Tensor, taps: Tensor, bias: Tensor | None, step_bias: Tensor, log_rate: Tensor, skip: Tensor, shape: Shape
) -> tuple[Tensor, Tensor]:
    """Token by token, from the formula of `kernels.ssd`."""
    _, length, heads, groups, width, states = shape
    xbc, raw = row[..., : len(taps)], row[..., len(taps) : len(taps) + heads]
    padded = F.pad(xbc, (0, 0, TAPS - 1, 0))
    summed = sum(padded[:, j : j + length] * taps[:, j] for j in range(TAPS))
    convolved = F.silu(summed if bias is None else summed + bias)
    x, b, c = convolved.split((heads * width, groups * states, groups * states), dim=-1)
    x, b, c = x.unflatten(-1, (heads, width)), *(a.unflatten(-1, (groups, states)) for a in (b, c))
    b, c = (a.repeat_interleave(heads // groups, dim=2) for a in (b, c))
    dt = F.softplus(raw + step_bias)
    factor = torch.exp(-log_rate.exp() * dt)
    state, found = row.new_zeros(len(row), heads, states, width), []
    for t in range(length):
        state = factor[:, t, :, None, None] * state + b[:, t, :, :, None] * (dt[:, t, :, None] * x[:, t])[:, :, None]
        found.append((c[:, t, :, :, None] * state).sum(2) + skip[:, None] * x[:, t])
    return torch.stack(found, 1).flatten(-2), convolved[..., : heads * width]


def draw(shape: Shape, *, bias: bool = True) -> dict[str, Tensor]:
    """Rows that lie inside of wider ones, and weights; decays from none to all within a chunk."""
    channels = shape.H * shape.P + 2 * shape.G * shape.N
    drawn = (
        torch.randn(shape.B, shape.T, 8 + channels + shape.H + SPARE),
        0.5 * torch.randn(channels, TAPS),
        torch.randn(channels) if bias else None,
        torch.randn(shape.H) - 2,
        torch.randn(shape.H),
        torch.randn(shape.H),
    )
    return {name: x for name, x in zip(NAMES, drawn, strict=True) if x is not None}


def check(
    shape: Shape, device: str, dtype: torch.dtype, backend: str = "triton", *, bias: bool = True, beside: bool = False
) -> None:
    """Outputs and all gradients against fp64, with a gradient of the convolved x too or without."""
    tensors = draw(shape, bias=bias)
    tensors["row"] = tensors["row"].to(dtype)
    upstream = torch.randn(shape.B, shape.T, shape.H * shape.P)
    upstream_beside = torch.randn_like(upstream)

    def run(leaves: dict[str, Tensor], form) -> dict[str, Tensor]:
        y, convolved = form(leaves["row"][..., 8:], leaves["taps"], leaves.get("bias"), *(leaves[name] for name in NAMES[3:]))
        loss = (y * upstream.to(y)).sum()
        loss = loss + (convolved * upstream_beside.to(y)).sum() if beside else loss
        found = torch.autograd.grad(loss, list(leaves.values()))
        return {"y": y, "convolved": convolved} | {f"d{name}": x for name, x in zip(leaves, found, strict=True)}

    with use_backend(backend), poisoned():
        leaves = {name: tensor.to(device).requires_grad_() for name, tensor in tensors.items()}
        got = run(leaves, lambda *args: call(*args, shape))
    true = run({n: x.to(device).double().requires_grad_() for n, x in tensors.items()}, lambda *args: definition(*args, shape))
    assert got["y"].dtype == got["convolved"].dtype == dtype
    require_close(got, true, SINGLE if dtype == torch.float32 else SIXTEEN_BIT)
    stored = (upstream.to(got["y"]).double() * got["convolved"].double()).unflatten(-1, (shape.H, shape.P)).sum((0, 1, 3))
    require_close({"dskip": got["dskip"]}, {"dskip": stored}, SINGLE["dskip"])  # nothing but what is stored is rounded


def check_members(device: str, backend: str = "triton", dtype: torch.dtype = torch.float32) -> None:
    """Members with weights of their own are one call and equal the loop."""
    shape = Shape(2, 17, 2, 1, 16, 8)
    row, *weights = (torch.stack([draw(shape)[name] for _ in range(3)]).to(device) for name in NAMES)
    leaves = tuple(x.requires_grad_() for x in (row.to(dtype), *weights))

    def loss(*leaves: Tensor) -> Tensor:
        return call(leaves[0][..., 8:], *leaves[1:], shape)[0].sin().sum()

    with use_backend(backend), poisoned():
        together = torch.vmap(loss)(*leaves)
        alone = torch.stack([loss(*(x[i] for x in leaves)) for i in range(3)])
        torch.testing.assert_close(together, alone)
        torch.testing.assert_close(*(torch.autograd.grad(y.sum(), leaves) for y in (together, alone)), rtol=1e-4, atol=1e-4)
