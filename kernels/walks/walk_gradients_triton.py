"""Gradients of the walk of `kernels.walks.walk_triton`: queries walk forward, keys and values back.

Keys and values are walked together where registers allow: both read the gradient dS of the state that leaves a chunk,

    dv = exp(g - G) K dS + (Q K^T o exp(G_i - G_j))^T dO        dk = exp(g - G) V dS^T + (dO V^T o exp(G_i - G_j))^T Q

and both need q, k, v and do, which are then read once instead of twice. The gradient of the log decays follows from rowsums
that the walks form on the way: dL/dG_i = q_i . dq_i - k_i . dk_i, and log decay t is part of every G_i with i >= t.

Shape legend: B batch, T time, H heads, P pieces, C tokens of a chunk, K key, V value width.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels._entry import entry
from kernels.walks.walk_forward_triton import _walk_either
from kernels.walks.walk_triton import (
    FULL_PROBE,
    NO_GATE,
    NO_PROBE,
    SCALAR_GATE,
    SEGMENTS,
    _bounds,
    _gate_of,
    _initial,
    _load_rows,
    _log_decays,
    _place,
    _state_of,
    _state_tile,
    _walk,
)
from kernels.walks.walk_turned_triton import _walk_keys_and_values_turned

ALL, QUERIES, KEYS_AND_VALUES = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def _walk_keys_and_values(
    q, q_stride, k, k_stride, v, v_stride, do, do_stride, dk, dk_stride, dv, dv_stride,
    gate, gate_stride, state_KV, rowsum, length,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, GATE: tl.constexpr,
    PROBE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One head's reverse walk for all of dk and dv, from the gradient of the state after its last token.

    PROBE writes q . dq - k . dk for each row, without what queries read from earlier chunks, which STATE_PROBE adds. Pairs inside
    of the chunk enter both terms as the same numbers, so that they cancel exactly where sums run over a whole chunk. What later
    chunks read is v . dv as well as k . dk, and the values are at hand first.

    Returns:
        The gradient of the state before the first token.
    """
    ks = tl.arange(0, BK)
    vs = tl.arange(0, BV)
    i = tl.arange(0, C)
    seen = i[:, None] <= i[None, :]
    n_chunks = tl.cdiv(length, C)
    for n in tl.range(0, n_chunks, num_stages=STAGES):
        start = (n_chunks - 1 - n) * C
        t_C = start + i
        k_CK = _load_rows(k, k_stride, t_C, ks, length, K, DOT)
        q_CK = _load_rows(q, q_stride, t_C, ks, length, K, DOT)
        do_CV = _load_rows(do, do_stride, t_C, vs, length, V, DOT)
        v_CV = _load_rows(v, v_stride, t_C, vs, length, V, DOT)
        leaving_KV = state_KV.to(DOT)
        kq_CC = tl.dot(k_CK, tl.trans(q_CK), input_precision=PRECISION)
        vo_CC = tl.dot(v_CV, tl.trans(do_CV), input_precision=PRECISION)
        if GATE != NO_GATE:
            g_C, g_all = _log_decays(gate, gate_stride, t_C, start, length, C, GATE == SCALAR_GATE)
            read_C = tl.exp2(g_all - g_C)
            decay_CC = tl.exp2(tl.where(seen, g_C[None, :] - g_C[:, None], float("-inf")))
            kq_CC *= decay_CC
            if PROBE:
                pairs_CC = tl.where(i[:, None] == i[None, :], 0.0, kq_CC * vo_CC)
                sum_C = tl.sum(pairs_CC, 0) - tl.sum(pairs_CC, 1)
            vo_CC *= decay_CC
        else:
            kq_CC = tl.where(seen, kq_CC, 0.0)
            vo_CC = tl.where(seen, vo_CC, 0.0)
        kq_CC, vo_CC = kq_CC.to(DOT), vo_CC.to(DOT)
        t_rows, inside_C1 = t_C.to(tl.int64), (t_C < length)[:, None]
        dv_CV = tl.dot(k_CK, leaving_KV, input_precision=PRECISION)
        if GATE != NO_GATE:
            dv_CV *= read_C[:, None]
        if PROBE:
            tl.store(rowsum + t_rows, sum_C - tl.sum(dv_CV * v_CV.to(tl.float32), 1), mask=t_C < length)
        dv_CV = tl.dot(kq_CC, do_CV, dv_CV, input_precision=PRECISION)
        tl.store(dv + t_rows[:, None] * dv_stride + vs[None, :], dv_CV.to(dv.dtype.element_ty), mask=inside_C1 & (vs < V)[None, :])
        dk_CK = tl.dot(v_CV, tl.trans(leaving_KV), input_precision=PRECISION)
        write_KC = tl.trans(q_CK)
        if GATE != NO_GATE:
            dk_CK *= read_C[:, None]
            state_KV *= tl.exp2(g_all)
            write_KC = (write_KC.to(tl.float32) * tl.exp2(g_C)[None, :]).to(DOT)
        dk_CK = tl.dot(vo_CC, q_CK, dk_CK, input_precision=PRECISION)
        tl.store(dk + t_rows[:, None] * dk_stride + ks[None, :], dk_CK.to(dk.dtype.element_ty), mask=inside_C1 & (ks < K)[None, :])
        state_KV = tl.dot(write_KC, do_CV, state_KV, input_precision=PRECISION)
    return state_KV


@entry
def backward_kernel(
    q, k, v, gate, first, do, dlast, dq, dk, dv, dfirst, rowsums, starts, entering, sums, decays,
    q_b: tl.int64, q_t: tl.int64, q_h: tl.int64, k_b: tl.int64, k_t: tl.int64, k_h: tl.int64,
    v_b: tl.int64, v_t: tl.int64, v_h: tl.int64,
    do_b: tl.int64, do_t: tl.int64, do_h: tl.int64,
    length: tl.int32, batches: tl.int32, heads: tl.int32, group: tl.int32, gate_every: tl.int32,
    pieces: tl.int32, segment: tl.int32,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, TK: tl.constexpr, TV: tl.constexpr,
    ROLES: tl.constexpr, TURNED: tl.constexpr, QUERY_PROBE: tl.constexpr, UNIT: tl.constexpr, C: tl.constexpr, GATE: tl.constexpr,
    FIRST: tl.constexpr, DLAST: tl.constexpr, GATE_GRAD: tl.constexpr, PIECES: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Grid: (B * P * H * parts,), the parts of a head being neighbours that share the L2 cache.

    Parts are tiles of TK columns of dq, then all of dk and dv; ROLES tells which are launched. `rowsums` is [parts that give
    them, B, H, T]; its sum over the first axis is dL/dG. `entering` are the states before the segments, as `forward_kernel` left
    them; `sums` and `decays` are those of `segment_kernel` in reverse.
    """
    KEY_TILES: tl.constexpr = (K + TK - 1) // TK
    PARTS: tl.constexpr = KEY_TILES + 1 if ROLES == ALL else KEY_TILES if ROLES == QUERIES else 1
    part, head, piece, batch = _place(tl.program_id(0), PARTS, heads, pieces)
    if ROLES == KEYS_AND_VALUES:
        part += KEY_TILES
    begin, count = _bounds(starts, piece, segment, length, PIECES)
    wide, shared, skipped = batch.to(tl.int64), head // group, tl.cast(begin, tl.int64)
    row = (wide * length + skipped) * heads + head
    state = _state_of(batch, head, piece, heads, pieces, K * V, PIECES)
    q_base, q_stride = q + (wide * q_b + skipped * q_t + shared * q_h) * UNIT, q_t * UNIT
    k_base, k_stride = k + (wide * k_b + skipped * k_t + shared * k_h) * UNIT, k_t * UNIT
    v_base, v_stride = v + (wide * v_b + skipped * v_t + head * v_h) * UNIT, v_t * UNIT
    do_base, do_stride = do + (wide * do_b + skipped * do_t + head * do_h) * UNIT, do_t * UNIT
    gate_base = _gate_of(gate, batch, head, begin, length, heads, gate_every, GATE)
    rowsum = rowsums + ((part.to(tl.int64) * batches + batch) * heads + head) * length + begin
    if ROLES == QUERIES or (ROLES == ALL and part < KEY_TILES):
        if TURNED:
            at_q, in_q = _state_tile(part * TK, 0, V, 1, TK, BV, K, V)
        else:
            at_q, in_q = _state_tile(0, part * TK, 1, V, BV, TK, V, K)
        if PIECES == SEGMENTS:
            index = (wide * pieces + piece) * heads + head
            state_q = tl.load(entering + index * K * V + at_q, mask=in_q, other=0.0)
        else:
            state_q = _initial(first, sums, decays, batch, head, piece, heads, pieces, at_q, in_q, K * V, FIRST, PIECES, False)
        _walk_either(
            do_base, do_stride, v_base, v_stride, k_base, k_stride, dq + row * K, heads * K,
            gate_base, heads, state_q, q_base, q_stride, rowsum, count, part * TK,
            V, K, BV, TK, C, GATE, False, QUERY_PROBE, 1, TURNED, DOT, PRECISION, STAGES,
        )  # fmt: skip
    else:
        at_KV, in_KV = _state_tile(0, 0, V, 1, BK, BV, K, V)
        dstate_KV = _initial(dlast, sums, decays, batch, head, piece, heads, pieces, at_KV, in_KV, K * V, DLAST, PIECES, True)
        if TURNED:
            dstate_KV = _walk_keys_and_values_turned(
                q_base, q_stride, k_base, k_stride, v_base, v_stride, do_base, do_stride, dk + row * K, heads * K,
                dv + row * V, heads * V, gate_base, heads, dstate_KV, rowsum, count,
                K, V, BK, BV, C, GATE, GATE_GRAD, DOT, PRECISION, STAGES,
            )  # fmt: skip
        else:
            dstate_KV = _walk_keys_and_values(
                q_base, q_stride, k_base, k_stride, v_base, v_stride, do_base, do_stride, dk + row * K, heads * K,
                dv + row * V, heads * V, gate_base, heads, dstate_KV, rowsum, count,
                K, V, BK, BV, C, GATE, GATE_GRAD, DOT, PRECISION, STAGES,
            )  # fmt: skip
        if FIRST:
            tl.store(dfirst + state + at_KV, dstate_KV, mask=in_KV & ((PIECES != SEGMENTS) | (piece == 0)))


@entry
def apart_kernel(
    q, k, v, gate, first, do, dlast, dq, dk, dv, dfirst, rowsums, starts, entering, sums, decays,
    q_b: tl.int64, q_t: tl.int64, q_h: tl.int64, k_b: tl.int64, k_t: tl.int64, k_h: tl.int64,
    v_b: tl.int64, v_t: tl.int64, v_h: tl.int64,
    do_b: tl.int64, do_t: tl.int64, do_h: tl.int64,
    length: tl.int32, batches: tl.int32, heads: tl.int32, group: tl.int32, gate_every: tl.int32,
    pieces: tl.int32, segment: tl.int32,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, TK: tl.constexpr, TV: tl.constexpr,
    UNIT: tl.constexpr, C: tl.constexpr, GATE: tl.constexpr,
    FIRST: tl.constexpr, DLAST: tl.constexpr, GATE_GRAD: tl.constexpr, PIECES: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Gradients of keys and values by a walk each, where registers do not allow both; `rowsums` continues that of the queries.

    Grid: (B * P * H * parts,); parts are tiles of TK columns of dk, then tiles of TV columns of dv.
    """
    KEY_TILES: tl.constexpr = (K + TK - 1) // TK
    VALUE_TILES: tl.constexpr = (V + TV - 1) // TV
    part, head, piece, batch = _place(tl.program_id(0), KEY_TILES + VALUE_TILES, heads, pieces)
    part += KEY_TILES
    begin, count = _bounds(starts, piece, segment, length, PIECES)
    wide, shared, skipped = batch.to(tl.int64), head // group, tl.cast(begin, tl.int64)
    row = (wide * length + skipped) * heads + head
    state = _state_of(batch, head, piece, heads, pieces, K * V, PIECES)
    q_base, q_stride = q + (wide * q_b + skipped * q_t + shared * q_h) * UNIT, q_t * UNIT
    k_base, k_stride = k + (wide * k_b + skipped * k_t + shared * k_h) * UNIT, k_t * UNIT
    v_base, v_stride = v + (wide * v_b + skipped * v_t + head * v_h) * UNIT, v_t * UNIT
    do_base, do_stride = do + (wide * do_b + skipped * do_t + head * do_h) * UNIT, do_t * UNIT
    gate_base = _gate_of(gate, batch, head, begin, length, heads, gate_every, GATE)
    rowsum = rowsums + ((part.to(tl.int64) * batches + batch) * heads + head) * length + begin
    if part < 2 * KEY_TILES:
        start = (part - KEY_TILES) * TK
        at_VK, in_VK = _state_tile(0, start, 1, V, BV, TK, V, K)
        state_VK = _initial(dlast, sums, decays, batch, head, piece, heads, pieces, at_VK, in_VK, K * V, DLAST, PIECES, True)
        PROBE: tl.constexpr = FULL_PROBE if GATE_GRAD else NO_PROBE
        _walk(
            v_base, v_stride, do_base, do_stride, q_base, q_stride, dk + row * K, heads * K,
            gate_base, heads, state_VK, k_base, k_stride, rowsum, count, start,
            V, K, BV, TK, C, GATE, True, True, PROBE, -1, DOT, PRECISION, STAGES,
        )  # fmt: skip
    else:
        start = (part - 2 * KEY_TILES) * TV
        at_KV, in_KV = _state_tile(0, start, V, 1, BK, TV, K, V)
        state_KV = _initial(dlast, sums, decays, batch, head, piece, heads, pieces, at_KV, in_KV, K * V, DLAST, PIECES, True)
        state_KV, _ = _walk(
            k_base, k_stride, q_base, q_stride, do_base, do_stride, dv + row * V, heads * V,
            gate_base, heads, state_KV, q, 0, rowsum, count, start,
            K, V, BK, TV, C, GATE, True, True, NO_PROBE, 1, DOT, PRECISION, STAGES,
        )  # fmt: skip
        if FIRST:
            tl.store(dfirst + state + at_KV, state_KV, mask=in_KV & ((PIECES != SEGMENTS) | (piece == 0)))


@entry
def sum_heads_kernel(
    dq_heads, dk_heads, dq, dk, rows: tl.int32, group: tl.int32,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Sums of dq and dk over the heads of each group, from [B * T * G, R, K] to [B * T * G, K]. Grid: (2 * blocks of rows,)."""
    source, target = dq_heads, dq
    if tl.program_id(0) % 2 == 1:
        source, target = dk_heads, dk
    row_R = (tl.program_id(0) // 2 * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    col_K = tl.arange(0, BLOCK)
    inside_RK = (row_R < rows)[:, None] & (col_K < WIDTH)[None, :]
    sum_RK = tl.zeros([ROWS, BLOCK], tl.float32)
    for head in range(group):
        place_RK = (row_R * group + head)[:, None] * WIDTH + col_K[None, :]
        sum_RK += tl.load(source + place_RK, mask=inside_RK, other=0.0).to(tl.float32)
    tl.store(target + row_R[:, None] * WIDTH + col_K[None, :], sum_RK.to(target.dtype.element_ty), mask=inside_RK)
