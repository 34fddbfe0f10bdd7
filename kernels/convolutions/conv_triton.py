"""The short causal depthwise convolution in Triton, with its SiLU: a launch forward, one to decode; backward has its own file.

A warp owns a run of tokens of one sequence and some channels, and walks along time: the last K inputs of a channel are a thread's
registers, so that everything is read once and every SiLU made once. Tokens are asked for several at a time, which is what hides
the memory's latency. Runs and channels are counted together, so that any width fills warps. Distances between tokens are
constants of the kernel: addresses of a turn are then one register and numbers in instructions, and pairs of channels are seen to
lie on whole words.

Bytes: forward reads x and writes y.

Shape legend: B batch, T time, D channels, K taps, P = K - 1 remembered inputs, M members (each B / M sequences); C channels of
a program.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kernels._entry import entry
from kernels._members import even_rows

FAST = not triton.knobs.runtime.interpret
LOG2_E = tl.constexpr(1.4426950408889634)
RUN, AHEAD = 64, 8
"""Tokens that a program walks along, and how many of them it asks for at once."""
CHANNELS, WARPS = 64, 1
STEP_CHANNELS = 256
LENGTHS = ("n_tokens", "n_places", "sequences_per_member")


@triton.jit
def taps_of(weight_ptr, own_C, inside_C, TAPS: tl.constexpr):
    """Weights [D, K] of each tap, oldest first, in fp32."""
    weights = ()
    for tap in tl.static_range(TAPS):
        weights = weights + (tl.load(weight_ptr + own_C * TAPS + tap, mask=inside_C, other=0.0).to(tl.float32),)
    return weights


@triton.jit
def bias_of(bias_ptr, own_C, inside_C, BIAS: tl.constexpr):
    """The bias in fp32, zero where there is none."""
    bias_C = tl.zeros([own_C.shape[0]], tl.float32)
    if BIAS:
        bias_C = tl.load(bias_ptr + own_C, mask=inside_C, other=0.0).to(tl.float32)
    return bias_C


@triton.jit
def tokens(at_C, inside_C, token_C, n_tokens, STRIDE: tl.constexpr, COUNT: tl.constexpr, WHOLE: tl.constexpr):
    """COUNT tokens from `token` on, as a tuple, zero where there is none; WHOLE if all are there."""
    found = ()
    for u in tl.static_range(COUNT):
        if WHOLE:
            row_C = tl.load(at_C + u * STRIDE)
        else:
            seen_C = inside_C & (token_C + u >= 0) & (token_C + u < n_tokens)
            row_C = tl.load(at_C + u * STRIDE, mask=seen_C, other=0.0)
        found = found + (row_C,)
    return found


@triton.jit
def numbers(rows, COUNT: tl.constexpr):
    """Rows in fp32."""
    found = ()
    for u in tl.static_range(COUNT):
        found = found + (rows[u].to(tl.float32),)
    return found


@triton.jit
def last(rows, LENGTH: tl.constexpr, COUNT: tl.constexpr):
    """The last COUNT of LENGTH rows."""
    found = ()
    for u in tl.static_range(COUNT):
        found = found + (rows[LENGTH - COUNT + u],)
    return found


@triton.jit
def convolve(rows, weights, bias_C, u: tl.constexpr, TAPS: tl.constexpr):
    """The sum bias + sum_j weight_j x_{t-K+1+j}, where rows[u] is x_{t-K+1}."""
    z_C = bias_C
    for tap in tl.static_range(TAPS):
        z_C += rows[u + tap] * weights[tap]
    return z_C


@triton.jit
def sigmoid(z_C, FAST: tl.constexpr):
    """1 / (1 + exp(-z)) of two instructions of the special unit; Triton's own care for results near zero adds four a number."""
    if FAST:
        power_C = tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [-z_C * LOG2_E], dtype=tl.float32, is_pure=True, pack=1
        )
        gate_C = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [1 + power_C], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        gate_C = 1 / (1 + tl.exp2(-z_C * LOG2_E))
    return gate_C


@triton.jit
def lanes_of(n_places, WIDTH: tl.constexpr, CHANNELS: tl.constexpr):
    """Of a program's lanes: their runs, channels, and whether they have one. Lanes count through a run's channels, then runs."""
    place_C = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    return place_C // WIDTH, place_C % WIDTH, place_C < n_places


@entry(do_not_specialize=LENGTHS)
def short_conv_forward(
    x_ptr, weight_ptr, bias_ptr, y_ptr,
    n_tokens, n_places, sequences_per_member,
    X_STRIDE: tl.constexpr, WIDTH: tl.constexpr, TAPS: tl.constexpr, BIAS: tl.constexpr, SILU: tl.constexpr,
    WHOLE: tl.constexpr, FAST: tl.constexpr, RUN: tl.constexpr, AHEAD: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """RUN tokens of outputs, AHEAD at a time. Grid: (blocks of channels of all runs,); WHOLE says that runs and blocks are full."""
    run_C, channel_C, inside_C = lanes_of(n_places, WIDTH, CHANNELS)
    n_runs = tl.cdiv(n_tokens, RUN)
    sequence_C, token_C = run_C // n_runs, run_C % n_runs * RUN
    own_C = sequence_C // sequences_per_member * WIDTH + channel_C
    weights, bias_C = taps_of(weight_ptr, own_C, inside_C, TAPS), bias_of(bias_ptr, own_C, inside_C, BIAS)
    row_C = sequence_C.to(tl.int64) * n_tokens + token_C
    x_C, y_C = x_ptr + row_C * X_STRIDE + channel_C, y_ptr + row_C * WIDTH + channel_C
    before = tokens(x_C - (TAPS - 1) * X_STRIDE, inside_C, token_C - (TAPS - 1), n_tokens, X_STRIDE, TAPS - 1, False)
    before = numbers(before, TAPS - 1)
    for _ in range(RUN // AHEAD):
        rows = before + numbers(tokens(x_C, inside_C, token_C, n_tokens, X_STRIDE, AHEAD, WHOLE), AHEAD)
        for u in tl.static_range(AHEAD):
            z_C = convolve(rows, weights, bias_C, u, TAPS)
            if SILU:
                z_C = z_C * sigmoid(z_C, FAST)
            if WHOLE:
                tl.store(y_C + u * WIDTH, z_C.to(y_ptr.dtype.element_ty))
            else:
                tl.store(y_C + u * WIDTH, z_C.to(y_ptr.dtype.element_ty), mask=inside_C & (token_C + u < n_tokens))
        before = last(rows, TAPS - 1 + AHEAD, TAPS - 1)
        x_C, y_C, token_C = x_C + AHEAD * X_STRIDE, y_C + AHEAD * WIDTH, token_C + AHEAD


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
    weights = taps_of(weight_ptr, member * width + channel_C, inside_C, TAPS)
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
    places = batch * -(-length // RUN) * width
    if places:
        short_conv_forward[(-(-places // CHANNELS),)](
            x_BTD, weight_MDK, weight_MDK if bias_MD is None else bias_MD.contiguous(), y_BTD,
            length, places, batch // weight_MDK.shape[0],
            X_STRIDE=x_BTD.stride(1), WIDTH=width, TAPS=weight_MDK.shape[-1], BIAS=bias_MD is not None, SILU=silu,
            WHOLE=is_whole(length, RUN, places), FAST=FAST, RUN=RUN, AHEAD=AHEAD, CHANNELS=CHANNELS,
            num_warps=WARPS,
        )  # fmt: skip
    return y_BTD


def is_whole(length: int, run: int, places: int) -> bool:
    """Whether no lane and no token of any program is spare."""
    return length % run == 0 and places % CHANNELS == 0


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
