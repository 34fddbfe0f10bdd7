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

LOG2_E = tl.constexpr(1.4426950408889634)
TILE = 16
CHANNELS = 64
STEP_CHANNELS = 256
LENGTHS = ("n_tokens", "sequences_per_member")


@triton.jit
def _convolve(x_ptr, x_stride, weight_ptr, bias_ptr, token_L, channel_C, n_tokens, width, TAPS: tl.constexpr, BIAS: tl.constexpr):
    """The tile bias + sum_j weight_j x_{t-K+1+j}."""
    z_LC = tl.zeros([token_L.shape[0], channel_C.shape[0]], tl.float32)
    for tap in tl.static_range(TAPS):
        source_L1 = token_L[:, None] + (tap - TAPS + 1)
        seen_LC = (source_L1 >= 0) & (source_L1 < n_tokens) & (channel_C < width)[None, :]
        x_LC = tl.load(x_ptr + source_L1.to(tl.int64) * x_stride + channel_C[None, :], mask=seen_LC, other=0.0)
        weight_C = tl.load(weight_ptr + tap * width + channel_C, mask=channel_C < width, other=0.0)
        z_LC += x_LC.to(tl.float32) * weight_C[None, :]
    if BIAS:
        z_LC += tl.load(bias_ptr + channel_C, mask=channel_C < width, other=0.0).to(tl.float32)[None, :]
    return z_LC


@entry(do_not_specialize=LENGTHS)
def short_conv_forward(
    x_ptr, x_stride, weight_ptr, bias_ptr, y_ptr,
    n_tokens, width, sequences_per_member,
    TAPS: tl.constexpr, BIAS: tl.constexpr, SILU: tl.constexpr, TILE: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """One tile of outputs."""
    n_tiles, n_blocks = tl.cdiv(n_tokens, TILE), tl.cdiv(width, CHANNELS)
    sequence = (tl.program_id(0) // (n_tiles * n_blocks)).to(tl.int64)
    token_L = tl.program_id(0) // n_blocks % n_tiles * TILE + tl.arange(0, TILE)
    channel_C = tl.program_id(0) % n_blocks * CHANNELS + tl.arange(0, CHANNELS)
    member = sequence // sequences_per_member
    x_ptr += sequence * n_tokens * x_stride
    weight_ptr += member * TAPS * width
    bias_ptr += member * width
    y_LC = _convolve(x_ptr, x_stride, weight_ptr, bias_ptr, token_L, channel_C, n_tokens, width, TAPS, BIAS)
    if SILU:
        y_LC = y_LC / (1 + tl.exp2(-y_LC * LOG2_E))
    place_LC = (sequence * n_tokens + token_L[:, None]) * width + channel_C[None, :]
    inside_LC = (token_L < n_tokens)[:, None] & (channel_C < width)[None, :]
    tl.store(y_ptr + place_LC, y_LC.to(y_ptr.dtype.element_ty), mask=inside_LC)


@entry(do_not_specialize=LENGTHS)
def short_conv_backward(
    dy_ptr, x_ptr, x_stride, weight_ptr, bias_ptr, dx_ptr, parts_ptr,
    n_tokens, width, sequences_per_member,
    TAPS: tl.constexpr, BIAS: tl.constexpr, SILU: tl.constexpr, TILE: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """One tile of dx, and the tile's shares in the gradients of the taps and, last, of the bias."""
    n_tiles, n_blocks = tl.cdiv(n_tokens, TILE), tl.cdiv(width, CHANNELS)
    tile = (tl.program_id(0) // n_blocks).to(tl.int64)
    sequence = tile // n_tiles
    token_L = (tile % n_tiles).to(tl.int32) * TILE + tl.arange(0, TILE)
    channel_C = tl.program_id(0) % n_blocks * CHANNELS + tl.arange(0, CHANNELS)
    inside_C = channel_C < width
    member = sequence // sequences_per_member
    x_ptr += sequence * n_tokens * x_stride
    weight_ptr += member * TAPS * width
    bias_ptr += member * width
    parts_ptr += tile * (TAPS + 1) * width + channel_C
    place_LC = (sequence * n_tokens + token_L[:, None]) * width + channel_C[None, :]
    dx_LC = tl.zeros([TILE, CHANNELS], tl.float32)
    for ahead in tl.static_range(TAPS):
        later_L = token_L + ahead
        inside_LC = (later_L < n_tokens)[:, None] & inside_C[None, :]
        dz_LC = tl.load(dy_ptr + place_LC + ahead * width, mask=inside_LC, other=0.0).to(tl.float32)
        if SILU:
            z_LC = _convolve(x_ptr, x_stride, weight_ptr, bias_ptr, later_L, channel_C, n_tokens, width, TAPS, BIAS)
            gate_LC = 1 / (1 + tl.exp2(-z_LC * LOG2_E))
            dz_LC *= gate_LC * (1 + z_LC * (1 - gate_LC))
        weight_C = tl.load(weight_ptr + (TAPS - 1 - ahead) * width + channel_C, mask=inside_C, other=0.0)
        dx_LC += dz_LC * weight_C[None, :]
        if ahead == 0:
            for tap in tl.static_range(TAPS):
                source_L1 = token_L[:, None] + (tap - TAPS + 1)
                seen_LC = (source_L1 >= 0) & (source_L1 < n_tokens) & inside_C[None, :]
                x_LC = tl.load(x_ptr + source_L1.to(tl.int64) * x_stride + channel_C[None, :], mask=seen_LC, other=0.0)
                tl.store(parts_ptr + tap * width, tl.sum(dz_LC * x_LC.to(tl.float32), axis=0), mask=inside_C)
            tl.store(parts_ptr + TAPS * width, tl.sum(dz_LC, axis=0), mask=inside_C)
    inside_LC = (token_L < n_tokens)[:, None] & inside_C[None, :]
    tl.store(dx_ptr + place_LC, dx_LC.to(dx_ptr.dtype.element_ty), mask=inside_LC)


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
    weight_ptr += member * TAPS * width + channel_C
    tail_ptr += sequence * (TAPS - 1) * width + channel_C
    new_tail_ptr += sequence * (TAPS - 1) * width + channel_C
    x_C = tl.load(x_ptr + sequence * width + channel_C, mask=inside_C, other=0.0).to(tl.float32)
    y_C = x_C * tl.load(weight_ptr + (TAPS - 1) * width, mask=inside_C, other=0.0)
    for tap in tl.static_range(TAPS - 1):
        old_C = tl.load(tail_ptr + tap * width, mask=inside_C, other=0.0)
        y_C += old_C.to(tl.float32) * tl.load(weight_ptr + tap * width, mask=inside_C, other=0.0)
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
    x_BTD, taps_MKD = even_rows(x_BTD), _taps_first(weight_MDK)
    n_programs = batch * -(-length // TILE) * -(-width // CHANNELS)
    if n_programs:
        short_conv_forward[(n_programs,)](
            x_BTD,
            x_BTD.stride(1),
            taps_MKD,
            taps_MKD if bias_MD is None else bias_MD.contiguous(),
            y_BTD,
            length,
            width,
            batch // weight_MDK.shape[0],
            TAPS=weight_MDK.shape[-1],
            BIAS=bias_MD is not None,
            SILU=silu,
            TILE=TILE,
            CHANNELS=CHANNELS,
        )
    return y_BTD


def backward(
    dy_BTD: Tensor, x_BTD: Tensor, weight_MDK: Tensor, bias_MD: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, of the taps and of the bias, the latter two in the dtype of the taps."""
    batch, length, width = x_BTD.shape
    members, _, taps = weight_MDK.shape
    dx_BTD = x_BTD.new_empty(batch, length, width)
    x_BTD, taps_MKD = even_rows(x_BTD), _taps_first(weight_MDK)
    n_tiles = batch * -(-length // TILE)
    parts = x_BTD.new_empty(n_tiles, taps + 1, width, dtype=torch.float32)
    if parts.numel():
        short_conv_backward[(n_tiles * -(-width // CHANNELS),)](
            dy_BTD.contiguous(),
            x_BTD,
            x_BTD.stride(1),
            taps_MKD,
            taps_MKD if bias_MD is None else bias_MD.contiguous(),
            dx_BTD,
            parts,
            length,
            width,
            batch // members,
            TAPS=taps,
            BIAS=bias_MD is not None,
            SILU=silu,
            TILE=TILE,
            CHANNELS=CHANNELS,
        )
    sums = parts.view(members, n_tiles // members, taps + 1, width).sum(1).to(weight_MDK.dtype)
    return dx_BTD, sums[:, :taps].mT.contiguous(), sums[:, taps].clone()


def step(x_BD: Tensor, tail_BPD: Tensor, weight_MDK: Tensor, bias_MD: Tensor | None, silu: bool) -> tuple[Tensor, Tensor]:
    """The output [B, D] in the dtype of x, and the new tail [B, P, D] in that of the old one."""
    batch, width = x_BD.shape
    y_BD, new_tail_BPD = x_BD.new_empty(batch, width), tail_BPD.new_empty(tail_BPD.shape)
    taps_MKD = _taps_first(weight_MDK)
    n_programs = batch * -(-width // STEP_CHANNELS)
    if n_programs:
        short_conv_update[(n_programs,)](
            x_BD.contiguous(),
            tail_BPD.contiguous(),
            taps_MKD,
            taps_MKD if bias_MD is None else bias_MD.contiguous(),
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


def _taps_first(weight_MDK: Tensor) -> Tensor:
    """[M, K, D] in fp32: a program reads neighbouring channels of one tap."""
    return weight_MDK.mT.to(torch.float32).contiguous()
