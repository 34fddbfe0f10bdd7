"""`kernels.norms.stream_norm` as an operator: a compiler sees through the forward pass, the backward pass is one kernel.

Shape legend: M members, N tokens of a member, D width, B sequences of a member, T time, R chosen positions of a sequence.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels._members import fold_members
from kernels.rows import places


@torch.library.triton_op("mixer_bench::stream_norm", mutates_args={})
def stream_norm_operator(r_MND: Tensor, weight_MD: Tensor, rows_MBR: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """`stream_norm` for M members: r at the chosen positions [M, B R, D], its norm [M, N, D], and that at those positions."""
    from kernels.norms import rms_normalized

    start_B1 = torch.arange(rows_MBR.shape[1], device=r_MND.device)[:, None] * (r_MND.shape[1] // rows_MBR.shape[1])
    place_MS1 = (rows_MBR + start_B1).flatten(1)[..., None]
    picked_MSD = r_MND.gather(1, place_MS1.expand(-1, -1, r_MND.shape[-1]))
    weight_M1D = weight_MD[:, None]
    return picked_MSD, rms_normalized(r_MND, weight_M1D, eps), rms_normalized(picked_MSD, weight_M1D, eps)


@torch.library.custom_op("mixer_bench::stream_norm_backward", mutates_args=())
def _backward_operator(
    ds_MSD: Tensor, dy_MND: Tensor, dpicked_MSD: Tensor, r_MND: Tensor, weight_MD: Tensor, place_MBT: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The gradients of r and, in fp32, of the weight.

    `place_MBT` is int32: which of its sequence's rows of `ds` and `dpicked` belongs to a token, R or more for none.
    """
    from kernels.between.stream_norm_triton import backward

    with torch.cuda.device_of(dy_MND):  # Triton launches on the current device
        return backward(ds_MSD, dy_MND, dpicked_MSD, r_MND, weight_MD, place_MBT, eps)


@_backward_operator.register_fake
def _(ds_MSD, dy_MND, dpicked_MSD, r_MND, weight_MD, place_MBT, eps) -> tuple[Tensor, Tensor]:
    return r_MND.new_empty(r_MND.shape), weight_MD.new_empty(weight_MD.shape, dtype=torch.float32)


def _save(ctx, inputs, output) -> None:
    r_MND, weight_MD, rows_MBR, ctx.eps = inputs
    ctx.save_for_backward(r_MND, weight_MD, rows_MBR)


def _differentiate(ctx, ds_MSD: Tensor, dy_MND: Tensor, dpicked_MSD: Tensor) -> tuple[Tensor, Tensor, None, None]:
    r_MND, weight_MD, rows_MBR = ctx.saved_tensors
    place_MBT = places(rows_MBR, r_MND.shape[1] // rows_MBR.shape[1])
    dr_MND, dweight_MD = _backward_operator(ds_MSD, dy_MND, dpicked_MSD, r_MND, weight_MD, place_MBT, ctx.eps)
    return dr_MND, dweight_MD.to(weight_MD.dtype), None, None


stream_norm_operator.register_autograd(_differentiate, setup_context=_save)


@stream_norm_operator.register_vmap
def _(info, in_dims, *arguments) -> tuple[tuple[Tensor, ...], tuple[int, int, int]]:
    *tensors, eps = arguments
    folded = (fold_members(t, axis, info.batch_size) for t, axis in zip(tensors, in_dims[:-1], strict=True))
    return tuple(t.unflatten(0, (info.batch_size, -1)) for t in stream_norm_operator(*folded, eps)), (0, 0, 0)
