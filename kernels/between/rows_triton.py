"""Reading a sequence for a few queries in Triton: one launch forward, two backward.

Forward, a program owns some rows of one sequence and walks over the sequence, as in FlashAttention (Dao et al. 2022) with keys and
values that are the input itself. Backward, one kernel does the same for the queries' gradient; another owns some tokens and walks
over the rows. Scores stay in registers, in fp32.

With f the weight before division, N what it is divided by, p = f / N and delta = dy . y (zero without division), the gradient of a
score is p (dy . x - delta) for softmax, where f' = f, and f' (dy . x - delta) / N for Taylor weights.

Bytes: forward reads x once, backward twice, and writes dx; the rows are few.

Shape legend: B batch, T time, D width, R rows; L rows and S tokens of a tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._entry import entry

LOG2_E = tl.constexpr(1.4426950408889634)
LEAST_ROWS, MOST_ROWS, TOKENS, NARROW, WARPS = 16, 64, 64, 128, 4
LENGTHS = ("n_rows", "n_tokens", "window")


@triton.jit
def _load(base_ptr, index_L, inside_L, width, D: tl.constexpr):
    """Rows [L, D] of a matrix, zero outside."""
    column_D = tl.arange(0, D)
    mask_LD = inside_L[:, None] & (column_D < width)[None, :]
    return tl.load(base_ptr + index_L[:, None] * width + column_D[None, :], mask=mask_LD, other=0.0)


@triton.jit
def _seen(place_L, token_S, inside_L, n_tokens, window, WINDOW: tl.constexpr):
    """Which tokens each row sees."""
    distance_LS = place_L[:, None] - token_S[None, :]
    seen_LS = (distance_LS >= 0) & (token_S < n_tokens)[None, :] & inside_L[:, None]
    if WINDOW:
        seen_LS = seen_LS & (distance_LS < window)
    return seen_LS


@triton.jit
def _weights(scores_LS, seen_LS, scale_L, TAYLOR: tl.constexpr):
    """The weights and their derivatives by the scores, where `scale` is the log of softmax's sum, or 1 / N."""
    if TAYLOR:
        weights_LS = tl.where(seen_LS, 1 + scores_LS + 0.5 * scores_LS * scores_LS, 0.0) * scale_L[:, None]
        slopes_LS = tl.where(seen_LS, 1 + scores_LS, 0.0) * scale_L[:, None]
    else:
        weights_LS = tl.where(seen_LS, tl.exp2((scores_LS - scale_L[:, None]) * LOG2_E), 0.0)
        slopes_LS = weights_LS
    return weights_LS, slopes_LS


@entry(do_not_specialize=LENGTHS)
def read_rows_forward(
    q_ptr, x_ptr, place_ptr, y_ptr, scale_ptr, n_rows, n_tokens, window, width, eps,
    TAYLOR: tl.constexpr, DIVIDED: tl.constexpr, WINDOW: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Some rows of one sequence."""
    n_blocks = tl.cdiv(n_rows, ROWS)
    sequence = (tl.program_id(0) // n_blocks).to(tl.int64)
    row_L = tl.program_id(0) % n_blocks * ROWS + tl.arange(0, ROWS)
    inside_L = row_L < n_rows
    place_L = tl.load(place_ptr + sequence * n_rows + row_L, mask=inside_L, other=-1).to(tl.int32)
    q_LD = _load(q_ptr + sequence * n_rows * width, row_L, inside_L, width, D)
    peak_L = tl.full([ROWS], float("-inf"), tl.float32)
    total_L = tl.zeros([ROWS], tl.float32)
    y_LD = tl.zeros([ROWS, D], tl.float32)
    for start in range(0, n_tokens, TOKENS):
        token_S = start + tl.arange(0, TOKENS)
        x_SD = _load(x_ptr + sequence * n_tokens * width, token_S, token_S < n_tokens, width, D)
        scores_LS = tl.dot(q_LD, tl.trans(x_SD), input_precision="ieee")
        seen_LS = _seen(place_L, token_S, inside_L, n_tokens, window, WINDOW)
        if TAYLOR:
            weights_LS = tl.where(seen_LS, 1 + scores_LS + 0.5 * scores_LS * scores_LS, 0.0)
        else:
            higher_L = tl.maximum(peak_L, tl.max(tl.where(seen_LS, scores_LS, float("-inf")), axis=1))
            shift_L = tl.where(higher_L == float("-inf"), 0.0, higher_L)  # a row that has seen nothing yet
            weights_LS = tl.where(seen_LS, tl.exp2((scores_LS - shift_L[:, None]) * LOG2_E), 0.0)
            shrink_L = tl.exp2((peak_L - shift_L) * LOG2_E)
            total_L, y_LD, peak_L = total_L * shrink_L, y_LD * shrink_L[:, None], higher_L
        total_L += tl.sum(weights_LS, axis=1)
        y_LD += tl.dot(weights_LS.to(x_SD.dtype), x_SD, input_precision="ieee")
    if TAYLOR:
        scale_L = 1 / (total_L + eps) if DIVIDED else tl.full([ROWS], 1.0, tl.float32)
        y_LD *= scale_L[:, None]
    else:
        total_L = tl.where(inside_L, total_L, 1.0)
        y_LD = y_LD / total_L[:, None]
        scale_L = tl.where(inside_L, peak_L, 0.0) + tl.log(total_L)
    tl.store(scale_ptr + sequence * n_rows + row_L, scale_L, mask=inside_L)
    column_D = tl.arange(0, D)
    y_ptr += sequence * n_rows * width
    mask_LD = inside_L[:, None] & (column_D < width)[None, :]
    tl.store(y_ptr + row_L[:, None] * width + column_D[None, :], y_LD.to(y_ptr.dtype.element_ty), mask=mask_LD)


@triton.jit
def _gradients(
    q_LD, dy_LD, x_SD, place_L, token_S, inside_L, scale_L, delta_L, n_tokens, window, TAYLOR: tl.constexpr, WINDOW: tl.constexpr
):
    """The weights of a tile, and the gradients of its scores."""
    scores_LS = tl.dot(q_LD, tl.trans(x_SD), input_precision="ieee")
    seen_LS = _seen(place_L, token_S, inside_L, n_tokens, window, WINDOW)
    weights_LS, slopes_LS = _weights(scores_LS, seen_LS, scale_L, TAYLOR)
    along_LS = tl.dot(dy_LD, tl.trans(x_SD), input_precision="ieee")
    return weights_LS.to(x_SD.dtype), (slopes_LS * (along_LS - delta_L[:, None])).to(x_SD.dtype)


@triton.jit
def _delta(dy_LD, y_ptr, row_L, inside_L, width, DIVIDED: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr):
    """What a division by the weights' sum takes from every score's gradient."""
    if DIVIDED:
        return tl.sum(dy_LD.to(tl.float32) * _load(y_ptr, row_L, inside_L, width, D).to(tl.float32), axis=1)
    else:
        return tl.zeros([ROWS], tl.float32)


@entry(do_not_specialize=LENGTHS)
def read_rows_dq(
    dy_ptr, q_ptr, x_ptr, place_ptr, y_ptr, scale_ptr, dq_ptr, n_rows, n_tokens, window, width,
    TAYLOR: tl.constexpr, DIVIDED: tl.constexpr, WINDOW: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """The queries' gradient for some rows of one sequence."""
    n_blocks = tl.cdiv(n_rows, ROWS)
    sequence = (tl.program_id(0) // n_blocks).to(tl.int64)
    row_L = tl.program_id(0) % n_blocks * ROWS + tl.arange(0, ROWS)
    inside_L = row_L < n_rows
    own = sequence * n_rows
    place_L = tl.load(place_ptr + own + row_L, mask=inside_L, other=-1).to(tl.int32)
    scale_L = tl.load(scale_ptr + own + row_L, mask=inside_L, other=0.0)
    q_LD = _load(q_ptr + own * width, row_L, inside_L, width, D)
    dy_LD = _load(dy_ptr + own * width, row_L, inside_L, width, D)
    delta_L = _delta(dy_LD, y_ptr + own * width, row_L, inside_L, width, DIVIDED, ROWS, D)
    dq_LD = tl.zeros([ROWS, D], tl.float32)
    for start in range(0, n_tokens, TOKENS):
        token_S = start + tl.arange(0, TOKENS)
        x_SD = _load(x_ptr + sequence * n_tokens * width, token_S, token_S < n_tokens, width, D)
        _, dscores_LS = _gradients(
            q_LD, dy_LD, x_SD, place_L, token_S, inside_L, scale_L, delta_L, n_tokens, window, TAYLOR, WINDOW
        )
        dq_LD += tl.dot(dscores_LS, x_SD, input_precision="ieee")
    column_D = tl.arange(0, D)
    dq_ptr += own * width
    mask_LD = inside_L[:, None] & (column_D < width)[None, :]
    tl.store(dq_ptr + row_L[:, None] * width + column_D[None, :], dq_LD.to(dq_ptr.dtype.element_ty), mask=mask_LD)


@entry(do_not_specialize=LENGTHS)
def read_rows_dx(
    dy_ptr, q_ptr, x_ptr, place_ptr, y_ptr, scale_ptr, dx_ptr, n_rows, n_tokens, window, width,
    TAYLOR: tl.constexpr, DIVIDED: tl.constexpr, WINDOW: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """The input's gradient for some tokens of one sequence."""
    n_blocks = tl.cdiv(n_tokens, TOKENS)
    sequence = (tl.program_id(0) // n_blocks).to(tl.int64)
    token_S = tl.program_id(0) % n_blocks * TOKENS + tl.arange(0, TOKENS)
    x_SD = _load(x_ptr + sequence * n_tokens * width, token_S, token_S < n_tokens, width, D)
    own = sequence * n_rows
    dx_SD = tl.zeros([TOKENS, D], tl.float32)
    for start in range(0, n_rows, ROWS):
        row_L = start + tl.arange(0, ROWS)
        inside_L = row_L < n_rows
        place_L = tl.load(place_ptr + own + row_L, mask=inside_L, other=-1).to(tl.int32)
        scale_L = tl.load(scale_ptr + own + row_L, mask=inside_L, other=0.0)
        q_LD = _load(q_ptr + own * width, row_L, inside_L, width, D)
        dy_LD = _load(dy_ptr + own * width, row_L, inside_L, width, D)
        delta_L = _delta(dy_LD, y_ptr + own * width, row_L, inside_L, width, DIVIDED, ROWS, D)
        weights_LS, dscores_LS = _gradients(
            q_LD, dy_LD, x_SD, place_L, token_S, inside_L, scale_L, delta_L, n_tokens, window, TAYLOR, WINDOW
        )
        dx_SD += tl.dot(tl.trans(dscores_LS), q_LD, input_precision="ieee")
        dx_SD += tl.dot(tl.trans(weights_LS), dy_LD, input_precision="ieee")
    column_D = tl.arange(0, D)
    dx_ptr += sequence * n_tokens * width
    mask_SD = (token_S < n_tokens)[:, None] & (column_D < width)[None, :]
    tl.store(dx_ptr + token_S[:, None] * width + column_D[None, :], dx_SD.to(dx_ptr.dtype.element_ty), mask=mask_SD)


def tiles(n_rows: int, width: int) -> dict[str, int]:
    """Rows and tokens of a tile, and channels of a program: as many rows as there are, up to what registers hold."""
    channels = max(32, triton.next_power_of_2(width))
    if channels > NARROW:
        return {"ROWS": LEAST_ROWS, "TOKENS": TOKENS // 2, "D": channels}
    rows = min(MOST_ROWS, max(LEAST_ROWS, triton.next_power_of_2(n_rows)))
    return {"ROWS": rows, "TOKENS": TOKENS, "D": channels}


def forward(q_BRD: Tensor, x_BTD: Tensor, place_BR: Tensor, taylor: bool, eps: float, window: int) -> tuple[Tensor, Tensor]:
    """See `kernels.between.rows_operator`."""
    batch, rows, width = q_BRD.shape
    y_BRD, scale_BR = x_BTD.new_empty(q_BRD.shape), q_BRD.new_empty(batch, rows, dtype=torch.float32)
    shape = tiles(rows, width)
    read_rows_forward[(batch * triton.cdiv(rows, shape["ROWS"]),)](
        q_BRD.contiguous(), x_BTD.contiguous(), place_BR.contiguous(), y_BRD, scale_BR, rows, x_BTD.shape[1], window, width, eps,
        TAYLOR=taylor, DIVIDED=eps >= 0, WINDOW=window > 0, **shape, num_warps=WARPS,
    )  # fmt: skip
    return y_BRD, scale_BR


def backward(
    dy_BRD: Tensor,
    q_BRD: Tensor,
    x_BTD: Tensor,
    place_BR: Tensor,
    y_BRD: Tensor,
    scale_BR: Tensor,
    taylor: bool,
    eps: float,
    window: int,
) -> tuple[Tensor, Tensor]:
    """See `kernels.between.rows_operator`."""
    batch, rows, width = q_BRD.shape
    length = x_BTD.shape[1]
    dq_BRD, dx_BTD = q_BRD.new_empty(q_BRD.shape), x_BTD.new_empty(x_BTD.shape)
    dy_BRD = dy_BRD.to(x_BTD.dtype).contiguous()
    inputs = (dy_BRD, q_BRD.contiguous(), x_BTD.contiguous(), place_BR.contiguous(), y_BRD, scale_BR)
    sizes = (rows, length, window, width)
    flags = {"TAYLOR": taylor, "DIVIDED": not taylor or eps >= 0, "WINDOW": window > 0, "num_warps": WARPS}
    walk, own = tiles(rows, width), tiles(LEAST_ROWS, width)
    read_rows_dq[(batch * triton.cdiv(rows, walk["ROWS"]),)](*inputs, dq_BRD, *sizes, **flags, **walk)
    read_rows_dx[(batch * triton.cdiv(length, own["TOKENS"]),)](*inputs, dx_BTD, *sizes, **flags, **own)
    return dq_BRD, dx_BTD
