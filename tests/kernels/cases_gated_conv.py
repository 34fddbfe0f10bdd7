"""Cases of the gated convolution, for the interpreter and for a GPU."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.dispatch import use_backend
from kernels.gated_conv import gated_conv
from tests.kernels.oracle import SINGLE, SIXTEEN_BIT, poisoned, require_close

SHAPES = ((1, 1, 1), (2, 2, 5), (3, 70, 33), (1, 64, 64))
"""Batch, length and width: shorter than the taps, whole and broken tiles and spans."""
TAPS = (1, 3, 4)
NAMES = ("x", "weight", "bias", "taps", "tap_bias")


def by_definition(x: Tensor, weight: Tensor, bias: Tensor, taps: Tensor, tap_bias: Tensor) -> Tensor:
    """torch's own convolution and projection."""
    filtered = F.conv1d(F.pad(x, (0, 0, taps.shape[1] - 1, 0)).mT, taps[:, None], tap_bias, groups=x.shape[-1]).mT
    return filtered * (x @ weight.T + bias) + x


def check(shape: tuple[int, int, int], taps: int, device: str, dtype: torch.dtype, backend: str) -> None:
    """Output and all gradients against fp64; the input in `dtype`, parameters in fp32."""
    width = shape[-1]
    tensors = {"x": torch.randn(shape).to(dtype), "weight": torch.randn(width, width) * width**-0.5, "bias": torch.randn(width)}
    tensors |= {"taps": torch.randn(width, taps), "tap_bias": torch.randn(width)}
    weight = torch.randn(shape)

    def run(leaves: dict[str, Tensor], call) -> dict[str, Tensor]:
        y = call(*leaves.values())
        gradients = torch.autograd.grad((y * weight.to(y)).sum(), list(leaves.values()))
        return {"y": y} | {f"d{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}

    with use_backend(backend), poisoned():
        got = run({name: tensor.to(device).requires_grad_() for name, tensor in tensors.items()}, gated_conv)
    true = run({name: tensor.double().requires_grad_() for name, tensor in tensors.items()}, by_definition)
    assert got["y"].dtype == dtype
    require_close(got, true, SINGLE if dtype == torch.float32 else 2 * SIXTEEN_BIT)


def check_members(device: str, backend: str) -> None:
    """Members with parameters of their own are one call and equal the loop, whether they share their input or not."""
    x = torch.randn(3, 2, 37, 5, device=device, requires_grad=True)
    shapes = ((5, 5), (5,), (5, 3), (5,))
    parameters = [torch.randn(3, *shape, device=device, requires_grad=True) for shape in shapes]
    out = torch.randn(3, 2, 37, 5, device=device)
    leaves = (x, *parameters)
    with use_backend(backend), poisoned():
        for shared in (False, True):
            together = torch.vmap(gated_conv, (None if shared else 0, 0, 0, 0, 0))(x[0] if shared else x, *parameters)
            alone = torch.stack([gated_conv(x[0 if shared else i], *(p[i] for p in parameters)) for i in range(3)])
            torch.testing.assert_close(together, alone)
            torch.testing.assert_close(
                *(torch.autograd.grad((y * out).sum(), leaves) for y in (together, alone)), rtol=1e-4, atol=1e-4
            )
