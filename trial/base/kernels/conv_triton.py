"""The short causal depthwise convolution in Triton, with its SiLU; a launch forward, one and a sum backward, one to decode.

A program owns a tile of tokens and channels of one sequence and reads it once for every tap, of which all but the first
reading come from the cache. Backward recomputes what went into the SiLU at each of the K later tokens that an input
reaches, K^2 products in all, rather than write it to memory.

Bytes: forward reads x and writes y, backward reads x and dy and writes dx.

Shape legend: B batch, T time, D channels, K taps, P = K - 1 remembered inputs, M members (each B / M sequences); L tokens
and C channels of a tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._entry import entry
from kernels._members import even_rows
from kernels.parts_triton import MANY, add_parts

LOG2_E = tl.constexpr(1.4426950408889634)
FORWARD, BACKWARD = (16, 4), (8, 8)
"""Tokens of a tile, and tiles that a program goes through."""
CHANNELS = 64
STEP_CHANNELS = 256
LENGTHS = ("n_tokens", "sequences_per_member")


@triton.jit
def _taps_of(weight_ptr, channel_C, width, TAPS: tl.constexpr):
    """Weights [D, K] of each tap, oldest first, in fp32."""
    weights = ()
    for tap in tl.static_range(TAPS):
        weight_C = tl.load(weight_ptr + channel_C * TAPS + tap, mask=channel_C < width, other=0.0).to(tl.float32)
        weights = weights + (weight_C,)  # noqa: RUF005 - Triton knows sums of tuples, but no unpacking into them
    return weights


@triton.jit
def _inputs(x_ptr, x_stride, token_L, channel_C, n_tokens, width, before: tl.constexpr):
    """X so many tokens earlier."""
    source_L1 = token_L[:, None] - before
    seen_LC = (source_L1 >= 0) & (source_L1 < n_tokens) & (channel_C < width)[None, :]
    return tl.load(x_ptr + source_L1.to(tl.int64) * x_stride + channel_C[None, :], mask=seen_LC, other=0.0).to(tl.float32)


@triton.jit
def _convolve(x_ptr, x_stride, weights, bias_C, token_L, channel_C, n_tokens, width, TAPS: tl.constexpr):
    """The tile bias + sum_j weight_j x_{t-K+1+j}."""
    z_LC = tl.zeros([token_L.shape[0], channel_C.shape[0]], tl.float32) + bias_C[None, :]
    for tap in tl.static_range(TAPS):
        z_LC += _inputs(x_ptr, x_stride, token_L, channel_C, n_tokens, width, TAPS - 1 - tap) * weights[tap][None, :]
    return z_LC


@triton.jit
def _bias_of(bias_ptr, channel_C, width, BIAS: tl.constexpr):
    bias_C = tl.zeros([channel_C.shape[0]], tl.float32)
    if BIAS:
        bias_C = tl.load(bias_ptr + channel_C, mask=channel_C < width, other=0.0).to(tl.float32)
    return bias_C


@triton.jit
def _place(n_tokens, width, TILE: tl.constexpr, RUN: tl.constexpr, CHANNELS: tl.constexpr):
    """Of a program: its run of tiles among all, sequence, first tokens, and channels."""
    n_blocks = tl.cdiv(width, CHANNELS)
    run, n_runs = tl.program_id(0) // n_blocks, tl.cdiv(n_tokens, TILE * RUN)
    first_L = run % n_runs * (TILE * RUN) + tl.arange(0, TILE)
    channel_C = tl.program_id(0) % n_blocks * CHANNELS + tl.arange(0, CHANNELS)
    return run.to(tl.int64), (run // n_runs).to(tl.int64), first_L, channel_C


@entry(do_not_specialize=LENGTHS)
def short_conv_forward(
    x_ptr, x_stride, weight_ptr, bias_ptr, y_ptr,
    n_tokens, width, sequences_per_member,
    TAPS: tl.constexpr, BIAS: tl.constexpr, SILU: tl.constexpr, TILE: tl.constexpr, RUN: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """RUN tiles of outputs. Grid: (B * runs * blocks of channels,)."""
    _, sequence, first_L, channel_C = _place(n_tokens, width, TILE, RUN, CHANNELS)
    member = sequence // sequences_per_member
    x_ptr += sequence * n_tokens * x_stride
    weights = _taps_of(weight_ptr + member * TAPS * width, channel_C, width, TAPS)
    bias_C = _bias_of(bias_ptr + member * width, channel_C, width, BIAS)
    for turn in range(RUN):
        token_L = first_L + turn * TILE
        y_LC = _convolve(x_ptr, x_stride, weights, bias_C, token_L, channel_C, n_tokens, width, TAPS)
        if SILU:
            y_LC = y_LC / (1 + tl.exp2(-y_LC * LOG2_E))
        place_LC = (sequence * n_tokens + token_L[:, None]) * width + channel_C[None, :]
        inside_LC = (token_L < n_tokens)[:, None] & (channel_C < width)[None, :]
        tl.store(y_ptr + place_LC, y_LC.to(y_ptr.dtype.element_ty), mask=inside_LC)


@triton.jit
def _before_silu(dz_LC, x_ptr, x_stride, weights, bias_C, token_L, channel_C, n_tokens, width, TAPS: tl.constexpr):
    """The gradient of what went into the SiLU, which is made again."""
    z_LC = _convolve(x_ptr, x_stride, weights, bias_C, token_L, channel_C, n_tokens, width, TAPS)
    gate_LC = 1 / (1 + tl.exp2(-z_LC * LOG2_E))
    return dz_LC * (gate_LC * (1 + z_LC * (1 - gate_LC)))


@entry(do_not_specialize=LENGTHS)
def short_conv_backward(
    dy_ptr, x_ptr, x_stride, weight_ptr, bias_ptr, dx_ptr, parts_ptr,
    n_tokens, width, sequences_per_member,
    TAPS: tl.constexpr, BIAS: tl.constexpr, SILU: tl.constexpr, TILE: tl.constexpr, RUN: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """RUN tiles of dx, and their shares in the gradients of the taps and, last, of the bias. Grid: as forward."""
    run, sequence, first_L, channel_C = _place(n_tokens, width, TILE, RUN, CHANNELS)
    inside_C = channel_C < width
    member = sequence // sequences_per_member
    x_ptr += sequence * n_tokens * x_stride
    weights = _taps_of(weight_ptr + member * TAPS * width, channel_C, width, TAPS)
    bias_C = _bias_of(bias_ptr + member * width, channel_C, width, BIAS)
    shares = ()
    for _ in tl.static_range(TAPS + 1):
        shares = shares + (tl.zeros([TILE, CHANNELS], tl.float32),)  # noqa: RUF005
    for turn in range(RUN):
        token_L = first_L + turn * TILE
        place_LC = (sequence * n_tokens + token_L[:, None]) * width + channel_C[None, :]
        dx_LC = tl.zeros([TILE, CHANNELS], tl.float32)
        for ahead in tl.static_range(TAPS):
            inside_LC = (token_L + ahead < n_tokens)[:, None] & inside_C[None, :]
            dz_LC = tl.load(dy_ptr + place_LC + ahead * width, mask=inside_LC, other=0.0).to(tl.float32)
            if SILU:
                dz_LC = _before_silu(dz_LC, x_ptr, x_stride, weights, bias_C, token_L + ahead, channel_C, n_tokens, width, TAPS)
            dx_LC += dz_LC * weights[TAPS - 1 - ahead][None, :]
            if ahead == 0:
                more = ()
                for tap in tl.static_range(TAPS):
                    x_LC = _inputs(x_ptr, x_stride, token_L, channel_C, n_tokens, width, TAPS - 1 - tap)
                    more = more + (shares[tap] + dz_LC * x_LC,)  # noqa: RUF005
                shares = more + (shares[TAPS] + dz_LC,)  # noqa: RUF005
        inside_LC = (token_L < n_tokens)[:, None] & inside_C[None, :]
        tl.store(dx_ptr + place_LC, dx_LC.to(dx_ptr.dtype.element_ty), mask=inside_LC)
    for tap in tl.static_range(TAPS + 1):
        tl.store(parts_ptr + (run * (TAPS + 1) + tap) * width + channel_C, tl.sum(shares[tap], axis=0), mask=inside_C)


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
    tile, run = FORWARD
    n_programs = batch * -(-length // (tile * run)) * -(-width // CHANNELS)
    if n_programs:
        short_conv_forward[(n_programs,)](
            x_BTD, x_BTD.stride(1), weight_MDK, weight_MDK if bias_MD is None else bias_MD.contiguous(), y_BTD,
            length, width, batch // weight_MDK.shape[0],
            TAPS=weight_MDK.shape[-1], BIAS=bias_MD is not None, SILU=silu, TILE=tile, RUN=run, CHANNELS=CHANNELS,
        )  # fmt: skip
    return y_BTD


def backward(
    dy_BTD: Tensor, x_BTD: Tensor, weight_MDK: Tensor, bias_MD: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, of the taps, and of the bias, empty where there is none."""
    batch, length, width = x_BTD.shape
    members, _, taps = weight_MDK.shape
    dx_BTD = x_BTD.new_empty(batch, length, width)
    x_BTD, weight_MDK = even_rows(x_BTD), weight_MDK.contiguous()
    tile, run = BACKWARD
    n_runs = batch * -(-length // (tile * run))
    parts = x_BTD.new_empty(n_runs, taps + 1, width, dtype=torch.float32)
    dweight_MDK = torch.zeros_like(weight_MDK) if not parts.numel() else torch.empty_like(weight_MDK)
    dbias_MD = weight_MDK.new_empty(0) if bias_MD is None else bias_MD.new_zeros(bias_MD.shape)
    if parts.numel():
        short_conv_backward[(n_runs * -(-width // CHANNELS),)](
            dy_BTD.contiguous(), x_BTD, x_BTD.stride(1), weight_MDK, weight_MDK if bias_MD is None else bias_MD.contiguous(),
            dx_BTD, parts, length, width, batch // members,
            TAPS=taps, BIAS=bias_MD is not None, SILU=silu, TILE=tile, RUN=run, CHANNELS=CHANNELS,
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
