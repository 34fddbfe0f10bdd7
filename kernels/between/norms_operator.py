"""The norms of `kernels.norms` as operators: a compiler sees through the forward pass, the backward pass is one kernel.

Shape legend: M members, N tokens of a member, D width, B sequences of a member, T time, R chosen positions of a sequence.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels._members import fold_members
from kernels.rows import places


@torch.library.triton_op("mixer_bench::norms", mutates_args={})
def norms_operator(
    r_MND: Tensor,
    weight1_MD: Tensor,
    bias1_MD: Tensor,
    weight2_MD: Tensor | None,
    bias2_MD: Tensor | None,
    rows_MBR: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """`norm_pair` for M members; without second parameters `layer_norm`, in the second place.

    Returns:
        s at the chosen positions [M, B R, D] or at all [M, N, D]; the last norm [M, N, D]; that at the chosen positions. What
        there is not is empty.
    """
    from kernels.norms import normalized

    def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return normalized(x, weight[:, None], bias[:, None], eps)

    if weight2_MD is None or bias2_MD is None:
        return r_MND.new_empty(0), norm(r_MND, weight1_MD, bias1_MD), r_MND.new_empty(0)
    s_MND = r_MND + norm(r_MND, weight1_MD, bias1_MD)
    y_MND = norm(s_MND, weight2_MD, bias2_MD)
    if rows_MBR is None:
        return s_MND, y_MND, r_MND.new_empty(0)
    # made again at the chosen positions, so that s is not stored at the others
    start_B1 = torch.arange(rows_MBR.shape[1], device=r_MND.device)[:, None] * (r_MND.shape[1] // rows_MBR.shape[1])
    place_MS1 = (rows_MBR + start_B1).flatten(1)[..., None]
    picked_MSD = r_MND.gather(1, place_MS1.expand(-1, -1, r_MND.shape[-1]))
    picked_MSD = picked_MSD + norm(picked_MSD, weight1_MD, bias1_MD)
    return picked_MSD, y_MND, norm(picked_MSD, weight2_MD, bias2_MD)


@torch.library.custom_op("mixer_bench::norms_backward", mutates_args=())
def _backward_operator(
    ds: Tensor,
    dy_MND: Tensor,
    dpicked: Tensor,
    r_MND: Tensor,
    weight1_MD: Tensor,
    bias1_MD: Tensor,
    weight2_MD: Tensor | None,
    bias2_MD: Tensor | None,
    place_MBT: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """The gradient of r, and those of the parameters, [M, 2 or 4, D] in fp32.

    `place_MBT` is int32: which of its sequence's rows of `ds` and `dpicked` belongs to a token, R or more for none.
    """
    from kernels.between.norms_triton import backward

    with torch.cuda.device_of(dy_MND):  # Triton launches on the current device
        return backward(ds, dy_MND, dpicked, r_MND, weight1_MD, bias1_MD, weight2_MD, bias2_MD, place_MBT, eps)


@_backward_operator.register_fake
def _(ds, dy_MND, dpicked, r_MND, weight1_MD, bias1_MD, weight2_MD, bias2_MD, place_MBT, eps) -> tuple[Tensor, Tensor]:
    members, _, width = r_MND.shape
    n_parameters = 2 if weight2_MD is None else 4
    return r_MND.new_empty(r_MND.shape), r_MND.new_empty(members, n_parameters, width, dtype=torch.float32)


def _save(ctx, inputs, output) -> None:
    r_MND, weight1_MD, bias1_MD, weight2_MD, bias2_MD, rows_MBR, ctx.eps = inputs
    ctx.save_for_backward(r_MND, weight1_MD, bias1_MD, weight2_MD, bias2_MD, rows_MBR)


def _differentiate(ctx, ds: Tensor, dy_MND: Tensor, dpicked: Tensor) -> tuple[Tensor | None, ...]:
    r_MND, weight1_MD, bias1_MD, weight2_MD, bias2_MD, rows_MBR = ctx.saved_tensors
    place_MBT = None if rows_MBR is None else places(rows_MBR, r_MND.shape[1] // rows_MBR.shape[1])
    gradients = (ds, dy_MND, dpicked)
    dr_MND, found = _backward_operator(*gradients, r_MND, weight1_MD, bias1_MD, weight2_MD, bias2_MD, place_MBT, ctx.eps)
    given = (weight1_MD, bias1_MD, weight2_MD, bias2_MD)
    return dr_MND, *(None if p is None else found[:, i].to(p.dtype) for i, p in enumerate(given)), None, None


norms_operator.register_autograd(_differentiate, setup_context=_save)


@norms_operator.register_vmap
def _(info, in_dims, *arguments) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
    members = info.batch_size
    *tensors, eps = arguments
    folded = (None if t is None else fold_members(t, axis, members) for t, axis in zip(tensors, in_dims[:-1], strict=True))
    outputs = norms_operator(*folded, eps)
    parts = tuple(t if t.ndim == 1 else t.unflatten(0, (members, -1)) for t in outputs)
    return parts, tuple(None if t.ndim == 1 else 0 for t in outputs)
