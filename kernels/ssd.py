"""Mamba-2 between projection and gate in few passes, where its states are narrow (Dao & Gu 2024, section 7).

    S_t = exp(-exp(log_rate) dt_t) S_{t-1} + B_t (dt_t x_t)^T,    y_t = S_t^T C_t + skip x_t,    dt_t = softplus(raw_t + step_bias)

of x, B and C after a short convolution and its SiLU. There are kernels for a CUDA device only; elsewhere, and with wide states, a
mixer calls `kernels.conv.short_conv` and `kernels.recurrence.linear_recurrence`.

Shape legend: B batch, T time, H heads, P width of a head, G groups that share B and C, N states; W = H P + 2 G N channels of the
convolution, K taps, R >= W + H numbers of a row.
"""

from __future__ import annotations

from torch import Tensor

from kernels._arguments import check_arguments, check_axes
from kernels.conv import MOST_TAPS
from kernels.dispatch import pick
from kernels.narrow.ssd_operator import ssd_operator

OPERATION = "ssd"
WIDEST = 32
"""States; from 64 on kernels for Hopper are faster, and a chunk of wider ones does not fit the registers."""
LONGEST = 2048
"""Tokens up to which a program for each head and sequence is no longer than those of the convolution."""
HEAD_DIMS = (16, 32, 64)


def fits(row_BTR: Tensor, *, head_dim: int, d_state: int, taps: int) -> bool:
    """Whether `ssd` runs such a call."""
    return pick(OPERATION, row_BTR, obstacle=_obstacle(row_BTR, head_dim, d_state, taps), tensor_cores=True) == "triton"


def ssd(
    row_BTR: Tensor,
    taps_WK: Tensor,
    bias_W: Tensor | None,
    step_bias_H: Tensor,
    log_rate_H: Tensor,
    skip_H: Tensor,
    *,
    head_dim: int,
    d_state: int,
) -> tuple[Tensor, Tensor]:
    """What the formula above says, from nothing.

    Args:
        row_BTR: projected inputs: W channels of the convolution (x of all heads, then B and C of all groups), raw time steps of
            all heads, and spare numbers, which are not read.
        taps_WK: of the convolution; the last one meets the current token.
        bias_W: of the convolution, or None.
        step_bias_H: of the time steps.
        log_rate_H: of the decays.
        skip_H: D of the paper.
        head_dim: P.
        d_state: N.

    Returns:
        y [B, T, H P] and the convolved channels [B, T, W] in the dtype of the rows.

    Raises:
        ValueError: shapes, dtypes or devices do not match, or `fits` says no.
    """
    check_axes("row", row_BTR, "B T R")
    check_axes("taps", taps_WK, "W K")
    check_axes("skip", skip_H, "H")
    (width, taps), heads = taps_WK.shape, skip_H.shape[0]
    shared = width - heads * head_dim
    if shared <= 0 or shared % (2 * d_state) or heads % (shared // (2 * d_state)) or row_BTR.shape[2] < width + heads:
        raise ValueError(
            f"rows of {row_BTR.shape[2]} numbers and {width} channels do not hold {heads} heads of {head_dim}, B and C of"
            f" {d_state} states for groups of heads, and {heads} time steps"
        )
    others = {"taps": (taps_WK, (width, taps)), "bias": (bias_W, (width,)), "step_bias": (step_bias_H, (heads,))}
    check_arguments(row_BTR, others | {"log_rate": (log_rate_H, (heads,)), "skip": (skip_H, (heads,))}, first="row")
    if not fits(row_BTR, head_dim=head_dim, d_state=d_state, taps=taps):
        raise ValueError(f"ssd has kernels only, which do not run here: {_obstacle(row_BTR, head_dim, d_state, taps)}")
    weights = (None if x is None else x[None] for x in (taps_WK, bias_W, step_bias_H, log_rate_H, skip_H))
    y_BTE, xbc_BTW, _ = ssd_operator(row_BTR, *weights, head_dim, d_state)
    return y_BTE, xbc_BTW


def _obstacle(row: Tensor, head_dim: int, d_state: int, taps: int) -> str | None:
    """What keeps a call from the kernels."""
    if d_state > WIDEST:
        return f"{d_state} states are more than {WIDEST}"
    if row.shape[1] > LONGEST:
        return f"{row.shape[1]} tokens are more than {LONGEST}"
    if head_dim not in HEAD_DIMS:
        return f"head dim {head_dim} is not among {', '.join(map(str, HEAD_DIMS))}"
    return f"{taps} taps are not 1 to {MOST_TAPS}" if not 1 <= taps <= MOST_TAPS else None
