"""The long convolution of gated products as a custom operator: fake, autograd and vmap rules around Triton kernels.

Shape legend: M members, D channels, H heads, B sequences, T time, L and K taps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels._members import fold_members
from kernels._operator import operator


@operator("mixer_bench::gated_long_conv")
def gated_long_conv_operator(qkv: Tensor, bias: Tensor, taps_MHL: Tensor, shift_MDK: Tensor) -> tuple[Tensor, Tensor]:
    """`kernels.conv.gated_long_conv` for M members with filters of their own.

    Args:
        qkv: [M, 3, D, B, T].
        bias: added to qkv, [M, 3, D].
        taps_MHL: filters of the heads.
        shift_MDK: filters of the keys.

    Returns:
        The outputs [M, D, B, T], and for the backward pass the filtered keys, whole chunks of them.
    """
    from kernels.convolutions.gated_long_conv_triton import forward

    with torch.cuda.device_of(qkv):  # Triton launches on the current device
        return forward(qkv, bias, taps_MHL, shift_MDK)


@operator("mixer_bench::gated_long_conv_backward")
def _backward_operator(
    dy: Tensor, qkv: Tensor, k: Tensor, bias: Tensor, taps_MHL: Tensor, shift_MDK: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of qkv, of the bias in fp32, of the filters and of the shift's."""
    from kernels.convolutions.gated_long_conv_triton import backward

    with torch.cuda.device_of(dy):
        return backward(dy, qkv, k, bias, taps_MHL, shift_MDK)


@gated_long_conv_operator.register_fake
def _(qkv: Tensor, bias: Tensor, taps_MHL: Tensor, shift_MDK: Tensor) -> tuple[Tensor, Tensor]:
    from kernels.convolutions.gated_long_conv_triton import CHUNK

    members, _, width, batch, tokens = qkv.shape
    length = tokens + -tokens % CHUNK
    y = qkv.new_empty(members, width, batch, length)[..., :tokens]
    return y, qkv.new_empty(members, width, batch, length)


@_backward_operator.register_fake
def _(
    dy: Tensor, qkv: Tensor, k: Tensor, bias: Tensor, taps_MHL: Tensor, shift_MDK: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from kernels.convolutions.gated_long_conv_triton import CHUNK

    tokens = qkv.shape[-1]
    d_qkv = qkv.new_empty(*qkv.shape[:-1], tokens + -tokens % CHUNK)[..., :tokens]
    dbias = bias.new_empty(bias.shape, dtype=torch.float32)
    return d_qkv, dbias, taps_MHL.new_empty(taps_MHL.shape), shift_MDK.new_empty(shift_MDK.shape)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
    qkv, *parameters = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(qkv, output[1], *parameters)


def _differentiate(ctx: Any, dy: Tensor, _dk: Tensor) -> tuple[Tensor, ...]:
    d_qkv, dbias, dtaps_MHL, dshift_MDK = _backward_operator(dy, *ctx.saved_tensors)
    return d_qkv, dbias.to(ctx.saved_tensors[2].dtype), dtaps_MHL, dshift_MDK


gated_long_conv_operator.register_autograd(_differentiate, setup_context=_save)


@gated_long_conv_operator.register_vmap
def _(info: Any, in_dims: tuple[int | None, ...], *arguments: Tensor) -> tuple[tuple[Tensor, ...], tuple[int, int]]:
    folded = (fold_members(tensor, axis, info.batch_size) for tensor, axis in zip(arguments, in_dims, strict=True))
    return tuple(t.unflatten(0, (info.batch_size, -1)) for t in gated_long_conv_operator(*folded)), (0, 0)
