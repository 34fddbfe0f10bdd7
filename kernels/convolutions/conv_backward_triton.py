"""The backward pass of the short causal depthwise convolution in Triton: one launch, and one that sums shares of weights.

A warp walks along runs of tokens as forward does. The last K - 1 gradients of what went into the SiLU are registers too, and so are
its shares in the gradients of taps and bias, which grow over all of its runs. A turn's inputs are asked for one turn ahead.

Bytes: x and dy are read, dx is written.

Shape legend: as `kernels.convolutions.conv_triton`; S programs that share a channel of a member, R columns of shares, (K + 1) D.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._entry import entry
from kernels._members import even_rows
from kernels.convolutions.conv_triton import (
    AHEAD,
    CHANNELS,
    FAST,
    RUN,
    WARPS,
    bias_of,
    convolve,
    is_whole,
    lanes_of,
    last,
    numbers,
    sigmoid,
    taps_of,
    tokens,
)

LONG_RUN, MOST_WALKS = 256, 4
"""Tokens of a run where runs are many, and how many of them a program walks one after the other."""
ENOUGH = 2000
"""Programs that fill a device, up to which runs are made longer and programs given more of them."""
REGISTERS = 96
"""Of a thread in 16 bit where nothing is masked: 21 warps a multiprocessor, so that ENOUGH programs run at once; no loop spills."""
COLUMNS, AT_ONCE = 32, 128
"""Sums that a program makes, and shares that it reads at once."""
LENGTHS = ("n_tokens", "n_places", "walks_per_member", "run_length", "walks")


@triton.jit
def _before_silu(dy_C, rows, weights, bias_C, u: tl.constexpr, TAPS: tl.constexpr, SILU: tl.constexpr, FAST: tl.constexpr):
    """The gradient of what went into the SiLU, which is made again."""
    dz_C = dy_C
    if SILU:
        z_C = convolve(rows, weights, bias_C, u, TAPS)
        gate_C = sigmoid(z_C, FAST)
        dz_C = (dy_C * gate_C) * (1 + z_C * (1 - gate_C))
    return dz_C


@triton.jit
def _gradient(gradients, weights, u: tl.constexpr, TAPS: tl.constexpr):
    """The gradient dx of a token from dz of it and the next ones, gradients[u] and on."""
    dx_C = gradients[u] * weights[TAPS - 1]
    for ahead in tl.static_range(1, TAPS):
        dx_C += gradients[u + ahead] * weights[TAPS - 1 - ahead]
    return dx_C


@triton.jit
def _asked(
    dy_C, more_C, inside_C, token_C, n_tokens, WIDTH: tl.constexpr, COUNT: tl.constexpr, BESIDE: tl.constexpr, WHOLE: tl.constexpr
):
    """COUNT tokens of dy, and then those of its second term."""
    found = tokens(dy_C, inside_C, token_C, n_tokens, WIDTH, COUNT, WHOLE)
    if BESIDE:
        found = found + tokens(more_C, inside_C, token_C, n_tokens, WIDTH, COUNT, WHOLE)
    return found


@triton.jit
def _added(terms, COUNT: tl.constexpr, BESIDE: tl.constexpr):
    """Both terms in one, in fp32."""
    found = ()
    for u in tl.static_range(COUNT):
        dy_C = terms[u].to(tl.float32)
        if BESIDE:
            dy_C += terms[COUNT + u].to(tl.float32)
        found = found + (dy_C,)
    return found


@triton.jit
def _shared(shares, dz_C, rows, u: tl.constexpr, TAPS: tl.constexpr):
    """A token's shares in the gradients of taps and bias joined to those of others."""
    grown = ()
    for tap in tl.static_range(TAPS):
        grown = grown + (shares[tap] + dz_C * rows[u + tap],)
    return grown + (shares[TAPS] + dz_C,)


@triton.jit
def _nothing(CHANNELS: tl.constexpr, COUNT: tl.constexpr):
    """COUNT rows of zeros."""
    found = ()
    for _ in tl.static_range(COUNT):
        found = found + (tl.zeros([CHANNELS], tl.float32),)
    return found


@entry(do_not_specialize=LENGTHS)
def short_conv_backward(
    dy_ptr, beside_ptr, x_ptr, weight_ptr, bias_ptr, dx_ptr, parts_ptr,
    n_tokens, n_places, walks_per_member, run_length, walks,
    X_STRIDE: tl.constexpr, DX_STRIDE: tl.constexpr, WIDTH: tl.constexpr, TAPS: tl.constexpr, BIAS: tl.constexpr,
    BESIDE: tl.constexpr, SILU: tl.constexpr, WHOLE: tl.constexpr, FAST: tl.constexpr, AHEAD: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """The gradient dx of `walks` runs of `run_length` tokens, and their shares in the gradients of the taps and, last, of the bias.

    The K - 1 tokens behind a run give the rest of its last tokens' gradients. BESIDE says that dy is the sum of two tensors. Grid:
    (blocks of channels of all walks,).
    """
    walk_C, channel_C, inside_C = lanes_of(n_places, WIDTH, CHANNELS)
    own_C = walk_C // walks_per_member * WIDTH + channel_C
    weights, bias_C = taps_of(weight_ptr, own_C, inside_C, TAPS), bias_of(bias_ptr, own_C, inside_C, BIAS)
    shares, n_runs = _nothing(CHANNELS, TAPS + 1), tl.cdiv(n_tokens, run_length)
    turns = tl.cdiv(tl.minimum(run_length, n_tokens), AHEAD)
    for walk in range(walks):
        run_C = walk_C * walks + walk
        first_C = run_C % n_runs * run_length
        row_C = (run_C // n_runs).to(tl.int64) * n_tokens + first_C
        x_C, place_C = x_ptr + row_C * X_STRIDE + channel_C, row_C * WIDTH + channel_C
        dy_C, more_C = dy_ptr + place_C, beside_ptr + place_C
        dx_C, token_C = dx_ptr + (row_C - (TAPS - 1)) * DX_STRIDE + channel_C, first_C
        before = tokens(x_C - (TAPS - 1) * X_STRIDE, inside_C, first_C - (TAPS - 1), n_tokens, X_STRIDE, TAPS - 1, False)
        before, behind = numbers(before, TAPS - 1), _nothing(CHANNELS, TAPS - 1)
        next_x = tokens(x_C, inside_C, token_C, n_tokens, X_STRIDE, AHEAD, WHOLE)
        next_dy = _asked(dy_C, more_C, inside_C, token_C, n_tokens, WIDTH, AHEAD, BESIDE, WHOLE)
        for turn in range(turns):
            rows, own, gradients = before + numbers(next_x, AHEAD), _added(next_dy, AHEAD, BESIDE), behind
            further = tl.where(turn + 1 < turns, AHEAD, 0)  # the last turn asks for its own tokens again
            x_C, dy_C, more_C = x_C + further * X_STRIDE, dy_C + further * WIDTH, more_C + further * WIDTH
            next_x = tokens(x_C, inside_C, token_C + further, n_tokens, X_STRIDE, AHEAD, WHOLE)
            next_dy = _asked(dy_C, more_C, inside_C, token_C + further, n_tokens, WIDTH, AHEAD, BESIDE, WHOLE)
            for u in tl.static_range(AHEAD):
                gradients = gradients + (_before_silu(own[u], rows, weights, bias_C, u, TAPS, SILU, FAST),)
                shares = _shared(shares, gradients[TAPS - 1 + u], rows, u, TAPS)
                at_C = token_C + (u - (TAPS - 1))
                mine_C = inside_C & (at_C >= first_C) & (at_C < n_tokens)
                if WHOLE:
                    mine_C = turn > 0 if u < TAPS - 1 else None
                tl.store(dx_C + u * DX_STRIDE, _gradient(gradients, weights, u, TAPS).to(dx_ptr.dtype.element_ty), mask=mine_C)
            before, behind = last(rows, TAPS - 1 + AHEAD, TAPS - 1), last(gradients, TAPS - 1 + AHEAD, TAPS - 1)
            token_C, dx_C = token_C + AHEAD, dx_C + AHEAD * DX_STRIDE
        row_C += turns * AHEAD
        x_C, place_C = x_ptr + row_C * X_STRIDE + channel_C, row_C * WIDTH + channel_C
        dy_C, more_C = dy_ptr + place_C, beside_ptr + place_C
        rows = before + numbers(tokens(x_C, inside_C, token_C, n_tokens, X_STRIDE, TAPS - 1, False), TAPS - 1)
        own = _added(_asked(dy_C, more_C, inside_C, token_C, n_tokens, WIDTH, TAPS - 1, BESIDE, False), TAPS - 1, BESIDE)
        for u in tl.static_range(TAPS - 1):
            behind = behind + (_before_silu(own[u], rows, weights, bias_C, u, TAPS, SILU, FAST),)
            at_C = token_C + (u - (TAPS - 1))
            mine_C = inside_C & (at_C >= first_C) & (at_C < n_tokens)
            tl.store(dx_C + u * DX_STRIDE, _gradient(behind, weights, u, TAPS).to(dx_ptr.dtype.element_ty), mask=mine_C)
    parts_C = parts_ptr + walk_C.to(tl.int64) * (TAPS + 1) * WIDTH + channel_C
    for tap in tl.static_range(TAPS + 1):
        tl.store(parts_C + tap * WIDTH, shares[tap], mask=inside_C)


@entry(do_not_specialize=("n_parts", "width"))
def sum_shares(
    parts_ptr, dweight_ptr, dbias_ptr, n_parts, width,
    TAPS: tl.constexpr, BIAS: tl.constexpr, COLUMNS: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Gradients of taps [D, K] and bias [D] of a member, of shares [S, K + 1, D]. Grid: (M * blocks of columns,)."""
    n_columns = (TAPS + 1) * width
    n_blocks = tl.cdiv(n_columns, COLUMNS)
    member = (tl.program_id(0) // n_blocks).to(tl.int64)
    column_R = tl.program_id(0) % n_blocks * COLUMNS + tl.arange(0, COLUMNS)
    inside_R, part_S = column_R < n_columns, tl.arange(0, AT_ONCE)
    parts_ptr += member * n_parts * n_columns
    sum_R = tl.zeros([COLUMNS], tl.float32)
    for first in range(0, n_parts, AT_ONCE):
        place_SR = (first + part_S)[:, None].to(tl.int64) * n_columns + column_R[None, :]
        sum_R += tl.sum(tl.load(parts_ptr + place_SR, mask=(first + part_S < n_parts)[:, None] & inside_R[None, :], other=0.0), 0)
    tap_R, channel_R = column_R // width, member * width + column_R % width
    tl.store(dweight_ptr + channel_R * TAPS + tap_R, sum_R.to(dweight_ptr.dtype.element_ty), mask=tap_R < TAPS)
    if BIAS:
        tl.store(dbias_ptr + channel_R, sum_R.to(dbias_ptr.dtype.element_ty), mask=tap_R == TAPS)


def backward(
    dy_BTD: Tensor,
    x_BTD: Tensor,
    weight_MDK: Tensor,
    bias_MD: Tensor | None,
    silu: bool,
    *,
    beside: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, of the taps, and of the bias, empty where there is none.

    Args:
        dy_BTD: gradient of the outputs.
        x_BTD: inputs.
        weight_MDK: taps.
        bias_MD: added to the convolution, or None.
        silu: whether a SiLU follows.
        beside: a second term of the outputs' gradient, in the dtype of the first.
        out: even rows that the gradient of x is written to.
    """
    batch, length, width = x_BTD.shape
    members, _, taps = weight_MDK.shape
    dx_BTD = x_BTD.new_empty(batch, length, width) if out is None else out
    dy_BTD, x_BTD, weight_MDK = dy_BTD.contiguous(), even_rows(x_BTD), weight_MDK.contiguous()
    dbias_MD = weight_MDK.new_empty(0) if bias_MD is None else torch.empty_like(bias_MD, memory_format=torch.contiguous_format)
    if not x_BTD.numel():
        return dx_BTD, torch.zeros_like(weight_MDK), dbias_MD.zero_()
    run, walks = _runs(batch // members, members, length, width)
    n_parts = batch // members * -(-length // run) // walks
    places = members * n_parts * width
    parts = x_BTD.new_empty(members * n_parts, taps + 1, width, dtype=torch.float32)
    dweight_MDK, whole = torch.empty_like(weight_MDK), is_whole(length, run, places)
    registers = REGISTERS if whole and x_BTD.dtype.itemsize == 2 else None
    short_conv_backward[(-(-places // CHANNELS),)](
        dy_BTD, dy_BTD if beside is None else beside.contiguous(), x_BTD,
        weight_MDK, weight_MDK if bias_MD is None else bias_MD.contiguous(), dx_BTD, parts,
        length, places, n_parts, run, walks,
        X_STRIDE=x_BTD.stride(1), DX_STRIDE=dx_BTD.stride(1), WIDTH=width, TAPS=taps, BIAS=bias_MD is not None,
        BESIDE=beside is not None, SILU=silu,
        WHOLE=whole, FAST=FAST, AHEAD=AHEAD, CHANNELS=CHANNELS, num_warps=WARPS, maxnreg=registers,
    )  # fmt: skip
    sum_shares[(members * -(-(taps + 1) * width // COLUMNS),)](
        parts, dweight_MDK, dweight_MDK if bias_MD is None else dbias_MD, n_parts, width,
        TAPS=taps, BIAS=bias_MD is not None, COLUMNS=COLUMNS, AT_ONCE=AT_ONCE, num_warps=4,
    )  # fmt: skip
    return dx_BTD, dweight_MDK, dbias_MD


def _runs(batch: int, members: int, length: int, width: int) -> tuple[int, int]:
    """Tokens of a run, and runs of a walk, which stays within its member."""

    def programs(run: int) -> int:
        return members * batch * -(-length // run) * width // CHANNELS

    long = min(LONG_RUN, -(-length // AHEAD) * AHEAD)
    run = long if programs(long) >= ENOUGH else min(RUN, long)
    walks, of_member = 1, batch * -(-length // run)
    while walks < MOST_WALKS and of_member % (2 * walks) == 0 and programs(run) >= 2 * walks * ENOUGH:
        walks *= 2
    return run, walks
