"""The short convolution of what lies channel by channel as a custom operator: fake, autograd and vmap rules.

Shape legend: M members, D channels, B sequences, T time, K taps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels._members import fold_members
from kernels._operator import operator


@operator("mixer_bench::channel_short_conv")
def channel_short_conv_operator(x_MDBT: Tensor, bias_MD: Tensor, weight_MDK: Tensor) -> Tensor:
    """`kernels.conv.channel_short_conv` for M members with taps and a bias of their own: [M, D, B, T]."""
    from kernels.convolutions.channel_short_conv_triton import forward

    with torch.cuda.device_of(x_MDBT):  # Triton launches on the current device
        return forward(x_MDBT, bias_MD, weight_MDK)


@operator("mixer_bench::channel_short_conv_backward")
def _backward_operator(dy_MDBT: Tensor, x_MDBT: Tensor, bias_MD: Tensor, weight_MDK: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x, and in fp32 of the taps and the bias, [M, D, K + 1]."""
    from kernels.convolutions.channel_short_conv_triton import backward

    with torch.cuda.device_of(dy_MDBT):
        return backward(dy_MDBT, x_MDBT, bias_MD, weight_MDK)


@channel_short_conv_operator.register_fake
def _(x_MDBT: Tensor, bias_MD: Tensor, weight_MDK: Tensor) -> Tensor:
    return x_MDBT.new_empty(x_MDBT.shape)


@_backward_operator.register_fake
def _(dy_MDBT: Tensor, x_MDBT: Tensor, bias_MD: Tensor, weight_MDK: Tensor) -> tuple[Tensor, Tensor]:
    members, width, taps = weight_MDK.shape
    return x_MDBT.new_empty(x_MDBT.shape), x_MDBT.new_empty(members, width, taps + 1, dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, dy_MDBT: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x_MDBT, bias_MD, weight_MDK = ctx.saved_tensors
    dx_MDBT, sums = _backward_operator(dy_MDBT, x_MDBT, bias_MD, weight_MDK)
    return dx_MDBT, sums[..., -1].to(bias_MD.dtype), sums[..., :-1].to(weight_MDK.dtype)


channel_short_conv_operator.register_autograd(_differentiate, setup_context=_save)


@channel_short_conv_operator.register_vmap
def _(info: Any, in_dims: tuple[int | None, ...], *arguments: Tensor) -> tuple[Tensor, int]:
    folded = (fold_members(tensor, axis, info.batch_size) for tensor, axis in zip(arguments, in_dims, strict=True))
    return channel_short_conv_operator(*folded).unflatten(0, (info.batch_size, -1)), 0
