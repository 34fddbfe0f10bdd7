"""The short causal depthwise convolution in Triton, with its SiLU; a launch forward, one and a sum backward, one to decode.

A warp owns a run of tokens of one sequence and some channels, and walks along time: the last K inputs of a channel, and backward
the last K gradients too, are a thread's registers, so that everything is read once and every SiLU made once. Tokens are asked
for several at a time, which is what hides the memory's latency.

Bytes: forward reads x and writes y, backward reads x and dy and writes dx.

Shape legend: B batch, T time, D channels, K taps, P = K - 1 remembered inputs, M members (each B / M sequences); C channels of
a program.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._entry import entry
from kernels._members import even_rows
from kernels.between.parts_triton import MANY, add_parts

LOG2_E = tl.constexpr(1.4426950408889634)
RUN, LONG_RUN, AHEAD = 64, 256, 8
"""Tokens that a program walks along, backward where runs are many, and how many of them it asks for at once."""
MANY_RUNS = 3000
"""Programs of long runs from which on these fill a device."""
CHANNELS, WARPS = 64, 1
STEP_CHANNELS = 256
LENGTHS = ("n_tokens", "sequences_per_member")


@triton.jit
def _taps_of(weight_ptr, channel_C, width, TAPS: tl.constexpr):
    """Weights [D, K] of each tap, oldest first, in fp32."""
    weights = ()
    for tap in tl.static_range(TAPS):
        weight_C = tl.load(weight_ptr + channel_C * TAPS + tap, mask=channel_C < width, other=0.0).to(tl.float32)
        weights = weights + (weight_C,)
    return weights


@triton.jit
def _token(ptr, stride, token, channel_C, n_tokens, width):
    """The channels of one token; zero where there is none."""
    seen_C = (channel_C < width) & (token >= 0) & (token < n_tokens)
    return tl.load(ptr + tl.cast(token, tl.int64) * stride + channel_C, mask=seen_C, other=0.0).to(tl.float32)


@triton.jit
def _tokens(ptr, stride, first, channel_C, n_tokens, width, COUNT: tl.constexpr):
    """COUNT tokens from `first` on, as a tuple: they are asked for together, and waited for once."""
    found = ()
    for u in tl.static_range(COUNT):
        found = found + (_token(ptr, stride, first + u, channel_C, n_tokens, width),)
    return found


@triton.jit
def _last(rows, LENGTH: tl.constexpr, COUNT: tl.constexpr):
    """The last COUNT of LENGTH rows."""
    found = ()
    for u in tl.static_range(COUNT):
        found = found + (rows[LENGTH - COUNT + u],)
    return found


@triton.jit
def _convolve(rows, weights, bias_C, u: tl.constexpr, TAPS: tl.constexpr):
    """The sum bias + sum_j weight_j x_{t-K+1+j}, where rows[u] is x_{t-K+1}."""
    z_C = bias_C
    for tap in tl.static_range(TAPS):
        z_C += rows[u + tap] * weights[tap]
    return z_C


@triton.jit
def _bias_of(bias_ptr, channel_C, width, BIAS: tl.constexpr):
    bias_C = tl.zeros([channel_C.shape[0]], tl.float32)
    if BIAS:
        bias_C = tl.load(bias_ptr + channel_C, mask=channel_C < width, other=0.0).to(tl.float32)
    return bias_C


@triton.jit
def _place(n_tokens, width, RUN, CHANNELS: tl.constexpr):
    """Of a program: its run of tokens among all, sequence, first token, and channels."""
    n_blocks = tl.cdiv(width, CHANNELS)
    run, n_runs = tl.program_id(0) // n_blocks, tl.cdiv(n_tokens, RUN)
    channel_C = tl.program_id(0) % n_blocks * CHANNELS + tl.arange(0, CHANNELS)
    return run.to(tl.int64), (run // n_runs).to(tl.int64), run % n_runs * RUN, channel_C


@entry(do_not_specialize=LENGTHS)
def short_conv_forward(
    x_ptr, x_stride, weight_ptr, bias_ptr, y_ptr,
    n_tokens, width, sequences_per_member,
    TAPS: tl.constexpr, BIAS: tl.constexpr, SILU: tl.constexpr, RUN: tl.constexpr, AHEAD: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """RUN tokens of outputs, AHEAD at a time. Grid: (B * runs * blocks of channels,)."""
    _, sequence, first, channel_C = _place(n_tokens, width, RUN, CHANNELS)
    member = sequence // sequences_per_member
    x_ptr += sequence * n_tokens * x_stride
    y_ptr += sequence * n_tokens * width
    weights = _taps_of(weight_ptr + member * TAPS * width, channel_C, width, TAPS)
    bias_C = _bias_of(bias_ptr + member * width, channel_C, width, BIAS)
    before = _tokens(x_ptr, x_stride, first - (TAPS - 1), channel_C, n_tokens, width, TAPS - 1)
    for turn in range(RUN // AHEAD):
        start = first + turn * AHEAD
        rows = before + _tokens(x_ptr, x_stride, start, channel_C, n_tokens, width, AHEAD)
        for u in tl.static_range(AHEAD):
            y_C = _convolve(rows, weights, bias_C, u, TAPS)
            if SILU:
                y_C = y_C / (1 + tl.exp2(-y_C * LOG2_E))
            place_C = tl.cast(start + u, tl.int64) * width + channel_C
            tl.store(y_ptr + place_C, y_C.to(y_ptr.dtype.element_ty), mask=(channel_C < width) & (start + u < n_tokens))
        before = _last(rows, TAPS - 1 + AHEAD, TAPS - 1)


@triton.jit
def _before_silu(dy_C, rows, weights, bias_C, u: tl.constexpr, TAPS: tl.constexpr, SILU: tl.constexpr):
    """The gradient of what went into the SiLU, which is made again."""
    dz_C = dy_C
    if SILU:
        z_C = _convolve(rows, weights, bias_C, u, TAPS)
        gate_C = 1 / (1 + tl.exp2(-z_C * LOG2_E))
        dz_C = dy_C * (gate_C * (1 + z_C * (1 - gate_C)))
    return dz_C


@triton.jit
def _store_gradient(
    dx_ptr, dx_stride, gradients, weights, u: tl.constexpr, token, first, channel_C, n_tokens, width, TAPS: tl.constexpr
):
    """The gradient dx of a token from dz of it and the next ones, gradients[u] and on, if it is one of the run's."""
    dx_C = gradients[u] * weights[TAPS - 1]
    for ahead in tl.static_range(1, TAPS):
        dx_C += gradients[u + ahead] * weights[TAPS - 1 - ahead]
    mine_C = (channel_C < width) & (token >= first) & (token < n_tokens)
    tl.store(dx_ptr + tl.cast(token, tl.int64) * dx_stride + channel_C, dx_C.to(dx_ptr.dtype.element_ty), mask=mine_C)


@entry(do_not_specialize=(*LENGTHS, "run_length"))
def short_conv_backward(
    dy_ptr, x_ptr, x_stride, weight_ptr, bias_ptr, dx_ptr, dx_stride, parts_ptr,
    n_tokens, width, sequences_per_member, run_length,
    TAPS: tl.constexpr, BIAS: tl.constexpr, SILU: tl.constexpr, AHEAD: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """`run_length` tokens of dx, and their shares in the gradients of the taps and, last, of the bias. Grid: as forward.

    The K - 1 tokens behind the run give the rest of its last tokens' gradients.
    """
    run, sequence, first, channel_C = _place(n_tokens, width, run_length, CHANNELS)
    member = sequence // sequences_per_member
    x_ptr += sequence * n_tokens * x_stride
    dy_ptr += sequence * n_tokens * width
    dx_ptr += sequence * n_tokens * dx_stride
    weights = _taps_of(weight_ptr + member * TAPS * width, channel_C, width, TAPS)
    bias_C = _bias_of(bias_ptr + member * width, channel_C, width, BIAS)
    before = _tokens(x_ptr, x_stride, first - (TAPS - 1), channel_C, n_tokens, width, TAPS - 1)
    none_C = tl.zeros([CHANNELS], tl.float32)
    shares, behind = (none_C,), ()
    for _ in tl.static_range(TAPS):
        shares = shares + (none_C,)
    for _ in tl.static_range(TAPS - 1):
        behind = behind + (none_C,)
    turns = tl.cdiv(tl.minimum(run_length, n_tokens - first), AHEAD)
    for turn in range(turns):
        start = first + turn * AHEAD
        rows = before + _tokens(x_ptr, x_stride, start, channel_C, n_tokens, width, AHEAD)
        own = _tokens(dy_ptr, width, start, channel_C, n_tokens, width, AHEAD)
        gradients = behind
        for u in tl.static_range(AHEAD):
            dz_C = _before_silu(own[u], rows, weights, bias_C, u, TAPS, SILU)
            gradients = gradients + (dz_C,)
            more = ()
            for tap in tl.static_range(TAPS):
                more = more + (shares[tap] + dz_C * rows[u + tap],)
            shares = more + (shares[TAPS] + dz_C,)
            _store_gradient(
                dx_ptr, dx_stride, gradients, weights, u, start + u - (TAPS - 1), first, channel_C, n_tokens, width, TAPS
            )
        before = _last(rows, TAPS - 1 + AHEAD, TAPS - 1)
        behind = _last(gradients, TAPS - 1 + AHEAD, TAPS - 1)
    end = first + turns * AHEAD
    rows = before + _tokens(x_ptr, x_stride, end, channel_C, n_tokens, width, TAPS - 1)
    own = _tokens(dy_ptr, width, end, channel_C, n_tokens, width, TAPS - 1)
    for u in tl.static_range(TAPS - 1):
        behind = behind + (_before_silu(own[u], rows, weights, bias_C, u, TAPS, SILU),)
        _store_gradient(dx_ptr, dx_stride, behind, weights, u, end + u - (TAPS - 1), first, channel_C, n_tokens, width, TAPS)
    for tap in tl.static_range(TAPS + 1):
        tl.store(parts_ptr + (run * (TAPS + 1) + tap) * width + channel_C, shares[tap], mask=channel_C < width)


@entry(do_not_specialize=["sequences_per_member"])
def short_conv_update(
    x_ptr, tail_ptr, weight_ptr, bias_ptr, y_ptr, new_tail_ptr,
    width, sequences_per_member,
    TAPS: tl.constexpr, BIAS: tl.constexpr, SILU: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """One token of one sequence: the output, and the tail moved on by one."""
    n_blocks = tl.cdiv(width, CHANNELS)
    sequence = (tl.program_id(0) // n_blocks).to(tl.int64)
    channel_C = tl.program_id(0) % n_blocks * CHANNELS + tl.arange(0, CHANNELS)
    inside_C = channel_C < width
    member = sequence // sequences_per_member
    weights = _taps_of(weight_ptr + member * TAPS * width, channel_C, width, TAPS)
    tail_ptr += sequence * (TAPS - 1) * width + channel_C
    new_tail_ptr += sequence * (TAPS - 1) * width + channel_C
    x_C = tl.load(x_ptr + sequence * width + channel_C, mask=inside_C, other=0.0).to(tl.float32)
    y_C = x_C * weights[TAPS - 1]
    for tap in tl.static_range(TAPS - 1):
        old_C = tl.load(tail_ptr + tap * width, mask=inside_C, other=0.0)
        y_C += old_C.to(tl.float32) * weights[tap]
        if tap > 0:
            tl.store(new_tail_ptr + (tap - 1) * width, old_C, mask=inside_C)
    if TAPS > 1:
        tl.store(new_tail_ptr + (TAPS - 2) * width, x_C.to(new_tail_ptr.dtype.element_ty), mask=inside_C)
    if BIAS:
        y_C += tl.load(bias_ptr + member * width + channel_C, mask=inside_C, other=0.0).to(tl.float32)
    if SILU:
        y_C = y_C / (1 + tl.exp2(-y_C * LOG2_E))
    tl.store(y_ptr + sequence * width + channel_C, y_C.to(y_ptr.dtype.element_ty), mask=inside_C)


def forward(x_BTD: Tensor, weight_MDK: Tensor, bias_MD: Tensor | None, silu: bool) -> Tensor:
    """Outputs [B, T, D] in the dtype of x."""
    batch, length, width = x_BTD.shape
    y_BTD = x_BTD.new_empty(batch, length, width)
    x_BTD, weight_MDK = even_rows(x_BTD), weight_MDK.contiguous()
    n_programs = batch * -(-length // RUN) * -(-width // CHANNELS)
    if n_programs:
        short_conv_forward[(n_programs,)](
            x_BTD, x_BTD.stride(1), weight_MDK, weight_MDK if bias_MD is None else bias_MD.contiguous(), y_BTD,
            length, width, batch // weight_MDK.shape[0],
            TAPS=weight_MDK.shape[-1], BIAS=bias_MD is not None, SILU=silu, RUN=RUN, AHEAD=AHEAD, CHANNELS=CHANNELS,
            num_warps=WARPS,
        )  # fmt: skip
    return y_BTD


def backward(
    dy_BTD: Tensor, x_BTD: Tensor, weight_MDK: Tensor, bias_MD: Tensor | None, silu: bool, *, out: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, of the taps, and of the bias, empty where there is none; that of x is written to even rows if given."""
    batch, length, width = x_BTD.shape
    members, _, taps = weight_MDK.shape
    dx_BTD = x_BTD.new_empty(batch, length, width) if out is None else out
    x_BTD, weight_MDK = even_rows(x_BTD), weight_MDK.contiguous()
    run = LONG_RUN if batch * -(-length // LONG_RUN) * -(-width // CHANNELS) >= MANY_RUNS else RUN
    n_runs = batch * -(-length // run)
    parts = x_BTD.new_empty(n_runs, taps + 1, width, dtype=torch.float32)
    dweight_MDK = torch.zeros_like(weight_MDK) if not parts.numel() else torch.empty_like(weight_MDK)
    dbias_MD = weight_MDK.new_empty(0) if bias_MD is None else bias_MD.new_zeros(bias_MD.shape)
    if parts.numel():
        short_conv_backward[(n_runs * -(-width // CHANNELS),)](
            dy_BTD.contiguous(), x_BTD, x_BTD.stride(1), weight_MDK, weight_MDK if bias_MD is None else bias_MD.contiguous(),
            dx_BTD, dx_BTD.stride(1), parts, length, width, batch // members, run,
            TAPS=taps, BIAS=bias_MD is not None, SILU=silu, AHEAD=AHEAD, CHANNELS=CHANNELS,
            num_warps=WARPS,
        )  # fmt: skip
        strides, own = ((taps + 1) * width, n_runs // members * (taps + 1) * width), n_runs // members
        add_parts((parts,), (dweight_MDK,), strides, own, at_once=MANY)
        if bias_MD is not None:
            add_parts((parts[:, taps:],), (dbias_MD[..., None],), strides, own, at_once=MANY)
    return dx_BTD, dweight_MDK, dbias_MD


def step(x_BD: Tensor, tail_BPD: Tensor, weight_MDK: Tensor, bias_MD: Tensor | None, silu: bool) -> tuple[Tensor, Tensor]:
    """The output [B, D] in the dtype of x, and the new tail [B, P, D] in that of the old one."""
    batch, width = x_BD.shape
    y_BD, new_tail_BPD = x_BD.new_empty(batch, width), tail_BPD.new_empty(tail_BPD.shape)
    weight_MDK = weight_MDK.contiguous()
    n_programs = batch * -(-width // STEP_CHANNELS)
    if n_programs:
        short_conv_update[(n_programs,)](
            x_BD.contiguous(),
            tail_BPD.contiguous(),
            weight_MDK,
            weight_MDK if bias_MD is None else bias_MD.contiguous(),
            y_BD,
            new_tail_BPD,
            width,
            batch // weight_MDK.shape[0],
            TAPS=weight_MDK.shape[-1],
            BIAS=bias_MD is not None,
            SILU=silu,
            CHANNELS=STEP_CHANNELS,
        )
    return y_BD, new_tail_BPD
