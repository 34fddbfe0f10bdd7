"""The long convolution by Toeplitz products as a custom operator: fake, autograd and vmap rules.

Shape legend: B batch, T time, D channels, L taps, M members (each B / M sequences).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels._members import fold_members
from kernels._operator import operator


@operator("mixer_bench::long_conv")
def long_conv_operator(x_BTD: Tensor, taps_MDL: Tensor) -> Tensor:
    """`kernels.conv.long_conv` for M members with filters of their own, their sequences one after the other."""
    from kernels.convolutions.long_conv_triton import forward

    with torch.cuda.device_of(x_BTD):  # Triton launches on the current device
        return forward(x_BTD, taps_MDL)


@operator("mixer_bench::long_conv_backward")
def _backward_operator(dy_BTD: Tensor, x_BTD: Tensor, taps_MDL: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the taps."""
    from kernels.convolutions.long_conv_triton import backward

    with torch.cuda.device_of(dy_BTD):
        return backward(dy_BTD, x_BTD, taps_MDL)


@long_conv_operator.register_fake
def _(x_BTD: Tensor, taps_MDL: Tensor) -> Tensor:
    return x_BTD.new_empty(x_BTD.shape)


@_backward_operator.register_fake
def _(dy_BTD: Tensor, x_BTD: Tensor, taps_MDL: Tensor) -> tuple[Tensor, Tensor]:
    return x_BTD.new_empty(x_BTD.shape), taps_MDL.new_empty(taps_MDL.shape)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, dy_BTD: Tensor) -> tuple[Tensor, Tensor]:
    return _backward_operator(dy_BTD, *ctx.saved_tensors)


long_conv_operator.register_autograd(_differentiate, setup_context=_save)


@long_conv_operator.register_vmap
def _(info: Any, in_dims: tuple[int | None, ...], x_BTD: Tensor, taps_MDL: Tensor) -> tuple[Tensor, int]:
    members = info.batch_size
    x, taps = (fold_members(tensor, axis, members) for tensor, axis in zip((x_BTD, taps_MDL), in_dims, strict=True))
    return long_conv_operator(x, taps).unflatten(0, (members, -1)), 0
