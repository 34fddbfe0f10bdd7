"""Long scans of few channels in segments: what each segment does to a state, found by programs of their own beforehand.

A segment of h_t = a_t h_{t-1} + x_t maps the state before it to product * state + end. Backward the same holds for
e_t = a_t g_t, the gradient that reaches h_{t-1}: e_t = a_t e_{t+1} + a_t dh_t.

Shape legend: B batch, T time, D channels, S segments, L tokens and C channels of a tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._entry import entry

ENOUGH, PROGRAMS = 1024, 2048
"""Blocks of channels of all sequences that keep a device busy; with fewer, sequences are cut into segments for so many programs."""
SHORTEST_SEGMENT = 64
"""Tokens below which reading the inputs twice costs more than the segments gain."""


@triton.jit
def then(a_1, x_1, a_2, x_2):
    """One map h -> a_1 h + x_1, then h -> a_2 h + x_2."""
    return a_1 * a_2, a_2 * x_1 + x_2


@triton.jit
def inputs_at(a_ptr, x_ptr, sequence, token, row_L, inside_C, at_LC, n_tokens, width):
    """A tile of factors and inputs as they are stored, which may be on its way while another is walked.

    Outside of the sequence, what leaves a state as it is.
    """
    skipped = (sequence * n_tokens + token) * width
    inside_LC = (row_L[:, None] < n_tokens - token) & inside_C[None, :] & (token >= 0)
    a_LC = tl.load(a_ptr + skipped + at_LC, mask=inside_LC, other=1.0)
    return a_LC, tl.load(x_ptr + skipped + at_LC, mask=inside_LC, other=0.0)


@triton.jit
def entering(h_C, products, ends, sequence, segment, n_segments, width, channel_C, inside_C, REVERSE: tl.constexpr):
    """The state that enters a segment, from the one at the end of the sequence, through all segments between."""
    n_before = (n_segments - 1 - segment) if REVERSE else segment
    for n in range(n_before):
        other = (n_segments - 1 - n) if REVERSE else n
        place_C = (sequence * n_segments + other) * width + channel_C
        product_C = tl.load(products + place_C, mask=inside_C, other=0.0)
        h_C = product_C * h_C + tl.load(ends + place_C, mask=inside_C, other=0.0)
    return h_C


@entry(do_not_specialize=["n_tokens", "width", "n_segments", "n_tiles"])
def segments_kernel(
    a_ptr, x_ptr, products, ends, n_tokens, width, n_segments, n_tiles,
    REVERSE: tl.constexpr, TILE: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Products and ends [B, S, D] of all segments of n_tiles tiles but the last to be walked."""
    n_blocks = tl.cdiv(width, CHANNELS)
    rest = tl.program_id(0) // n_blocks
    segment = rest % (n_segments - 1) + (1 if REVERSE else 0)
    sequence = (rest // (n_segments - 1)).to(tl.int64)
    channel_C = tl.program_id(0) % n_blocks * CHANNELS + tl.arange(0, CHANNELS)
    inside_C = channel_C < width
    row_L = tl.arange(0, TILE)
    h_C = tl.zeros([CHANNELS], tl.float32)
    product_C = tl.full([CHANNELS], 1.0, tl.float32)
    token_L = (TILE - 1 - row_L) if REVERSE else row_L
    at_LC = token_L[:, None] * width + channel_C[None, :]
    token = (segment * n_tiles + ((n_tiles - 1) if REVERSE else 0)) * TILE
    coming_a_LC, coming_x_LC = inputs_at(a_ptr, x_ptr, sequence, token, token_L, inside_C, at_LC, n_tokens, width)
    for _ in range(n_tiles):
        a_LC, x_LC = coming_a_LC.to(tl.float32), coming_x_LC.to(tl.float32)
        token += -TILE if REVERSE else TILE
        coming_a_LC, coming_x_LC = inputs_at(a_ptr, x_ptr, sequence, token, token_L, inside_C, at_LC, n_tokens, width)
        if REVERSE:
            x_LC *= a_LC
        x_LC += tl.where(row_L[:, None] == 0, a_LC * h_C[None, :], 0.0)
        products_LC, h_LC = tl.associative_scan((a_LC, x_LC), 0, then)
        h_C = tl.sum(tl.where(row_L[:, None] == TILE - 1, h_LC, 0.0), axis=0)
        product_C *= tl.sum(tl.where(row_L[:, None] == TILE - 1, products_LC, 0.0), axis=0)
    place_C = (sequence * n_segments + segment) * width + channel_C
    tl.store(products + place_C, product_C, mask=inside_C)
    tl.store(ends + place_C, h_C, mask=inside_C)


def share_out(batch: int, length: int, blocks: int, tile: int) -> tuple[int, int]:
    """Segments of each sequence, and tiles of each, from the shape alone."""
    n_tiles = -(-length // tile)
    wanted = 1
    if 0 < batch * blocks < ENOUGH:
        wanted = max(1, min(PROGRAMS // (batch * blocks), length // SHORTEST_SEGMENT))
    tiles = -(-n_tiles // wanted)
    return -(-n_tiles // tiles), tiles


def segment_maps(
    a_BTD: Tensor, x_BTD: Tensor, n_segments: int, n_tiles: int, tile: int, channels: int, *, reverse: bool
) -> tuple[Tensor, Tensor]:
    """Products and ends of the segments, [B, S, D] in fp32; empty without segments."""
    batch, length, width = x_BTD.shape
    if n_segments == 1:
        return (x_BTD.new_empty(0, dtype=torch.float32),) * 2
    products, ends = (x_BTD.new_empty(batch, n_segments, width, dtype=torch.float32) for _ in range(2))
    segments_kernel[(batch * (n_segments - 1) * -(-width // channels),)](
        a_BTD, x_BTD, products, ends, length, width, n_segments, n_tiles,
        REVERSE=reverse, TILE=tile, CHANNELS=channels, num_warps=1,
    )  # fmt: skip
    return products, ends
