"""Cases of the gate with its norm, for the interpreter and for a GPU."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.dispatch import use_backend
from kernels.gated_norm import gated_norm
from tests.kernels.oracle import SINGLE, SIXTEEN_BIT, poisoned, require_close

SHAPES = ((1, 1, 24), (2, 3, 5), (3, 70, 33), (2, 65, 128))
"""Batch, length and width: less than a tile, broken tiles, more than one program."""
EPS = 1e-5


def definition(x: Tensor, gate: Tensor, weight: Tensor | None) -> Tensor:
    """RMSNorm(x silu(gate)) weight, or the product alone."""
    product = x * F.silu(gate)
    return product if weight is None else F.rms_norm(product, product.shape[-1:], weight, EPS)


def check(shape: tuple[int, int, int], device: str, dtype: torch.dtype, backend: str, *, norm: bool) -> None:
    """Output and all gradients against fp64; the gate is a part of wider rows."""
    width = shape[-1]
    tensors = {"x": torch.randn(shape).to(dtype), "wide": (2 * torch.randn(*shape[:2], 2 * width + 8)).to(dtype)}
    tensors |= {"weight": torch.randn(width)} if norm else {}
    upstream = torch.randn(shape)

    def run(leaves: dict[str, Tensor], call) -> dict[str, Tensor]:
        y = call(leaves["x"], leaves["wide"][..., 8 : 8 + width], leaves.get("weight"))
        found = torch.autograd.grad((y * upstream.to(y)).sum(), list(leaves.values()))
        return {"y": y} | {f"d{name}": gradient for name, gradient in zip(leaves, found, strict=True)}

    with use_backend(backend), poisoned():
        got = run({name: tensor.to(device).requires_grad_() for name, tensor in tensors.items()}, gated_norm)
    true = run({name: tensor.double().requires_grad_() for name, tensor in tensors.items()}, definition)
    assert got["y"].dtype == dtype
    require_close(got, true, SINGLE if dtype == torch.float32 else SIXTEEN_BIT)


def check_rows_for_two(shape: tuple[int, int, int], device: str, dtype: torch.dtype, backend: str, *, norm: bool) -> None:
    """The gate's gradient in the right half of wider rows is the same."""
    dy, x, gate = (torch.randn(shape, device=device).to(dtype) for _ in range(3))
    weight = torch.randn(shape[0], shape[2], device=device) if norm else None
    with use_backend(backend), poisoned():
        dx, dgate, dweight = torch.ops.mixer_bench.gated_norm_backward(dy, x, gate, weight, EPS)
        same, rows, sums = torch.ops.mixer_bench.gated_norm_backward_beside(dy, x, gate, weight, EPS)
    for found, want in ((same, dx), (rows[..., shape[2] :], dgate), (sums, dweight)):
        assert torch.equal(found, want)


def check_members(device: str, backend: str) -> None:
    """Members with weights of their own are one call and equal the loop."""
    x, wide = (torch.randn(3, 2, 21, width, device=device, requires_grad=True) for width in (8, 24))
    weight = torch.randn(3, 8, device=device, requires_grad=True)
    leaves = (x, wide, weight)

    def call(x: Tensor, wide: Tensor, weight: Tensor) -> Tensor:
        return gated_norm(x, wide[..., 8:16], weight).sin().sum() + gated_norm(x, wide[..., 16:]).square().sum()

    with use_backend(backend), poisoned():
        together = torch.vmap(call)(*leaves)
        alone = torch.stack([call(*(tensor[i] for tensor in leaves)) for i in range(3)])
        torch.testing.assert_close(together, alone)
        torch.testing.assert_close(*(torch.autograd.grad(y.sum(), leaves) for y in (together, alone)), rtol=1e-4, atol=1e-4)
