"""Mamba-2 between projection and gate (Dao & Gu 2024, section 7): short convolution, time steps, recurrence and skip.

    S_t = exp(-exp(log_rate) dt_t) S_{t-1} + B_t (dt_t x_t)^T,    y_t = S_t^T C_t + skip x_t,    dt_t = softplus(raw_t + step_bias)

of x, B and C after the convolution and a SiLU. Narrow states of whole segments have kernels of their own
(`kernels.narrow.ssd_launch`); all else goes through `kernels.conv` and `kernels.recurrence`, which choose for themselves.

Shape legend: B batch, T time, H heads, P width of a head, E = H P, G groups that share B and C, N states; W = E + 2 G N channels
of the convolution, K taps, Q = K - 1 remembered inputs, R >= W + H numbers of a row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels._arguments import check_arguments, check_axes
from kernels.conv import MOST_TAPS, short_conv
from kernels.dispatch import pick
from kernels.narrow.ssd_operator import ssd_operator
from kernels.recurrence import linear_recurrence

WIDEST = 32
"""States of the Triton form; from 64 on kernels for Hopper are faster, and a chunk of wider ones does not fit the registers."""
LONGEST = 2048
"""Tokens of the Triton form, whose programs walk whole sequences."""
HEAD_DIMS = (16, 32, 64)


class Sizes(NamedTuple):
    """G, N and P."""

    n_groups: int
    d_state: int
    head_dim: int


class Conv(NamedTuple):
    """Taps, of which the last meets the current token."""

    taps_WK: Tensor
    bias_W: Tensor | None


class Heads(NamedTuple):
    """Bias of the time steps, log rate of the decays, and the paper's D."""

    step_bias_H: Tensor
    log_rate_H: Tensor
    skip_H: Tensor


class State(NamedTuple):
    """S, and the last inputs of the convolution."""

    s_BHNP: Tensor
    tail_BQW: Tensor


def ssd(
    row_BTR: Tensor, conv: Conv | None, heads: Heads, sizes: Sizes, state: State | None = None
) -> tuple[Tensor, Tensor, State | None]:
    """What the formula above says.

    Args:
        row_BTR: projected inputs: x of all heads, B and C of all groups, raw time steps of all heads, and spare numbers, which
            are not read.
        conv: None leaves the SiLU alone.
        heads: weights of each head.
        sizes: what the rows consist of.
        state: before the segment; None means from nothing, and none is returned.

    Returns:
        y and the convolved x, [B, T, E] in the dtype of the rows, and the state after the segment in the dtypes of the given one.

    Raises:
        ValueError: shapes, dtypes or devices do not match.
    """
    inner = _check(row_BTR, conv, heads, sizes, state)
    if conv is not None and state is None and _is_narrow(row_BTR, conv, sizes):
        weights = (None if x is None else x[None] for x in (*conv, *heads))
        y_BTE, convolved_BTW, _ = ssd_operator(row_BTR, *weights, sizes.head_dim, sizes.d_state)
        return y_BTE, convolved_BTW[..., :inner], None
    return _composed(row_BTR, conv, heads, sizes, state)


def _composed(
    row_BTR: Tensor, conv: Conv | None, heads: Heads, sizes: Sizes, state: State | None
) -> tuple[Tensor, Tensor, State | None]:
    """The same of other operations."""
    groups, states, width = sizes
    n_heads, n_shared = heads.skip_H.shape[0], groups * states
    parts = (n_heads * width, n_shared, n_shared, n_heads)
    channels_BTW, tail = row_BTR[..., : sum(parts[:3])], None if state is None else state.tail_BQW
    if conv is None:
        channels_BTW = F.silu(channels_BTW)
    else:
        channels_BTW, tail = short_conv(channels_BTW, *conv, tail, silu=True)
    x_BTE, *shared = channels_BTW.split(parts[:3], dim=-1)
    x_BTHP, (b_BTGN, c_BTGN) = x_BTE.unflatten(-1, (n_heads, width)), (a.unflatten(-1, (groups, states)) for a in shared)
    raw_BTH = row_BTR[..., sum(parts[:3]) : sum(parts)]
    dt_BTH = F.softplus(raw_BTH.to(torch.promote_types(raw_BTH.dtype, torch.float32)) + heads.step_bias_H)
    y_BTHP, s_BHNP = linear_recurrence(
        c_BTGN,
        b_BTGN,
        (x_BTHP * dt_BTH[..., None]).to(x_BTHP.dtype),
        log_decay=-heads.log_rate_H.exp() * dt_BTH,
        state_BHKV=None if state is None else state.s_BHNP,
    )
    y_BTHP = (y_BTHP + heads.skip_H[:, None] * x_BTHP).to(x_BTHP.dtype)
    return y_BTHP.flatten(-2), x_BTE, None if s_BHNP is None or tail is None else State(s_BHNP, tail)


def _is_narrow(row: Tensor, conv: Conv, sizes: Sizes) -> bool:
    """Whether the kernels for narrow states run; where they do not fit, other operations have kernels, so nothing is refused.

    In fp32 they have not been timed on a GPU.
    """
    if row.is_cuda and row.dtype == torch.float32:
        return False
    fits = (
        sizes.d_state <= WIDEST and sizes.head_dim in HEAD_DIMS and row.shape[1] <= LONGEST and conv.taps_WK.shape[1] <= MOST_TAPS
    )
    return fits and pick("ssd", row, tensor_cores=True) == "triton"


def _check(row: Tensor, conv: Conv | None, heads: Heads, sizes: Sizes, state: State | None) -> int:
    """E, if everything fits."""
    check_axes("row", row, "B T R")
    check_axes("skip", heads.skip_H, "H")
    batch, _, numbers = row.shape
    n_heads, (groups, states, width) = heads.skip_H.shape[0], sizes
    channels = n_heads * width + 2 * groups * states
    if n_heads % groups or numbers < channels + n_heads:
        raise ValueError(
            f"row has {numbers} numbers; {n_heads} heads of {width} in {groups} groups of {states} states need"
            f" {channels + n_heads}, and groups that divide the heads"
        )
    named = {f"{name.rpartition('_')[0]}": (x, (n_heads,)) for name, x in heads._asdict().items()}
    taps = 1
    if conv is not None:
        check_axes("taps", conv.taps_WK, "W K")
        taps = conv.taps_WK.shape[1]
        named |= {"taps": (conv.taps_WK, (channels, taps)), "bias": (conv.bias_W, (channels,))}
    if state is not None:
        named |= {"s": (state.s_BHNP, (batch, n_heads, states, width)), "tail": (state.tail_BQW, (batch, taps - 1, channels))}
    check_arguments(row, named, first="row")
    return n_heads * width
