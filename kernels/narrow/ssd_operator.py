"""Mamba-2 between projection and gate as an operator: fake, autograd and vmap rules around its kernels.

Shape legend: as `kernels.narrow.ssd_launch`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels._members import fold_members
from kernels._operator import operator
from kernels.narrow import ssd_launch as launch


@operator("mixer_bench::ssd")
def ssd_operator(
    row_BTR: Tensor,
    taps_MWK: Tensor,
    bias_MW: Tensor | None,
    step_bias_MH: Tensor,
    log_rate_MH: Tensor,
    skip_MH: Tensor,
    head_dim: int,
    d_state: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """`kernels.ssd.ssd` for M members with weights of their own, their sequences one after the other.

    Returns:
        The outputs [B, T, H P] and the convolved rows [B, T, W] in the dtype of the rows, and the states behind chunks.
    """
    weights, sizes = launch.Weights(taps_MWK, bias_MW, step_bias_MH, log_rate_MH, skip_MH), launch.Sizes(head_dim, d_state)
    with torch.cuda.device_of(row_BTR):  # Triton launches on the current device
        return launch.forward(row_BTR, weights, sizes)


@operator("mixer_bench::ssd_backward")
def _backward_operator(
    dy_BTE: Tensor,
    dxbc_BTW: Tensor | None,
    row_BTR: Tensor,
    taps_MWK: Tensor,
    bias_MW: Tensor | None,
    step_bias_MH: Tensor,
    log_rate_MH: Tensor,
    skip_MH: Tensor,
    xbc_BTW: Tensor,
    kept: Tensor,
    head_dim: int,
    d_state: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the rows, of taps and bias, empty where there is none, and [3, M, H] of log rate, step bias and skip."""
    weights, sizes = launch.Weights(taps_MWK, bias_MW, step_bias_MH, log_rate_MH, skip_MH), launch.Sizes(head_dim, d_state)
    with torch.cuda.device_of(dy_BTE):  # Triton launches on the current device
        return launch.backward(dy_BTE, dxbc_BTW, row_BTR, xbc_BTW, kept, weights, sizes)


@ssd_operator.register_fake
def _(row_BTR, taps_MWK, bias_MW, step_bias_MH, log_rate_MH, skip_MH, head_dim, d_state) -> tuple[Tensor, ...]:
    weights, sizes = launch.Weights(taps_MWK, bias_MW, step_bias_MH, log_rate_MH, skip_MH), launch.Sizes(head_dim, d_state)
    batch, length, _ = row_BTR.shape
    y = row_BTR.new_empty(batch, length, skip_MH.shape[1] * head_dim)
    return y, row_BTR.new_empty(batch, length, taps_MWK.shape[1]), row_BTR.new_empty(launch.kept_shape(row_BTR, weights, sizes))


@_backward_operator.register_fake
def _(
    dy_BTE, dxbc_BTW, row_BTR, taps_MWK, bias_MW, step_bias_MH, log_rate_MH, skip_MH, xbc_BTW, kept, head_dim, d_state
) -> tuple[Tensor, ...]:
    dbias = taps_MWK.new_empty(0) if bias_MW is None else bias_MW.new_empty(bias_MW.shape)
    heads = skip_MH.new_empty(3, *skip_MH.shape, dtype=torch.float32)
    return row_BTR.new_empty(row_BTR.shape), taps_MWK.new_empty(taps_MWK.shape), dbias, heads


def _save(ctx, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[2])
    *tensors, head_dim, d_state = inputs
    ctx.sizes = head_dim, d_state
    ctx.save_for_backward(*tensors, *output[1:])


def _differentiate(ctx, dy_BTE: Tensor | None, dxbc_BTW: Tensor | None, _kept: None) -> tuple[Tensor | None, ...]:
    _, _, bias, *of_heads, xbc_BTW, _ = ctx.saved_tensors
    dy = xbc_BTW.new_zeros(*xbc_BTW.shape[:2], of_heads[0].shape[1] * ctx.sizes[0]) if dy_BTE is None else dy_BTE
    drow, dtaps, dbias, dheads = _backward_operator(dy, dxbc_BTW, *ctx.saved_tensors, *ctx.sizes)
    dlog_rate, dstep_bias, dskip = dheads.unbind()
    found = (x.to(of.dtype) for x, of in zip((dstep_bias, dlog_rate, dskip), of_heads, strict=True))
    return drow, dtaps, None if bias is None else dbias, *found, None, None


ssd_operator.register_autograd(_differentiate, setup_context=_save)


@ssd_operator.register_vmap
def _(info, in_dims: tuple[int | None, ...], *arguments) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    *tensors, head_dim, d_state = arguments
    pairs = zip(tensors, in_dims[:-2], strict=True)
    folded = (None if tensor is None else fold_members(tensor, axis, info.batch_size) for tensor, axis in pairs)
    found = ssd_operator(*folded, head_dim, d_state)
    return tuple(x.unflatten(0, (info.batch_size, -1)) for x in found), (0, 0, 0)
