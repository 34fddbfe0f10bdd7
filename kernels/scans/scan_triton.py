"""The elementwise scan h_t = a_t h_{t-1} + x_t in Triton: time in tiles that stay inside of a thread, see `selective_scan_triton`.

Bytes: forward reads a and x and writes h; backward reads dh, a and h and writes da and dx. Long sequences of few channels are
cut into segments, which read a and x, or a and dh, once more (`scan_segments_triton`).

Shape legend: B batch, T time, D channels, S segments, L tokens and C channels of a tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._entry import entry
from kernels.scans.scan_operator import CHANNELS
from kernels.scans.scan_segments_triton import entering, inputs_at, segment_maps, share_out, then

FORWARD_TILE, BACKWARD_TILE = 32, 16
"""Tokens that are walked while as many are on their way: as many as registers hold."""
SIZES = ("n_tokens", "width", "n_segments", "n_tiles")


@triton.jit
def _place(width, n_segments, CHANNELS: tl.constexpr):
    """Sequence, segment and channels of a program."""
    n_blocks = tl.cdiv(width, CHANNELS)
    rest = tl.program_id(0) // n_blocks
    channel_C = tl.program_id(0) % n_blocks * CHANNELS + tl.arange(0, CHANNELS)
    return (rest // n_segments).to(tl.int64), rest % n_segments, channel_C


@entry(do_not_specialize=SIZES)
def scan_forward(
    a_ptr, x_ptr, start_ptr, h_ptr, products, ends, n_tokens, width, n_segments, n_tiles,
    START: tl.constexpr, TILE: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """States of one segment of a sequence and a block of channels, tile by tile."""
    sequence, segment, channel_C = _place(width, n_segments, CHANNELS)
    inside_C = channel_C < width
    row_L = tl.arange(0, TILE)
    h_C = tl.zeros([CHANNELS], tl.float32)
    if START:
        h_C = tl.load(start_ptr + sequence * width + channel_C, mask=inside_C, other=0.0).to(tl.float32)
    h_C = entering(h_C, products, ends, sequence, segment, n_segments, width, channel_C, inside_C, False)
    at_LC = row_L[:, None] * width + channel_C[None, :]
    coming_a_LC, coming_x_LC = inputs_at(a_ptr, x_ptr, sequence, segment * n_tiles * TILE, row_L, inside_C, at_LC, n_tokens, width)
    for tile in range(n_tiles):
        token = (segment * n_tiles + tile) * TILE
        skipped = (sequence * n_tokens + token) * width
        inside_LC = (row_L[:, None] < n_tokens - token) & inside_C[None, :]
        a_LC, x_LC = coming_a_LC.to(tl.float32), coming_x_LC.to(tl.float32)
        coming_a_LC, coming_x_LC = inputs_at(a_ptr, x_ptr, sequence, token + TILE, row_L, inside_C, at_LC, n_tokens, width)
        enters_LC = tl.where(row_L[:, None] == 0, a_LC * h_C[None, :], 0.0)
        _, h_LC = tl.associative_scan((a_LC, x_LC + enters_LC), 0, then)
        tl.store(h_ptr + skipped + at_LC, h_LC.to(h_ptr.dtype.element_ty), mask=inside_LC)
        h_C = tl.sum(tl.where(row_L[:, None] == TILE - 1, h_LC, 0.0), axis=0)


@triton.jit
def _outputs(dh_ptr, a_ptr, h_ptr, sequence, token, row_L, inside_C, at_LC, n_tokens, width, TILE: tl.constexpr):
    """A tile, if there is one, of gradients, factors, the next tokens' factors and the states before, as they are stored."""
    skipped = (sequence * n_tokens + token) * width
    row_L1 = row_L[:, None]
    inside_LC = (row_L1 < n_tokens - token) & inside_C[None, :] & (token >= 0)
    in_tile_LC = (row_L1 < tl.minimum(TILE, n_tokens - token) - 1) & inside_LC
    return (
        tl.load(dh_ptr + skipped + at_LC, mask=inside_LC, other=0.0),
        tl.load(a_ptr + skipped + at_LC, mask=inside_LC, other=1.0),
        tl.load(a_ptr + (skipped + width) + at_LC, mask=in_tile_LC, other=1.0),
        tl.load(h_ptr + (skipped - width) + at_LC, mask=inside_LC & (row_L1 > -token), other=0.0),
    )


@entry(do_not_specialize=SIZES)
def scan_backward(
    dh_ptr, a_ptr, h_ptr, start_ptr, da_ptr, dx_ptr, dstart_ptr, products, ends, n_tokens, width, n_segments, n_tiles,
    START: tl.constexpr, TILE: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """The gradient's recurrence g_t = dh_t + a_{t+1} g_{t+1} from the last tile to the first; dx = g, da_t = g_t h_{t-1}."""
    sequence, segment, channel_C = _place(width, n_segments, CHANNELS)
    inside_C = channel_C < width
    row_L = tl.arange(0, TILE)
    before_C = tl.zeros([CHANNELS], tl.float32)
    if START:
        before_C = tl.load(start_ptr + sequence * width + channel_C, mask=inside_C, other=0.0).to(tl.float32)
    g_C = tl.zeros([CHANNELS], tl.float32)
    g_C = entering(g_C, products, ends, sequence, segment, n_segments, width, channel_C, inside_C, True)
    at_LC = row_L[:, None] * width + channel_C[None, :]
    last = ((segment + 1) * n_tiles - 1) * TILE
    coming = _outputs(dh_ptr, a_ptr, h_ptr, sequence, last, row_L, inside_C, at_LC, n_tokens, width, TILE)
    for back in range(n_tiles):
        token = ((segment + 1) * n_tiles - 1 - back) * TILE
        skipped = (sequence * n_tokens + token) * width
        row_L1 = row_L[:, None]
        inside_LC = (row_L1 < n_tokens - token) & inside_C[None, :]
        dh_LC, a_LC, next_a_LC, last_h_LC = (
            coming[0].to(tl.float32), coming[1].to(tl.float32), coming[2].to(tl.float32), coming[3].to(tl.float32)
        )  # fmt: skip
        coming = _outputs(dh_ptr, a_ptr, h_ptr, sequence, token - TILE, row_L, inside_C, at_LC, n_tokens, width, TILE)
        last_h_LC = tl.where(row_L1 == -token, before_C[None, :], last_h_LC)
        leaves_LC = tl.where(row_L[:, None] == TILE - 1, g_C[None, :], 0.0)
        g_LC = tl.flip(tl.associative_scan((tl.flip(next_a_LC, 0), tl.flip(dh_LC + leaves_LC, 0)), 0, then)[1], 0)
        tl.store(dx_ptr + skipped + at_LC, g_LC.to(dx_ptr.dtype.element_ty), mask=inside_LC)
        tl.store(da_ptr + skipped + at_LC, (g_LC * last_h_LC).to(da_ptr.dtype.element_ty), mask=inside_LC)
        g_C = tl.sum(tl.where(row_L[:, None] == 0, a_LC * g_LC, 0.0), axis=0)
    tl.store(dstart_ptr + sequence * width + channel_C, g_C, mask=inside_C & (segment == 0))


def forward(a_BTD: Tensor, x_BTD: Tensor, start_BD: Tensor | None) -> Tensor:
    """States [B, T, D] in the dtype of x."""
    batch, length, width = x_BTD.shape
    h_BTD = x_BTD.new_empty(batch, length, width)
    a_BTD, x_BTD, n_blocks = a_BTD.contiguous(), x_BTD.contiguous(), -(-width // CHANNELS)
    if h_BTD.numel():
        n_segments, n_tiles = share_out(batch, length, n_blocks, FORWARD_TILE)
        scan_forward[(batch * n_segments * n_blocks,)](
            a_BTD,
            x_BTD,
            h_BTD if start_BD is None else start_BD.contiguous(),
            h_BTD,
            *segment_maps(a_BTD, x_BTD, n_segments, n_tiles, FORWARD_TILE, CHANNELS, reverse=False),
            length,
            width,
            n_segments,
            n_tiles,
            START=start_BD is not None,
            TILE=FORWARD_TILE,
            CHANNELS=CHANNELS,
            num_warps=1,
        )
    return h_BTD


def backward(dh_BTD: Tensor, a_BTD: Tensor, h_BTD: Tensor, start_BD: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a and x [B, T, D] in their dtypes, and of the initial state [B, D] in fp32."""
    batch, length, width = h_BTD.shape
    da_BTD, dx_BTD = a_BTD.new_empty(batch, length, width), h_BTD.new_empty(batch, length, width)
    dstart_BD = h_BTD.new_empty(batch, width, dtype=torch.float32)
    dh_BTD, a_BTD, n_blocks = dh_BTD.contiguous(), a_BTD.contiguous(), -(-width // CHANNELS)
    if h_BTD.numel():
        n_segments, n_tiles = share_out(batch, length, n_blocks, BACKWARD_TILE)
        scan_backward[(batch * n_segments * n_blocks,)](
            dh_BTD,
            a_BTD,
            h_BTD.contiguous(),
            dstart_BD if start_BD is None else start_BD.contiguous(),
            da_BTD,
            dx_BTD,
            dstart_BD,
            *segment_maps(a_BTD, dh_BTD, n_segments, n_tiles, BACKWARD_TILE, CHANNELS, reverse=True),
            length,
            width,
            n_segments,
            n_tiles,
            START=start_BD is not None,
            TILE=BACKWARD_TILE,
            CHANNELS=CHANNELS,
            num_warps=1,
        )
    return da_BTD, dx_BTD, dstart_BD
