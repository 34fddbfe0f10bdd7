"""The short causal convolution as a custom operator: fake, autograd and vmap rules around its Triton kernels.

Shape legend: B batch, T time, D channels, K taps, M members (each B / M sequences).
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels._members import fold_members


@torch.library.custom_op("mixer_bench::short_conv", mutates_args=())
def short_conv_operator(x_BTD: Tensor, weight_MDK: Tensor, bias_MD: Tensor | None, silu: bool) -> Tensor:
    """`kernels.conv.short_conv` from zeros, for M members with taps of their own, their sequences one after the other.

    Returns:
        The outputs [B, T, D] in the dtype of x; products and sums are made in fp32.
    """
    from kernels.conv_triton import forward

    return forward(x_BTD, weight_MDK, bias_MD, silu)


@torch.library.custom_op("mixer_bench::short_conv_backward", mutates_args=())
def _backward_operator(
    dy_BTD: Tensor, x_BTD: Tensor, weight_MDK: Tensor, bias_MD: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, the taps, and the bias, whether there is one or not."""
    from kernels.conv_triton import backward

    return backward(dy_BTD, x_BTD, weight_MDK, bias_MD, silu)


@short_conv_operator.register_fake
def _(x_BTD: Tensor, weight_MDK: Tensor, bias_MD: Tensor | None, silu: bool) -> Tensor:
    return x_BTD.new_empty(x_BTD.shape)


@_backward_operator.register_fake
def _(dy_BTD: Tensor, x_BTD: Tensor, weight_MDK: Tensor, bias_MD: Tensor | None, silu: bool) -> tuple[Tensor, Tensor, Tensor]:
    return x_BTD.new_empty(x_BTD.shape), weight_MDK.new_empty(weight_MDK.shape), weight_MDK.new_empty(weight_MDK.shape[:2])


def _save(ctx, inputs: tuple[Tensor, Tensor, Tensor | None, bool], output: Tensor) -> None:
    x_BTD, weight_MDK, bias_MD, ctx.silu = inputs
    ctx.save_for_backward(x_BTD, weight_MDK, bias_MD)


def _differentiate(ctx, dy_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
    x_BTD, weight_MDK, bias_MD = ctx.saved_tensors
    dx_BTD, dweight_MDK, dbias_MD = _backward_operator(dy_BTD, x_BTD, weight_MDK, bias_MD, ctx.silu)
    return dx_BTD, dweight_MDK, None if bias_MD is None else dbias_MD.to(bias_MD.dtype), None


short_conv_operator.register_autograd(_differentiate, setup_context=_save)


@short_conv_operator.register_vmap
def _(
    info, in_dims: tuple[int | None, ...], x_BTD: Tensor, weight_MDK: Tensor, bias_MD: Tensor | None, silu: bool
) -> tuple[Tensor, int]:
    members = info.batch_size
    x, weight, bias = (
        None if tensor is None else fold_members(tensor, axis, members)
        for tensor, axis in zip((x_BTD, weight_MDK, bias_MD), in_dims[:3], strict=True)
    )
    return short_conv_operator(x, weight, bias, silu).unflatten(0, (members, -1)), 0
