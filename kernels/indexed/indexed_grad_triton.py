"""Softmax attention over an index, backward: a walk over keys for dq, then one over queries for dk and dv.

Weights are recomputed from the scores and the saved log-sum-exp: p = exp2(score - lse), ds = p (dp - delta) with dp = dy . v and
delta = dy . y. A key's gradients sum over the query heads that share it inside one program, so nothing is reduced elsewhere.

Shape legend and index: as in `kernels.indexed.indexed_triton`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels._entry import entry
from kernels.indexed.by_key_triton import load_queries, products, store_gradients, through_weights
from kernels.indexed.indexed_triton import (
    LOG2_E,
    SIZES,
    hide_unseen,
    is_seen,
    keys_to_visit,
    load_rows,
    nth_tile,
    packed_rows,
    tile_and_rest,
)


@entry(do_not_specialize=SIZES)
def query_kernel(
    q, k, v, starts, words, lists, counts, y, lse, dy, dq, delta,
    q_b: tl.int64, q_h: tl.int64, q_t: tl.int64, k_b: tl.int64, k_h: tl.int64, k_t: tl.int64,
    v_b: tl.int64, v_h: tl.int64, v_t: tl.int64, y_b: tl.int64, y_h: tl.int64, y_t: tl.int64,
    dy_b: tl.int64, dy_h: tl.int64, dy_t: tl.int64,
    length: tl.int32, n_keys: tl.int32, kv_heads: tl.int32, group: tl.int32, pack: tl.int32,
    window: tl.int32, sinks: tl.int32, front: tl.int32, past: tl.int32,
    n_words: tl.int32, block: tl.int32, index_rows: tl.int32,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, UNIT: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    LISTED: tl.constexpr, SINKS: tl.constexpr, STORED: tl.constexpr, ROWWISE: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Gradient dq [B, T, H, K] and delta [B, H, T] of a tile of queries. Grid: (B * G * bundles * tiles of queries,)."""
    bundles = group // pack
    tiles = tl.cdiv(length, M // pack)
    tile, outer = tile_and_rest(tiles, LISTED)
    kv_index, bundle = outer // bundles, outer % bundles
    batch, kv_head = kv_index // kv_heads, kv_index % kv_heads
    wide, heads = batch.to(tl.int64), kv_heads * group
    t, head, inside = packed_rows(tile, kv_head * group + bundle * pack, pack, length, M)
    i, e = tl.arange(0, BK), tl.arange(0, BV)
    q_MK = load_rows(q, (wide * q_b + head * q_h + t * q_t) * UNIT, i, inside, K).to(DOT)
    dy_MV = load_rows(dy, (wide * dy_b + head * dy_h + t * dy_t) * UNIT, e, inside, V).to(DOT)
    y_MV = load_rows(y, (wide * y_b + head * y_h + t * y_t) * UNIT, e, inside, V)
    scalar = (wide * heads + head) * length + t
    delta_M = tl.sum(y_MV.to(tl.float32) * dy_MV.to(tl.float32), 1)
    tl.store(delta + scalar, delta_M, mask=inside)
    lse_M = tl.load(lse + scalar, mask=inside, other=0.0)
    k += (wide * k_b + kv_head * k_h) * UNIT
    v += (wide * v_b + kv_head * v_h) * UNIT
    index_row = (kv_index % index_rows).to(tl.int64)
    words += index_row * length * n_words
    entries, count = lists + (index_row * tiles + tile) * tl.cdiv(n_keys, N), counts + index_row * tiles + tile
    start = tl.load(starts + batch) if STORED else 0
    sink_tiles, band, visits = keys_to_visit(
        tile, count, length, n_keys, pack, window, sinks, front, past, LISTED, SINKS, M, N
    )  # fmt: skip
    dq_MK = tl.zeros([M, BK], tl.float32)
    first = tile * (M // pack)
    last = tl.minimum(first + M // pack, length) - 1
    for n in tl.range(visits, num_stages=STAGES):
        s_tile = nth_tile(entries, n, sink_tiles, band, LISTED) * N
        s = s_tile + tl.arange(0, N)
        k_NK = load_rows(k, s.to(tl.int64) * k_t * UNIT, i, s < n_keys, K).to(DOT)
        v_NV = load_rows(v, s.to(tl.int64) * v_t * UNIT, e, s < n_keys, V).to(DOT)
        score_MN = tl.dot(q_MK, tl.trans(k_NK), input_precision=PRECISION) * (K**-0.5 * LOG2_E)
        dp_MN = tl.dot(dy_MV, tl.trans(v_NV), input_precision=PRECISION)
        score_MN = hide_unseen(
            score_MN - lse_M[:, None], words, t[:, None], s[None, :], s_tile, first, last, inside[:, None], start, n_words, block,
            window, sinks, front, past, N, LISTED, SINKS, STORED, ROWWISE,
        )  # fmt: skip
        p_MN = tl.exp2(score_MN)
        ds_MN = p_MN * (dp_MN - delta_M[:, None])
        dq_MK = tl.dot(ds_MN.to(DOT), k_NK, dq_MK, input_precision=PRECISION)
    dq_rows = ((wide * length + t) * heads + head) * K
    dq_MK = dq_MK * K**-0.5
    tl.store(dq + dq_rows[:, None] + i[None, :], dq_MK.to(dq.dtype.element_ty), mask=inside[:, None] & (i < K)[None, :])


@triton.jit
def _queries_to_visit(
    key_tile, count, length, pack, window, sinks, front, past,
    LISTED: tl.constexpr, SINKS: tl.constexpr, STORED: tl.constexpr, FAR: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """The first tile of queries that sees a tile of keys, and how many do; a list has its count in memory.

    FAR: the queries that see sinks from beyond their window are others' to visit.
    """
    if LISTED:
        return 0, tl.load(count)
    first = key_tile * N - front - past
    high = tl.minimum(first + N + window - 1, length)
    if SINKS and not FAR:
        high = tl.where(key_tile * N < (front if STORED else sinks), length, high)
    low = tl.maximum(first, 0) // (M // pack)
    return low, tl.maximum(tl.cdiv(high, M // pack) - low, 0)


@triton.jit
def _walk_queries(
    dk_NK, dv_NV, k_NK, v_NV, q, dy, lse, delta, words, entries, s, key_tile, low, visits, first_head, batch, start,
    q_b, q_h, q_t, dy_b, dy_h, dy_t, length, heads, group, pack, window, sinks, front, past, n_words, block,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, UNIT: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    LISTED: tl.constexpr, SINKS: tl.constexpr, STORED: tl.constexpr, ROWWISE: tl.constexpr, SPLIT: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Adds what the visited tiles of queries contribute to dk, still without its scale, and to dv of the keys at `s`."""
    i, e = tl.arange(0, BK), tl.arange(0, BV)
    visits *= SPLIT
    for n in tl.range(visits * (group // pack), num_stages=STAGES):
        tile = nth_tile(entries, n % visits // SPLIT, 0, low, LISTED) * SPLIT + n % SPLIT
        t, head, inside = packed_rows(tile, first_head + n // visits * pack, pack, length, M)
        q_MK, dy_MV, lse_M, delta_M = load_queries(
            q, dy, lse, delta, batch, head, t, i, e, inside, q_b, q_h, q_t, dy_b, dy_h, dy_t, length, heads, K, V, UNIT, DOT
        )  # fmt: skip
        score_NM, dp_NM = products(k_NK, v_NV, q_MK, dy_MV, K, PRECISION)
        seen = is_seen(
            words, t[None, :], s[:, None], key_tile * N, inside[None, :], start, n_words, block, window, sinks, front, past,
            LISTED, SINKS, STORED, ROWWISE,
        )  # fmt: skip
        dv_NV, ds_NM = through_weights(dv_NV, score_NM, dp_NM, seen, lse_M, delta_M, dy_MV, DOT, PRECISION)
        dk_NK = tl.dot(ds_NM, q_MK, dk_NK, input_precision=PRECISION)
    return dk_NK, dv_NV


@triton.jit
def _far_rows(part, kv_index, n_index, s, sinks, cols, WIDTH: tl.constexpr):
    """Places of rows s of a part of the sinks' far gradients, [parts, B G, sinks, WIDTH], and which of them exist."""
    rows = (part * n_index + kv_index).to(tl.int64) * sinks + s
    return rows[:, None] * WIDTH + cols[None, :], (s < sinks)[:, None] & (cols < WIDTH)[None, :]


@entry(do_not_specialize=(*SIZES, "n_index", "parts"))
def far_kernel(
    q, k, v, lse, dy, delta, far_dk, far_dv,
    q_b: tl.int64, q_h: tl.int64, q_t: tl.int64, k_b: tl.int64, k_h: tl.int64, k_t: tl.int64,
    v_b: tl.int64, v_h: tl.int64, v_t: tl.int64, dy_b: tl.int64, dy_h: tl.int64, dy_t: tl.int64,
    length: tl.int32, n_keys: tl.int32, kv_heads: tl.int32, group: tl.int32, pack: tl.int32,
    window: tl.int32, sinks: tl.int32, n_index: tl.int32, parts: tl.int32,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, UNIT: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Gradients of sinks from queries beyond their window, [parts, B G, sinks, K or V], in fp32, dk without its scale.

    All later queries see a sink, so one program for its tile would walk on when those of all other tiles are done.
    Grid: (B * G * tiles of sinks * parts,), a part of the far queries each.
    """
    sink_tiles = tl.cdiv(sinks, N)
    program = tl.program_id(0)
    part, outer = program % parts, program // parts
    key_tile, kv_index = outer % sink_tiles, outer // sink_tiles
    batch, kv_head = (kv_index // kv_heads).to(tl.int64), kv_index % kv_heads
    s = key_tile * N + tl.arange(0, N)
    i, e = tl.arange(0, BK), tl.arange(0, BV)
    k_NK = load_rows(k, (batch * k_b + kv_head * k_h + s * k_t) * UNIT, i, s < n_keys, K).to(DOT)
    v_NV = load_rows(v, (batch * v_b + kv_head * v_h + s * v_t) * UNIT, e, s < n_keys, V).to(DOT)
    low, near = _queries_to_visit(key_tile, 0, length, pack, window, sinks, 0, 0, False, True, False, True, M, N)
    tiles = tl.cdiv(length, M // pack)
    share = tl.cdiv(tiles - low - near, parts)
    first = low + near + part * share
    dk_NK, dv_NV = _walk_queries(
        tl.zeros([N, BK], tl.float32), tl.zeros([N, BV], tl.float32), k_NK, v_NV, q, dy, lse, delta, q, q, s, key_tile,
        first, tl.maximum(tl.minimum(share, tiles - first), 0), kv_head * group, batch, 0,
        q_b, q_h, q_t, dy_b, dy_h, dy_t, length, kv_heads * group, group, pack, window, sinks, 0, 0, 1, 1,
        K, V, BK, BV, UNIT, M, N, False, True, False, False, 1, DOT, PRECISION, STAGES,
    )  # fmt: skip
    place, exists = _far_rows(part, kv_index, n_index, s, sinks, i, K)
    tl.store(far_dk + place, dk_NK, mask=exists)
    place, exists = _far_rows(part, kv_index, n_index, s, sinks, e, V)
    tl.store(far_dv + place, dv_NV, mask=exists)


@entry(do_not_specialize=(*SIZES, "n_index", "parts"))
def key_kernel(
    q, k, v, starts, words, lists, counts, lse, dy, delta, far_dk, far_dv, dk, dv,
    q_b: tl.int64, q_h: tl.int64, q_t: tl.int64, k_b: tl.int64, k_h: tl.int64, k_t: tl.int64,
    v_b: tl.int64, v_h: tl.int64, v_t: tl.int64, dy_b: tl.int64, dy_h: tl.int64, dy_t: tl.int64,
    length: tl.int32, n_keys: tl.int32, kv_heads: tl.int32, group: tl.int32, pack: tl.int32,
    window: tl.int32, sinks: tl.int32, front: tl.int32, past: tl.int32,
    n_words: tl.int32, block: tl.int32, index_rows: tl.int32, n_index: tl.int32, parts: tl.int32,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, UNIT: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    LISTED: tl.constexpr, SINKS: tl.constexpr, STORED: tl.constexpr, ROWWISE: tl.constexpr, SPLIT: tl.constexpr,
    FAR: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Gradients dk [B, S, G, K] and dv [B, S, G, V] of a tile of keys. Grid: (B * G * tiles of keys,).

    `lists` is [index rows, tiles of keys, tiles of queries] here, and `counts` [index rows, tiles of keys]. A tile of queries in a
    list is SPLIT tiles of this walk. FAR: `far_kernel` has done the far queries of sinks, whose parts are added up here.
    """
    key_tiles = tl.cdiv(n_keys, N)
    list_tiles = tl.cdiv(length, SPLIT * M // pack)
    program = tl.program_id(0)
    key_tile, kv_index = program % key_tiles, program // key_tiles
    batch, kv_head = kv_index // kv_heads, kv_index % kv_heads
    wide = batch.to(tl.int64)
    s = key_tile * N + tl.arange(0, N)
    i, e = tl.arange(0, BK), tl.arange(0, BV)
    k_NK = load_rows(k, (wide * k_b + kv_head * k_h + s * k_t) * UNIT, i, s < n_keys, K).to(DOT)
    v_NV = load_rows(v, (wide * v_b + kv_head * v_h + s * v_t) * UNIT, e, s < n_keys, V).to(DOT)
    index_row = (kv_index % index_rows).to(tl.int64)
    words += index_row * length * n_words
    entries, count = lists + (index_row * key_tiles + key_tile) * list_tiles, counts + index_row * key_tiles + key_tile
    start = tl.load(starts + batch) if STORED else 0
    low, visits = _queries_to_visit(
        key_tile, count, length, pack, window, sinks, front, past, LISTED, SINKS, STORED, FAR, M, N
    )  # fmt: skip
    dk_NK = tl.zeros([N, BK], tl.float32)
    dv_NV = tl.zeros([N, BV], tl.float32)
    if FAR:
        for part in range(tl.where(key_tile * N < sinks, parts, 0)):
            place, exists = _far_rows(part, kv_index, n_index, s, sinks, i, K)
            dk_NK += tl.load(far_dk + place, mask=exists, other=0.0)
            place, exists = _far_rows(part, kv_index, n_index, s, sinks, e, V)
            dv_NV += tl.load(far_dv + place, mask=exists, other=0.0)
    dk_NK, dv_NV = _walk_queries(
        dk_NK, dv_NV, k_NK, v_NV, q, dy, lse, delta, words, entries, s, key_tile, low, visits, kv_head * group, wide, start,
        q_b, q_h, q_t, dy_b, dy_h, dy_t, length, kv_heads * group, group, pack, window, sinks, front, past, n_words, block,
        K, V, BK, BV, UNIT, M, N, LISTED, SINKS, STORED, ROWWISE, SPLIT, DOT, PRECISION, STAGES,
    )  # fmt: skip
    rows = (wide * n_keys + s) * kv_heads + kv_head
    store_gradients(dk, dv, rows, s < n_keys, i, e, dk_NK, dv_NV, K, V)
