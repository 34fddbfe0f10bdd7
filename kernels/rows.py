"""Attention of a few queries over a whole sequence, with keys and values that are never made.

Where only some positions are asked for, as in the last layer of a model whose loss looks at labelled rows, both linear maps of
the input can move to the side of the queries: q . (W x) = (W^T q) . x, and sum_s w_s V x_s = V sum_s w_s x_s. What is left of the
sequence's side is to read x, at any number of heads.

Shape legend: B batch, T time, D width of x, H heads, M rows, K head width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels._arguments import INDICES, check_arguments, check_axes
from kernels._members import fold_members
from kernels.backends import TWO
from kernels.dispatch import pick

MOST_WIDTH = 256
"""Of the Triton form, whose programs hold whole rows of x and of the queries."""


def pick_rows(x_BTD: Tensor, rows_BM: Tensor) -> Tensor:
    """The positions asked for, [B, M, D].

    Args:
        x_BTD: any dtype.
        rows_BM: int64. A position may repeat, but then only its first place may be given a gradient: the gradient is looked up
            by position, which a compiler fuses with what reads it, instead of being added into zeros.
    """
    return _pick_rows(x_BTD, rows_BM)


def places(rows_BM: Tensor, length: int) -> Tensor:
    """Where each of `length` positions stands among the rows, the first time: [B, T] int32, M for nowhere."""
    most = rows_BM.shape[-1]
    order_BM = torch.arange(most, device=rows_BM.device, dtype=torch.int32).expand(rows_BM.shape)
    nowhere_BT = torch.full((*rows_BM.shape[:-1], length), most, device=rows_BM.device, dtype=torch.int32)
    return nowhere_BT.scatter_reduce(-1, rows_BM, order_BM, "amin")


# An operator that a compiler sees through, forward and backward: a plain function would get the gradient of `gather`.
@torch.library.triton_op("mixer_bench::pick_rows", mutates_args={})
def _pick_rows(x_BTD: Tensor, rows_BM: Tensor) -> Tensor:
    return x_BTD.gather(1, _wide(rows_BM, x_BTD))


def _save(ctx, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    x_BTD, rows_BM = inputs
    ctx.save_for_backward(rows_BM)
    ctx.length = x_BTD.shape[1]


def _differentiate(ctx, dy_BMD: Tensor) -> tuple[Tensor, None]:
    (rows_BM,) = ctx.saved_tensors
    place_BT = places(rows_BM, ctx.length)
    dx_BTD = dy_BMD.gather(1, _wide(place_BT.clamp(max=rows_BM.shape[1] - 1).long(), dy_BMD))
    return torch.where((place_BT < rows_BM.shape[1])[..., None], dx_BTD, 0.0).to(dy_BMD.dtype), None


_pick_rows.register_autograd(_differentiate, setup_context=_save)


@_pick_rows.register_vmap
def _(info, in_dims: tuple[int | None, int | None], x_BTD: Tensor, rows_BM: Tensor) -> tuple[Tensor, int]:
    x, rows = (fold_members(t, axis, info.batch_size) for t, axis in zip((x_BTD, rows_BM), in_dims, strict=True))
    return _pick_rows(x, rows).unflatten(0, (info.batch_size, -1)), 0


def _wide(rows_BM: Tensor, x_BTD: Tensor) -> Tensor:
    return rows_BM[..., None].expand(-1, -1, x_BTD.shape[-1])


def pick_times(x_DBT: Tensor, rows_BM: Tensor) -> Tensor:
    """`pick_rows` of what lies channel by channel: [B, M, D] from [D, B, T]."""
    return _pick_times(x_DBT[None], rows_BM[None]).squeeze(0)


@torch.library.triton_op("mixer_bench::pick_times", mutates_args={})
def _pick_times(x_GDBT: Tensor, rows_GBM: Tensor) -> Tensor:
    at_GDBM = rows_GBM[:, None].expand(-1, x_GDBT.shape[1], -1, -1)
    return x_GDBT.gather(3, at_GDBM).permute(0, 2, 3, 1).contiguous()


def _save_times(ctx, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    x_GDBT, rows_GBM = inputs
    ctx.save_for_backward(rows_GBM)
    ctx.length = x_GDBT.shape[3]


def _differentiate_times(ctx, dy_GBMD: Tensor) -> tuple[Tensor, None]:
    (rows_GBM,) = ctx.saved_tensors
    most, dy_GDBM = rows_GBM.shape[2], dy_GBMD.permute(0, 3, 1, 2)
    place_GBT = places(rows_GBM.flatten(0, 1), ctx.length).unflatten(0, rows_GBM.shape[:2])
    at_GDBT = place_GBT.clamp(max=most - 1).long()[:, None].expand(-1, dy_GDBM.shape[1], -1, -1)
    return torch.where((place_GBT < most)[:, None], dy_GDBM.contiguous().gather(3, at_GDBT), 0.0).to(dy_GBMD.dtype), None


_pick_times.register_autograd(_differentiate_times, setup_context=_save_times)


@_pick_times.register_vmap
def _(info, in_dims: tuple[int | None, int | None], x_GDBT: Tensor, rows_GBM: Tensor) -> tuple[Tensor, int]:
    x, rows = (fold_members(t, axis, info.batch_size) for t, axis in zip((x_GDBT, rows_GBM), in_dims, strict=True))
    return _pick_times(x, rows).unflatten(0, (info.batch_size, -1)), 0


def read_rows(
    q_BHMD: Tensor, x_BTD: Tensor, rows_BM: Tensor, *, weights: str, eps: float | None = None, window: int | None = None
) -> Tensor:
    """sum_s w_ms x_s with weights of row m from its scores q_m . x_s over the tokens s that it sees.

    Args:
        q_BHMD: scaled queries that the keys' map has been applied to.
        x_BTD: what keys and values are made from.
        rows_BM: the queries' positions; each sees its own and earlier ones.
        weights: "softmax" of the scores, or "taylor": 1 + s + s^2 / 2, the weights of `kernels.taylor`.
        eps: taylor weights are divided by their sum plus this; None for no division.
        window: number of tokens seen, the own one included; None for all.

    Returns:
        [B, H, M, D] in the dtype of x; the values' map is still to be applied.

    Raises:
        ValueError: tensors that do not belong together.
    """
    check_axes("q", q_BHMD, "B H M D")
    check_axes("x", x_BTD, "B T D")
    if weights not in ("softmax", "taylor"):
        raise ValueError(f"weights is {weights!r}; it must be 'softmax' or 'taylor'")
    expected = {
        "q": (q_BHMD, (x_BTD.shape[0], *q_BHMD.shape[1:3], x_BTD.shape[2])),
        "rows": (rows_BM, (x_BTD.shape[0], q_BHMD.shape[2])),
    }
    check_arguments(x_BTD, expected, dtypes={"rows": INDICES})
    heads, most = q_BHMD.shape[1:3]
    place_BR = rows_BM.repeat(1, heads)
    q_BRD = q_BHMD.flatten(1, 2).to(x_BTD.dtype)
    width = x_BTD.shape[-1]
    obstacle = f"width {width} is above {MOST_WIDTH}" if width > MOST_WIDTH else None
    if pick("read_rows", x_BTD, obstacle=obstacle, tensor_cores=True, backends=TWO) == "triton":
        from kernels.between.rows_operator import read_rows_operator

        flags = (weights == "taylor", -1.0 if eps is None else eps, window or 0)
        y_BRD = read_rows_operator(q_BRD, x_BTD, place_BR, *flags)[0]
    else:
        y_BRD = _read(q_BRD, x_BTD, place_BR, weights, eps, window)
    return y_BRD.unflatten(1, (heads, most))


def _read(q_BRD: Tensor, x_BTD: Tensor, place_BR: Tensor, weights: str, eps: float | None, window: int | None) -> Tensor:
    """The definition."""
    distance_BRT = place_BR[..., None] - torch.arange(x_BTD.shape[1], device=x_BTD.device)
    seen_BRT = distance_BRT >= 0
    if window is not None:
        seen_BRT = seen_BRT & (distance_BRT < window)
    scores_BRT = q_BRD @ x_BTD.mT
    wide_BRT = scores_BRT.to(torch.promote_types(scores_BRT.dtype, torch.float32))
    if weights == "softmax":
        weights_BRT = wide_BRT.masked_fill(~seen_BRT, float("-inf")).softmax(-1)
    else:
        weights_BRT = torch.where(seen_BRT, 1 + wide_BRT + 0.5 * wide_BRT.square(), 0.0)
        weights_BRT = weights_BRT if eps is None else weights_BRT / (weights_BRT.sum(-1, keepdim=True) + eps)
    return weights_BRT.to(x_BTD.dtype) @ x_BTD
