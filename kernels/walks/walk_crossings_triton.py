"""What crosses the ends of pieces of a row: the state there times its gradient, which the gradient of the log decays starts from.

Shape legend: B batch, P segments or runs of chunks, H heads, N chunks, L tiles of a state of K V numbers, K key, V value width.
"""

from __future__ import annotations

import triton.language as tl

from kernels._entry import entry
from kernels.walks.walk_triton import _place


@entry
def entering_kernel(
    given, sums, decays, entering, heads: tl.int32, pieces: tl.int32,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, GIVEN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The state that enters each segment but the first, [B, P, H, K, V], from what segments add and their log2 decays.

    Grid: (B * H * L,).
    """
    tile, head, _, batch = _place(tl.program_id(0), (SIZE + BLOCK - 1) // BLOCK, heads, 1)
    at = tile * BLOCK + tl.arange(0, BLOCK)
    state = tl.zeros([BLOCK], tl.float32)
    if GIVEN:
        state += tl.load(given + (batch * heads + head).to(tl.int64) * SIZE + at, mask=at < SIZE, other=0.0)
    for piece in tl.range(0, pieces - 1, num_stages=STAGES):
        index = (batch.to(tl.int64) * pieces + piece) * heads + head
        added = tl.load(sums + index * SIZE + at, mask=at < SIZE, other=0.0)
        state = state * tl.exp2(tl.load(decays + index)) + added
        tl.store(entering + (index + heads) * SIZE + at, state, mask=at < SIZE)


@entry
def crossing_kernel(
    entering, final, dfinal, sums, decays, out, heads: tl.int32, pieces: tl.int32,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, ENDS: tl.constexpr, DOT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Products of the state behind each segment and its gradient, [B, P, H, L]; ENDS tells if the final one has a gradient.

    `entering` are the states before the segments, `sums` and `decays` what segments add to the gradient. Nearly the same is
    subtracted again by the last keys of the segment, which read the gradient rounded to DOT: here it is rounded as well.

    Grid: (B * H * L,).
    """
    tiles: tl.constexpr = (SIZE + BLOCK - 1) // BLOCK
    tile, head, _, batch = _place(tl.program_id(0), tiles, heads, 1)
    at = tile * BLOCK + tl.arange(0, BLOCK)
    gradient = tl.zeros([BLOCK], tl.float32)
    crossing = tl.zeros([], tl.float32)
    if ENDS:
        own = (batch * heads + head).to(tl.int64) * SIZE
        gradient += tl.load(dfinal + own + at, mask=at < SIZE, other=0.0)
        state = tl.load(final + own + at, mask=at < SIZE, other=0.0)
        crossing += tl.sum(state * gradient.to(DOT).to(tl.float32), 0)
    first = (batch.to(tl.int64) * pieces) * heads + head
    tl.store(out + (first + (pieces - 1) * heads) * tiles + tile, crossing)
    for n in tl.range(0, pieces - 1, num_stages=STAGES):
        index = first + (pieces - 1 - n) * heads
        added = tl.load(sums + index * SIZE + at, mask=at < SIZE, other=0.0)
        state = tl.load(entering + index * SIZE + at, mask=at < SIZE, other=0.0)
        gradient = gradient * tl.exp2(tl.load(decays + index)) + added
        tl.store(out + (index - heads) * tiles + tile, tl.sum(state * gradient.to(DOT).to(tl.float32), 0))


@entry
def kept_crossing_kernel(
    kept, dkept, final, dfinal, out, chunks: tl.int32, heads: tl.int32, pieces: tl.int32, every: tl.int32,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, ENDS: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """The same of runs of `every` chunks, [B, P, H], from kept states before chunks and gradients behind them, [B, N, H, K, V].

    Grid: (B * P * H,).
    """
    _, head, piece, batch = _place(tl.program_id(0), 1, heads, pieces)
    own = (batch * heads + head).to(tl.int64) * SIZE
    behind = ((batch.to(tl.int64) * chunks + (piece + 1) * every) * heads + head) * SIZE
    is_last = piece == pieces - 1
    sums = tl.zeros([BLOCK], tl.float32)
    for start in range(0, SIZE, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = (at < SIZE) & (piece < pieces - 1)
        state = tl.load(kept + behind + at, mask=inside, other=0.0).to(tl.float32)
        sums += state * tl.load(dkept + behind - heads * SIZE + at, mask=inside, other=0.0).to(tl.float32)
        if ENDS:
            inside = (at < SIZE) & is_last
            gradient = tl.load(dfinal + own + at, mask=inside, other=0.0).to(DOT).to(tl.float32)
            sums += gradient * tl.load(final + own + at, mask=inside, other=0.0)
    tl.store(out + (batch * pieces + piece) * heads + head, tl.sum(sums, 0))
