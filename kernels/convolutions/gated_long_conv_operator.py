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
def gated_long_conv_operator(
    qkv: Tensor, bias: Tensor, taps_MHL: Tensor, shift_MDK: Tensor | None, q: int
) -> tuple[Tensor, Tensor]:
    """`kernels.conv.gated_long_conv` for M members with filters of their own.

    Args:
        qkv: [M, 3, D, B, T].
        bias: added to qkv, [M, 3, D].
        taps_MHL: filters of the heads.
        shift_MDK: filters of the keys, or None.
        q: which of the three parts are queries.

    Returns:
        The outputs [M, D, B, T], and for the backward pass the filtered keys, whole chunks of them; empty without filters.
    """
    from kernels.convolutions.gated_long_conv_triton import forward

    with torch.cuda.device_of(qkv):  # Triton launches on the current device
        return forward(qkv, bias, taps_MHL, shift_MDK, q)


@operator("mixer_bench::gated_long_conv_backward")
def _backward_operator(
    dy: Tensor, qkv: Tensor, k: Tensor, bias: Tensor, taps_MHL: Tensor, shift_MDK: Tensor | None, q: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of qkv, of the bias in fp32, of the filters and of the shift's, empty where there is none."""
    from kernels.convolutions.gated_long_conv_triton import backward

    with torch.cuda.device_of(dy):
        return backward(dy, qkv, k, bias, taps_MHL, shift_MDK, q)


@gated_long_conv_operator.register_fake
def _(qkv: Tensor, bias: Tensor, taps_MHL: Tensor, shift_MDK: Tensor | None, q: int) -> tuple[Tensor, Tensor]:
    from kernels.convolutions.gated_long_conv_triton import CHUNK

    members, _, width, batch, tokens = qkv.shape
    length = tokens + -tokens % CHUNK
    y = qkv.new_empty(members, width, batch, length)[..., :tokens]
    return y, qkv.new_empty(0) if shift_MDK is None else qkv.new_empty(members, width, batch, length)


@_backward_operator.register_fake
def _(
    dy: Tensor, qkv: Tensor, k: Tensor, bias: Tensor, taps_MHL: Tensor, shift_MDK: Tensor | None, q: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from kernels.convolutions.gated_long_conv_triton import CHUNK

    tokens = qkv.shape[-1]
    d_qkv = qkv.new_empty(*qkv.shape[:-1], tokens + -tokens % CHUNK)[..., :tokens]
    dshift = taps_MHL.new_empty(0) if shift_MDK is None else shift_MDK.new_empty(shift_MDK.shape)
    return d_qkv, bias.new_empty(bias.shape, dtype=torch.float32), taps_MHL.new_empty(taps_MHL.shape), dshift


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, bias, taps_MHL, shift_MDK, ctx.q = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(qkv, output[1], bias, taps_MHL, shift_MDK)


def _differentiate(ctx: Any, dy: Tensor, _dk: Tensor) -> tuple[Tensor | None, ...]:
    qkv, k, bias, taps_MHL, shift_MDK = ctx.saved_tensors
    d_qkv, dbias, dtaps_MHL, dshift_MDK = _backward_operator(dy, qkv, k, bias, taps_MHL, shift_MDK, ctx.q)
    return d_qkv, dbias.to(bias.dtype), dtaps_MHL, None if shift_MDK is None else dshift_MDK, None


gated_long_conv_operator.register_autograd(_differentiate, setup_context=_save)


@gated_long_conv_operator.register_vmap
def _(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[tuple[Tensor, Tensor], tuple[int, int | None]]:
    members = info.batch_size
    folded = [
        fold_members(value, axis, members) if isinstance(value, Tensor) else value
        for value, axis in zip(arguments, in_dims, strict=True)
    ]
    y, k = gated_long_conv_operator(*folded)
    if k.ndim == 1:
        return (y.unflatten(0, (members, -1)), k), (0, None)
    return (y.unflatten(0, (members, -1)), k.unflatten(0, (members, -1))), (0, 0)
