"""One token of a window whose keys compete for room when they leave it: one program a head of keys reads all of them once.

Kept keys are in order of age, so where one goes the newer ones move by one row, and the key that leaves the window becomes the
last. A program that reads a row writes it, after a barrier, in place.

Shape legend: B batch, H heads of q, G heads of k and v, L stored keys, P kept keys, K width of q and k, V width of v, M query
heads of a tile, N keys of a tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels._entry import entry
from kernels.indexed.indexed_triton import LOG2_E
from kernels.steps.window_step_triton import (
    attend,
    load_seen,
    own_key,
    read_sinks,
    store_outputs,
    store_rows,
    token_rows,
    walk_window,
)

SIZES = ("q_b", "q_h", "k_b", "k_h", "v_b", "v_h", "kv_heads", "group", "stored", "sinks", "room")


@triton.jit
def walk_kept(
    kept_k, kept_v, kept_score, near_k, near_v, near_score, own_score, start, stored, sinks, room, i, e,
    q_MK, highest_M, total_M, o_MV,
    K: tl.constexpr, V: tl.constexpr, N: tl.constexpr, BP: tl.constexpr, BL: tl.constexpr, SCALE: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attends to a head's kept keys, puts the oldest of the window among them, and moves the window's scores on."""
    p, s = tl.arange(0, BP), tl.arange(0, BL)
    leaving_k = tl.load(near_k + i, mask=i < K, other=0.0)
    leaving_v = tl.load(near_v + e, mask=e < V, other=0.0)
    near_score_L = tl.load(near_score + s, mask=s < stored, other=0.0)
    leaving = tl.where(start - stored >= sinks, tl.load(near_score), float("-inf"))
    score_P = tl.load(kept_score + p, mask=p < room, other=float("inf"))
    lowest = tl.min(score_P, 0)
    # The oldest of the lowest goes; `room` stands for the key that leaves, whose score is lower still.
    goes = tl.where(leaving >= lowest, tl.min(tl.where(score_P == lowest, p, room), 0), room)
    for first in range(0, room, N):
        row = first + tl.arange(0, N)
        inside = row < room
        k_NK = load_seen(kept_k, row, inside, i, K)
        v_NV = load_seen(kept_v, row, inside, e, V)
        seen = tl.load(kept_score + row, mask=inside, other=float("-inf")) > float("-inf")
        highest_M, total_M, o_MV = attend(q_MK, k_NK, v_NV, seen, highest_M, total_M, o_MV, SCALE, DOT, PRECISION)
        tl.debug_barrier()  # every thread has read its rows
        moved = inside & (row > goes)
        store_rows(kept_k, row - 1, moved, i, k_NK, K)
        store_rows(kept_v, row - 1, moved, e, v_NV, V)
    joins = goes < room
    tl.store(kept_k + (room - 1) * K + i, leaving_k, mask=(i < K) & joins)
    tl.store(kept_v + (room - 1) * V + e, leaving_v, mask=(e < V) & joins)
    tl.store(kept_score + p - 1, score_P, mask=(p < room) & (p > goes))
    tl.store(kept_score + room - 1, leaving, mask=joins)
    tl.store(near_score + s - 1, near_score_L, mask=(s < stored) & (s >= 1))
    tl.store(near_score + stored - 1, own_score)
    return highest_M, total_M, o_MV


@entry(do_not_specialize=SIZES)
def kept_step_kernel(
    q, k, v, score, near_k, near_v, sink_k, sink_v, kept_k, kept_v, kept_score, near_score, position, y,
    q_b: tl.int64, q_h: tl.int64, k_b: tl.int64, k_h: tl.int64, v_b: tl.int64, v_h: tl.int64,
    kv_heads: tl.int32, group: tl.int32, stored: tl.int32, sinks: tl.int32, room: tl.int32,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, M: tl.constexpr, N: tl.constexpr, BS: tl.constexpr,
    BP: tl.constexpr, BL: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Outputs [B, H, V]; the storage is written over. BS is 0 without sinks.

    Grid: (B * G,). Storage, scores and outputs are dense; at least one key is stored and there is room for one.
    """
    SCALE: tl.constexpr = K**-0.5 * LOG2_E
    index, batch, i, e, q_MK, k_K, v_V = token_rows(
        q, k, v, q_b, q_h, k_b, k_h, v_b, v_h, kv_heads, group, near_k, near_v, K, V, BK, BV, M, DOT
    )  # fmt: skip
    start = tl.load(position + batch)
    near_k += index * stored * K
    near_v += index * stored * V
    near_score += index * stored
    highest_M, total_M, o_MV = own_key(q_MK, k_K, v_V, SCALE, DOT)
    highest_M, total_M, o_MV = walk_kept(
        kept_k + index * room * K, kept_v + index * room * V, kept_score + index * room, near_k, near_v, near_score,
        tl.load(score + index), start, stored, sinks, room, i, e, q_MK, highest_M, total_M, o_MV,
        K, V, N, BP, BL, SCALE, DOT, PRECISION,
    )  # fmt: skip
    highest_M, total_M, o_MV = walk_window(
        near_k, near_v, near_k, near_v, k_K, v_V, start, stored, i, e, q_MK, highest_M, total_M, o_MV,
        K, V, N, SCALE, DOT, PRECISION,
    )  # fmt: skip
    if BS > 0:
        sink_k += index * sinks * K
        sink_v += index * sinks * V
        highest_M, total_M, o_MV = read_sinks(
            sink_k, sink_v, sink_k, sink_v, k_K, v_V, start, sinks, stored + 1, i, e, q_MK, highest_M, total_M, o_MV,
            K, V, BS, SCALE, DOT, PRECISION,
        )  # fmt: skip
    store_outputs(y, o_MV, total_M, index, group, e, V)
