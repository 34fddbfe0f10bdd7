"""One token of a sliding window with sinks: a program reads the stored keys of one head once, attends, and moves them on by one.

Storage is in order of age, so a step moves every key by one row. The program that reads a row writes it, after a barrier, so old
and new storage may be the same memory. Query heads that share keys are the rows of one tile; the maximum and the sum of a row
run along, beginning with the token's own key, which it always sees.

Shape legend: B batch, H heads of q, G heads of k and v, L stored keys, P sinks, K width of q and k, V width of v, M query heads
of a tile, N stored keys of a tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels._entry import entry
from kernels.indexed.indexed_triton import LOG2_E

SIZES = ("q_b", "q_h", "k_b", "k_h", "v_b", "v_h", "kv_heads", "group", "stored", "sinks", "window")


@triton.jit
def token_rows(
    q, k, v, q_b, q_h, k_b, k_h, v_b, v_h, kv_heads, group, stored_k, stored_v,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, M: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """The program's head of keys among all and its row of the batch; columns; the token's queries, and key and value as stored."""
    index = tl.program_id(0).to(tl.int64)
    batch, kv_head = index // kv_heads, index % kv_heads
    member = tl.arange(0, M)
    heads = (kv_head * group + member)[:, None]
    i, e = tl.arange(0, BK), tl.arange(0, BV)
    q_mask = (member < group)[:, None] & (i < K)[None, :]
    q_MK = tl.load(q + batch * q_b + heads * q_h + i[None, :], mask=q_mask, other=0.0).to(DOT)
    k_K = tl.load(k + batch * k_b + kv_head * k_h + i, mask=i < K, other=0.0).to(stored_k.dtype.element_ty)
    v_V = tl.load(v + batch * v_b + kv_head * v_h + e, mask=e < V, other=0.0).to(stored_v.dtype.element_ty)
    return index, batch, i, e, q_MK, k_K, v_V


@triton.jit
def own_key(q_MK, k_K, v_V, SCALE: tl.constexpr, DOT: tl.constexpr):
    """The running maximum, sum and weighted values of rows that have seen the token's own key."""
    highest_M = tl.sum(q_MK.to(tl.float32) * k_K.to(DOT).to(tl.float32)[None, :], 1) * SCALE
    total_M = tl.full([q_MK.shape[0]], 1.0, tl.float32)
    o_MV = tl.zeros([q_MK.shape[0], v_V.shape[0]], tl.float32) + v_V.to(DOT).to(tl.float32)[None, :]
    return highest_M, total_M, o_MV


@triton.jit
def store_outputs(y, o_MV, total_M, index, group, e, V: tl.constexpr):
    """Outputs of the heads of queries that share the program's head of keys."""
    member = tl.arange(0, o_MV.shape[0])
    y_rows = (index * group + member)[:, None] * V + e[None, :]
    y_mask = (member < group)[:, None] & (e < V)[None, :]
    tl.store(y + y_rows, (o_MV / total_M[:, None]).to(y.dtype.element_ty), mask=y_mask)


@triton.jit
def attend(q_MK, k_NK, v_NV, seen_N, highest_M, total_M, o_MV, SCALE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """The running maximum, sum and weighted values with N further keys; the maximum is finite."""
    score_MN = tl.dot(q_MK, tl.trans(k_NK.to(DOT)), input_precision=PRECISION) * SCALE
    score_MN = tl.where(seen_N[None, :], score_MN, float("-inf"))
    higher_M = tl.maximum(highest_M, tl.max(score_MN, 1))
    p_MN = tl.exp2(score_MN - higher_M[:, None])
    shrink_M = tl.exp2(highest_M - higher_M)
    o_MV = tl.dot(p_MN.to(DOT), v_NV.to(DOT), o_MV * shrink_M[:, None], input_precision=PRECISION)
    return higher_M, total_M * shrink_M + tl.sum(p_MN, 1), o_MV


@triton.jit
def load_seen(base, rows, seen, cols, WIDTH: tl.constexpr):
    """Rows of dense storage, zero where a row is not asked for."""
    return tl.load(base + rows[:, None] * WIDTH + cols[None, :], mask=seen[:, None] & (cols < WIDTH)[None, :], other=0.0)


@triton.jit
def store_rows(base, rows, inside, cols, x, WIDTH: tl.constexpr):
    """Writes rows of dense storage."""
    tl.store(base + rows[:, None] * WIDTH + cols[None, :], x, mask=inside[:, None] & (cols < WIDTH)[None, :])


@triton.jit
def walk_window(
    old_k, old_v, new_k, new_v, k_K, v_V, start, stored, i, e, q_MK, highest_M, total_M, o_MV,
    K: tl.constexpr, V: tl.constexpr, N: tl.constexpr, SCALE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attends to a head's stored keys, moves them on by one row and appends the token's own."""
    for first in range(0, stored, N):
        s = first + tl.arange(0, N)
        inside = s < stored
        k_NK = load_seen(old_k, s, inside, i, K)
        v_NV = load_seen(old_v, s, inside, e, V)
        seen = inside & (start - stored + s >= 0)
        highest_M, total_M, o_MV = attend(q_MK, k_NK, v_NV, seen, highest_M, total_M, o_MV, SCALE, DOT, PRECISION)
        tl.debug_barrier()  # every thread has read its rows
        moved = inside & (s >= 1)
        store_rows(new_k, s - 1, moved, i, k_NK, K)
        store_rows(new_v, s - 1, moved, e, v_NV, V)
    if stored > 0:
        tl.store(new_k + (stored - 1) * K + i, k_K, mask=i < K)
        tl.store(new_v + (stored - 1) * V + e, v_V, mask=e < V)
    return highest_M, total_M, o_MV


@triton.jit
def read_sinks(
    old_k, old_v, new_k, new_v, k_K, v_V, start, sinks, window, i, e, q_MK, highest_M, total_M, o_MV,
    K: tl.constexpr, V: tl.constexpr, BP: tl.constexpr, SCALE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attends to the sinks that have left the window; the token becomes one of them if it is among the first."""
    p = tl.arange(0, BP)
    is_sink = p < sinks
    k_PK = load_seen(old_k, p, is_sink, i, K)
    v_PV = load_seen(old_v, p, is_sink, e, V)
    left = is_sink & (start - p >= window)
    highest_M, total_M, o_MV = attend(q_MK, k_PK, v_PV, left, highest_M, total_M, o_MV, SCALE, DOT, PRECISION)
    tl.debug_barrier()
    own = (p == start)[:, None]
    store_rows(new_k, p, is_sink, i, tl.where(own, k_K[None, :], k_PK), K)
    store_rows(new_v, p, is_sink, e, tl.where(own, v_V[None, :], v_PV), V)
    return highest_M, total_M, o_MV


@entry(do_not_specialize=SIZES)
def window_step_kernel(
    q, k, v, old_k, old_v, old_sink_k, old_sink_v, position, new_k, new_v, new_sink_k, new_sink_v, y,
    q_b: tl.int64, q_h: tl.int64, k_b: tl.int64, k_h: tl.int64, v_b: tl.int64, v_h: tl.int64,
    kv_heads: tl.int32, group: tl.int32, stored: tl.int32, sinks: tl.int32, window: tl.int32,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, M: tl.constexpr, N: tl.constexpr, BP: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Outputs [B, H, V], and storage [B, G, L, .] and sinks [B, G, P, .] that hold the token. BP is 0 without sinks.

    Grid: (B * G,). Storage and outputs are dense.
    """
    SCALE: tl.constexpr = K**-0.5 * LOG2_E
    index, batch, i, e, q_MK, k_K, v_V = token_rows(
        q, k, v, q_b, q_h, k_b, k_h, v_b, v_h, kv_heads, group, old_k, old_v, K, V, BK, BV, M, DOT
    )  # fmt: skip
    start = tl.load(position + batch)
    highest_M, total_M, o_MV = own_key(q_MK, k_K, v_V, SCALE, DOT)
    near, sink = index * stored, index * sinks
    highest_M, total_M, o_MV = walk_window(
        old_k + near * K, old_v + near * V, new_k + near * K, new_v + near * V, k_K, v_V, start, stored, i, e,
        q_MK, highest_M, total_M, o_MV, K, V, N, SCALE, DOT, PRECISION,
    )  # fmt: skip
    if BP > 0:
        highest_M, total_M, o_MV = read_sinks(
            old_sink_k + sink * K, old_sink_v + sink * V, new_sink_k + sink * K, new_sink_v + sink * V, k_K, v_V, start, sinks,
            window, i, e, q_MK, highest_M, total_M, o_MV, K, V, BP, SCALE, DOT, PRECISION,
        )  # fmt: skip
    store_outputs(y, o_MV, total_M, index, group, e, V)
