"""Cases of the Triton short convolution, for the interpreter and for a GPU."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.conv import short_conv, short_conv_step
from kernels.dispatch import use_backend
from tests.kernels.oracle import SINGLE, SIXTEEN_BIT, poisoned, require_close

SHAPES = ((1, 1, 1), (2, 2, 5), (2, 33, 65), (1, 64, 64))
"""Batch, length and width: shorter than the taps, whole and broken tiles."""

OPTIONS = tuple(itertools.product((1, 3, 4), (False, True), (False, True), (False, True)))
"""Taps, and whether there is a bias, a SiLU, a tail."""


def by_definition(x: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor | None, *, silu: bool) -> Tensor:
    """torch's own convolution."""
    taps = weight.shape[-1]
    padded = F.pad(x, (0, 0, taps - 1, 0)) if tail is None else torch.cat((tail, x), 1)
    y = F.conv1d(padded.mT, weight[:, None], bias, groups=x.shape[-1]).mT
    return F.silu(y) if silu else y


def check(shape: tuple[int, int, int], options: tuple[int, bool, bool, bool], device: str, dtype: torch.dtype) -> None:
    """Output and all gradients against fp64; x is a slice of a wider projection, in `dtype`; parameters are in fp32.

    Odd widths make the slice unaligned.
    """
    batch, length, width = shape
    taps, with_bias, silu, with_tail = options
    odd = width % 2
    tensors = {"x": torch.randn(batch, length, 2 * width + odd).to(dtype), "weight": torch.randn(width, taps)}
    if with_bias:
        tensors["bias"] = torch.randn(width)
    if with_tail:
        tensors["tail"] = torch.randn(batch, taps - 1, width).to(dtype)
    weight = torch.randn(shape)

    def run(leaves: dict[str, Tensor], call) -> dict[str, Tensor]:
        x, own_weight, bias, tail = leaves["x"][..., odd : width + odd], leaves["weight"], leaves.get("bias"), leaves.get("tail")
        y = call(x, own_weight, bias, tail, silu=silu)
        gradients = torch.autograd.grad((y * weight.to(y)).sum(), list(leaves.values()))
        return {"y": y} | {f"d{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}

    with use_backend("triton"), poisoned():
        leaves = {name: tensor.to(device).requires_grad_() for name, tensor in tensors.items()}
        got = run(leaves, lambda *args, **keywords: short_conv(*args, **keywords)[0])
    true = run({name: tensor.double().requires_grad_() for name, tensor in tensors.items()}, by_definition)
    assert got["y"].dtype == dtype
    require_close(got, true, SINGLE if dtype == torch.float32 else SIXTEEN_BIT)


def check_two_terms(shape: tuple[int, int, int], device: str, dtype: torch.dtype) -> None:
    """Gradients where that of the outputs is a sum, which is nowhere rounded, equal those of the sum in fp32, in wider rows too.

    Rows at other distances are another kernel, whose products may be added in another order: dx may differ in its last digit.
    """
    width = shape[2]
    x, *terms = (torch.randn(shape, device=device).to(dtype) for _ in range(3))
    weight, bias = torch.randn(1, width, 4, device=device), torch.randn(1, width, device=device)
    operators = torch.ops.mixer_bench
    with use_backend("triton"), poisoned():
        found = operators.short_conv_backward(*terms, x, weight, bias, True)
        rows = torch.ones(*shape[:2], width + 3, device=device, dtype=dtype)
        beside = operators.short_conv_backward_into(*terms, x, weight, bias, True, rows)
        want = operators.short_conv_backward(terms[0].float() + terms[1].float(), None, x.float(), weight, bias, True)
    assert found[0].dtype == dtype
    assert all(torch.equal(a, b) for a, b in zip(found[1:], beside, strict=True))
    torch.testing.assert_close(rows[..., :width], found[0], rtol=torch.finfo(dtype).eps, atol=1e-6)
    assert bool((rows[..., width:] == 1).all())
    got, true = (dict(zip(("dx", "dweight", "dbias"), of, strict=True)) for of in (found, want))
    require_close(got, true, SINGLE if dtype == torch.float32 else SIXTEEN_BIT)


def check_members(device: str) -> None:
    """Members with taps of their own are one call and equal the loop, whether they share their input or not."""
    x = torch.randn(3, 2, 37, 5, device=device, requires_grad=True)
    weight, bias = (torch.randn(3, *shape, device=device, requires_grad=True) for shape in ((5, 4), (5,)))
    leaves = (x, weight, bias)
    out = torch.randn(3, 2, 37, 5, device=device)

    def call(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return short_conv(x, weight, bias, silu=True)[0]

    with use_backend("triton"), poisoned():
        for shared in (False, True):
            together = torch.vmap(call, (None if shared else 0, 0, 0))(x[0] if shared else x, weight, bias)
            alone = torch.stack([call(x[0 if shared else i], weight[i], bias[i]) for i in range(3)])
            torch.testing.assert_close(together, alone)
            torch.testing.assert_close(*(torch.autograd.grad((y * out).sum(), leaves) for y in (together, alone)))


def check_step(options: tuple[int, bool, bool, bool], device: str, dtype: torch.dtype) -> None:
    """A token decoded by members of their own equals the last token of a segment, and so do its gradients; the tail moves on."""
    taps, with_bias, silu, _ = options
    shapes = {"x": (3, 2, 5), "tail": (3, 2, taps - 1, 5), "weight": (3, 5, taps)} | ({"bias": (3, 5)} if with_bias else {})
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    tensors |= {name: tensors[name].to(dtype) for name in ("x", "tail")}

    def call(own: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return short_conv_step(own["x"], own["weight"], own.get("bias"), own["tail"], silu=silu)

    def definition(own: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        whole = by_definition(own["x"][:, None], own["weight"], own.get("bias"), own["tail"], silu=silu)
        return whole[:, -1], torch.cat((own["tail"], own["x"][:, None]), 1)[:, 1:]

    def run(leaves: dict[str, Tensor], function) -> dict[str, Tensor]:
        y, tail = function(leaves)
        gradients = torch.autograd.grad(y.sin().sum() + (tail**2).sum(), list(leaves.values()))
        return {"y": y, "tail": tail} | {f"d{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}

    with use_backend("triton"), poisoned():
        got = run({name: tensor.to(device).requires_grad_() for name, tensor in tensors.items()}, torch.vmap(call))

    def loop(leaves: dict[str, Tensor]) -> tuple[Tensor, ...]:
        members = [definition({name: leaf[i] for name, leaf in leaves.items()}) for i in range(3)]
        return tuple(torch.stack(outputs) for outputs in zip(*members, strict=True))

    true = run({name: tensor.double().requires_grad_() for name, tensor in tensors.items()}, loop)
    assert got["tail"].dtype == got["y"].dtype == dtype
    require_close(got, true, SINGLE if dtype == torch.float32 else 2 * SIXTEEN_BIT)
