"""Softmax attention over an index: a program visits only the tiles of keys that its queries may see.

The index is either a band, whose tiles follow from positions (a causal window and the first tokens of a sequence), or a list
of tiles in memory with a word of bits for each token that says which blocks of keys it chose. Scores are kept in base 2
and a row's maximum and sum run along (Milakov & Gimelshein 2018; Dao et al. 2022).

Query heads that share keys are packed: row r of a tile is token r // pack and head r % pack of a bundle of `pack` heads, so that
keys are read once for all of them. `pack` is a power of two that divides the group; a group is one or more bundles.

A band's keys lie behind `front` stored sinks and `past` stored keys: key s is at position s - front - past relative to the
first query. Without stored keys both are 0 and sinks are the first `sinks` keys themselves.

Shape legend: B batch, H heads of q, G heads of k and v, T queries, S keys, K width of q and k, V width of v, M rows of a
tile of queries, N keys of a tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels._entry import entry

LOG2_E = tl.constexpr(1.4426950408889634)
# Run-time integers: with these unspecialised, a new batch, length or head count compiles nothing.
STRIDES = tuple(f"{tensor}_{axis}" for tensor in ("q", "k", "v", "y", "dy") for axis in "bht")
COUNTS = ("length", "n_keys", "kv_heads", "group", "pack", "window", "sinks", "front", "past", "n_words", "block", "index_rows")
SIZES = (*STRIDES, *COUNTS)
FLAG_SIZES = ("rows", "n_rows_inner", "n_flags", "row_outer", "row_inner", "flag_stride")


@triton.jit
def load_rows(base, offsets_M, cols, inside_M, WIDTH: tl.constexpr):
    """Rows at the given offsets of a matrix with WIDTH columns, zero beyond its edges."""
    return tl.load(base + offsets_M[:, None] + cols[None, :], mask=inside_M[:, None] & (cols < WIDTH)[None, :], other=0.0)


@triton.jit
def band_tiles(first, stop, n_keys, window, sinks, front, past, N: tl.constexpr, SINKS: tl.constexpr):
    """Tiles of keys seen by tokens first .. stop: so many of the first ones, then those from a tile on, and their number."""
    low = tl.maximum(first + past - window + 1, 0) + front
    high = tl.minimum(stop + past + front, n_keys)
    band = low // N
    sink_tiles = 0
    if SINKS:
        sink_tiles = tl.minimum(tl.cdiv(sinks, N), band)
    return sink_tiles, band, sink_tiles + tl.cdiv(high, N) - band


@triton.jit
def band_seen(t, s, start, window, sinks, front, past, SINKS: tl.constexpr, STORED: tl.constexpr):
    """Whether the token at index t sees the key at index s; both broadcast. `start` is the absolute position of token 0."""
    age = t + past + front - s
    seen = age.to(tl.uint32) < window.to(tl.uint32)  # not negative and below the window
    if STORED:
        seen = seen & (s >= front) & (start + t - age >= 0)
        if SINKS:
            seen = seen | ((s < front) & (start + t - s >= window))
    elif SINKS:
        seen = seen | ((age >= 0) & (s < sinks))
    return seen


@triton.jit
def listed_seen(words, t, s, s_tile, inside_t, n_words, block, past, ROWWISE: tl.constexpr):
    """Whether the token at t chose the block of the key at s and comes after it; ROWWISE: a tile of keys is in one block."""
    if ROWWISE:
        chosen = s_tile // block + 0 * t
        word = tl.load(words + t.to(tl.int64) * n_words + chosen // 32, mask=inside_t, other=0)
    else:
        chosen = s // block + 0 * t
        word = tl.load(words + t.to(tl.int64) * n_words + chosen // 32, mask=inside_t & (chosen < 32 * n_words), other=0)
    return (((word >> (chosen % 32)) & 1) != 0) & (t + past >= s)


@triton.jit
def is_seen(
    words, t, s, s_tile, inside_t, start, n_words, block, window, sinks, front, past,
    LISTED: tl.constexpr, SINKS: tl.constexpr, STORED: tl.constexpr, ROWWISE: tl.constexpr,
):  # fmt: skip
    """Whether the token at t sees the key at s, of the tile of keys that begins at s_tile; t and s broadcast."""
    if LISTED:
        return listed_seen(words, t, s, s_tile, inside_t, n_words, block, past, ROWWISE)
    return band_seen(t, s, start, window, sinks, front, past, SINKS, STORED) & inside_t


@triton.jit
def hide_unseen(
    score, words, t, s, s_tile, first, last, inside_t, start, n_words, block, window, sinks, front, past,
    N: tl.constexpr, LISTED: tl.constexpr, SINKS: tl.constexpr, STORED: tl.constexpr, ROWWISE: tl.constexpr,
):  # fmt: skip
    """-inf for the keys that `is_seen` denies; a tile of keys that all tokens first .. last see in a plain band stays as it is."""
    if LISTED or SINKS or STORED:
        seen = is_seen(
            words, t, s, s_tile, inside_t, start, n_words, block, window, sinks, front, past, LISTED, SINKS, STORED, ROWWISE
        )
        score = tl.where(seen, score, float("-inf"))
    elif (s_tile + N > first + 1) | (last - s_tile >= window):
        seen = band_seen(t, s, start, window, sinks, front, past, SINKS, STORED) & inside_t
        score = tl.where(seen, score, float("-inf"))
    return score


@triton.jit
def keys_to_visit(
    tile, count, length, n_keys, pack, window, sinks, front, past,
    LISTED: tl.constexpr, SINKS: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """What `nth_tile` needs for a tile of queries, and how many tiles of keys it visits; a list has its count in memory."""
    if LISTED:
        return 0, 0, tl.load(count)
    first = tile * (M // pack)
    return band_tiles(first, tl.minimum(first + M // pack, length), n_keys, window, sinks, front, past, N, SINKS)


@triton.jit
def nth_tile(entries, n, sink_tiles, band, LISTED: tl.constexpr):
    """The n-th tile of keys that a tile of queries visits."""
    if LISTED:
        return tl.load(entries + n)
    return tl.where(n < sink_tiles, n, band + n - sink_tiles)


@triton.jit
def tile_and_rest(tiles, LISTED: tl.constexpr):
    """The tile of queries of a program, and the number of what is left; late ones of a list, which visit most keys, come first."""
    program = tl.program_id(0)
    if LISTED:
        rest = tl.num_programs(0) // tiles
        return tiles - 1 - program // rest, program % rest
    else:
        return program % tiles, program // tiles


@triton.jit
def packed_rows(tile, first_head, pack, length, M: tl.constexpr):
    """Token, head and whether it exists, of each row of a tile of queries."""
    r = tl.arange(0, M)
    t = tile * (M // pack) + r // pack
    return t, first_head + r % pack, t < length


@entry(do_not_specialize=SIZES)
def forward_kernel(
    q, k, v, starts, words, lists, counts, y, lse,
    q_b: tl.int64, q_h: tl.int64, q_t: tl.int64, k_b: tl.int64, k_h: tl.int64, k_t: tl.int64,
    v_b: tl.int64, v_h: tl.int64, v_t: tl.int64,
    length: tl.int32, n_keys: tl.int32, kv_heads: tl.int32, group: tl.int32, pack: tl.int32,
    window: tl.int32, sinks: tl.int32, front: tl.int32, past: tl.int32,
    n_words: tl.int32, block: tl.int32, index_rows: tl.int32,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, UNIT: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    LISTED: tl.constexpr, SINKS: tl.constexpr, STORED: tl.constexpr, ROWWISE: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Outputs [B, T, H, V] and base-2 log-sum-exp [B, H, T] of a tile of queries.

    Grid: (B * G * bundles * tiles of queries,). `words` is [index rows, T, n_words]; `lists` [index rows, tiles of queries,
    tiles of keys] and `counts` [index rows, tiles of queries], one index row for all heads or one for each of B * G.
    """
    SCALE: tl.constexpr = K**-0.5 * LOG2_E
    bundles = group // pack
    tiles = tl.cdiv(length, M // pack)
    tile, outer = tile_and_rest(tiles, LISTED)
    kv_index, bundle = outer // bundles, outer % bundles
    batch, kv_head = kv_index // kv_heads, kv_index % kv_heads
    wide = batch.to(tl.int64)
    t, head, inside = packed_rows(tile, kv_head * group + bundle * pack, pack, length, M)
    i, e = tl.arange(0, BK), tl.arange(0, BV)
    q_MK = load_rows(q, (wide * q_b + head * q_h + t * q_t) * UNIT, i, inside, K).to(DOT)
    k += (wide * k_b + kv_head * k_h) * UNIT
    v += (wide * v_b + kv_head * v_h) * UNIT
    index_row = (kv_index % index_rows).to(tl.int64)
    words += index_row * length * n_words
    entries, count = lists + (index_row * tiles + tile) * tl.cdiv(n_keys, N), counts + index_row * tiles + tile
    start = tl.load(starts + batch) if STORED else 0
    sink_tiles, band, visits = keys_to_visit(
        tile, count, length, n_keys, pack, window, sinks, front, past, LISTED, SINKS, M, N
    )  # fmt: skip
    first = tile * (M // pack)
    last = tl.minimum(first + M // pack, length) - 1
    highest_M = tl.full([M], float("-inf"), tl.float32)
    total_M = tl.zeros([M], tl.float32)
    o_MV = tl.zeros([M, BV], tl.float32)
    for n in tl.range(visits, num_stages=STAGES):
        s_tile = nth_tile(entries, n, sink_tiles, band, LISTED) * N
        s = s_tile + tl.arange(0, N)
        k_NK = load_rows(k, s.to(tl.int64) * k_t * UNIT, i, s < n_keys, K).to(DOT)
        v_NV = load_rows(v, s.to(tl.int64) * v_t * UNIT, e, s < n_keys, V).to(DOT)
        score_MN = tl.dot(q_MK, tl.trans(k_NK), input_precision=PRECISION)
        score_MN = hide_unseen(
            score_MN, words, t[:, None], s[None, :], s_tile, first, last, inside[:, None], start, n_words, block,
            window, sinks, front, past, N, LISTED, SINKS, STORED, ROWWISE,
        )  # fmt: skip
        higher_M = tl.maximum(highest_M, tl.max(score_MN, 1) * SCALE)
        base_M = tl.where(higher_M == float("-inf"), 0.0, higher_M)  # a row that has seen nothing yet
        p_MN = tl.exp2(score_MN * SCALE - base_M[:, None])
        shrink_M = tl.exp2(highest_M - base_M)
        total_M = total_M * shrink_M + tl.sum(p_MN, 1)
        o_MV = tl.dot(p_MN.to(DOT), v_NV, o_MV * shrink_M[:, None], input_precision=PRECISION)
        highest_M = higher_M
    safe_M = tl.where(total_M == 0.0, 1.0, total_M)
    heads = kv_heads * group
    y_rows = ((wide * length + t) * heads + head) * V
    o_MV = o_MV / safe_M[:, None]
    tl.store(y + y_rows[:, None] + e[None, :], o_MV.to(y.dtype.element_ty), mask=inside[:, None] & (e < V)[None, :])
    tl.store(lse + (wide * heads + head) * length + t, highest_M + tl.log2(safe_M), mask=inside)


@entry(do_not_specialize=FLAG_SIZES)
def compact_kernel(
    flags, lists, counts, rows: tl.int32, n_rows_inner: tl.int32, n_flags: tl.int32,
    row_outer: tl.int64, row_inner: tl.int64, flag_stride: tl.int64, BLOCK: tl.constexpr,
):  # fmt: skip
    """Positions of the set flags of each row, in order, and their number. Grid: (rows,)."""
    row = tl.program_id(0).to(tl.int64)
    base = flags + row // n_rows_inner * row_outer + row % n_rows_inner * row_inner
    found = 0
    for first in range(0, n_flags, BLOCK):
        position = first + tl.arange(0, BLOCK)
        flag = (tl.load(base + position * flag_stride, mask=position < n_flags, other=0) != 0).to(tl.int32)
        rank = found + tl.cumsum(flag, 0) - 1
        tl.store(lists + row * n_flags + rank, position, mask=flag != 0)
        found += tl.sum(flag, 0)
    tl.store(counts + row, found)
