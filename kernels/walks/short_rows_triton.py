"""Short rows of tokens without states: every tile of tokens by itself, forward and all of its gradients.

A walk has a program a head, which waits for its chunks one after the other; the rows of small models are a few chunks long.
Here a program owns a tile and finds what `kernels.walks.walk_triton` carries: the state S of all tokens before it, and the
gradient dS of that state behind it, each a product for each other tile, whose rows the L2 cache has for its neighbours.

    o  = exp(G) Q S    + (Q K^T o D) V           D_ij = exp(G_i - G_j) for i >= j, else 0
    dq = exp(G) dO S^T + (dO V^T o D) K          dk = exp(g - G) V dS^T + (dO V^T o D)^T Q
                                                 dv = exp(g - G) K dS   + (Q K^T o D)^T dO

Log decay t takes part in what keys before t give to queries from t on: to those of the tile, of later ones and from earlier ones,
and exp(g) S . dS, from before the tile to behind it. So its gradient is a sum over the tile, in which nothing has to cancel.

Shape legend: B batch, T time, H heads, C tokens of a tile, K key, V value width.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels._entry import entry
from kernels.walks.walk_triton import (
    NO_GATE,
    NO_PROBE,
    SCALAR_GATE,
    _gate_of,
    _load_rows,
    _log_decays,
    _place,
    _walk,
)


@triton.jit
def _decayed(g_C, i, C: tl.constexpr):
    """What a query i gets of key j, [C, C]: zero of later ones, whose exponents would overflow."""
    return tl.exp2(tl.where(i[:, None] >= i[None, :], g_C[:, None] - g_C[None, :], float("-inf")))


@triton.jit
def _state(
    b, b_stride, c, c_stride, gate, heads, length, start,
    D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, C: tl.constexpr, GATE: tl.constexpr,
    REVERSE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """What rows b and columns `start` on of c add up to, decayed to the end of the rows or in reverse to their start."""
    state, _ = _walk(
        b, 0, b, b_stride, c, c_stride, b, 0, gate, heads, tl.zeros([BD, BE], tl.float32), b, 0, b, length, start,
        D, E, BD, BE, C, GATE, REVERSE, False, NO_PROBE, 1, DOT, PRECISION, STAGES,
    )  # fmt: skip
    return state


@triton.jit
def _store_rows(base, heads, x_CD, t_C, cols, length, WIDTH: tl.constexpr):
    """Rows t_C of a head of a contiguous tensor [T, H, WIDTH]."""
    at_CD = t_C.to(tl.int64)[:, None] * heads * WIDTH + cols[None, :]
    tl.store(base + at_CD, x_CD.to(base.dtype.element_ty), mask=(t_C < length)[:, None] & (cols < WIDTH)[None, :])


@entry
def forward_kernel(
    q, k, v, gate, o,
    q_b: tl.int64, q_t: tl.int64, q_h: tl.int64, k_b: tl.int64, k_t: tl.int64, k_h: tl.int64,
    v_b: tl.int64, v_t: tl.int64, v_h: tl.int64,
    length: tl.int32, heads: tl.int32, group: tl.int32, gate_every: tl.int32,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, UNIT: tl.constexpr, C: tl.constexpr,
    GATE: tl.constexpr, ALONE: tl.constexpr, STEP: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Grid: (B * H * tiles * tiles of BV columns,). Strides count UNIT elements."""
    COLUMNS: tl.constexpr = (V + BV - 1) // BV
    column, tile, _, rest = _place(tl.program_id(0), COLUMNS, tl.cdiv(length, C), 1)
    head, batch = rest % heads, rest // heads
    wide, start, i = batch.to(tl.int64), tile * C, tl.arange(0, C)
    ks, vs, t_C = tl.arange(0, BK), column * BV + tl.arange(0, BV), start + i
    q += (wide * q_b + head // group * q_h) * UNIT
    k += (wide * k_b + head // group * k_h) * UNIT
    v += (wide * v_b + head * v_h) * UNIT
    o += (wide * length * heads + head) * V
    gate = _gate_of(gate, batch, head, 0, length, heads, gate_every, GATE)
    q_CK = _load_rows(q, q_t * UNIT, t_C, ks, length, K, DOT)
    k_CK = _load_rows(k, k_t * UNIT, t_C, ks, length, K, DOT)
    v_CV = _load_rows(v, v_t * UNIT, t_C, vs, length, V, DOT)
    o_CV = tl.zeros([C, BV], tl.float32)
    if not ALONE:
        state_KV = _state(
            k, k_t * UNIT, v, v_t * UNIT, gate, heads, start, column * BV, K, V, BK, BV, STEP, GATE, False, DOT, PRECISION, STAGES
        )
        o_CV = tl.dot(q_CK, state_KV.to(DOT), input_precision=PRECISION)
    qk_CC = tl.dot(q_CK, tl.trans(k_CK), input_precision=PRECISION)
    if GATE != NO_GATE:
        g_C, _ = _log_decays(gate, heads, t_C, start, length, C, GATE == SCALAR_GATE)
        qk_CC *= _decayed(g_C, i, C)
        if not ALONE:
            o_CV *= tl.exp2(g_C)[:, None]
    else:
        qk_CC = tl.where(i[:, None] >= i[None, :], qk_CC, 0.0)
    o_CV = tl.dot(qk_CC.to(DOT), v_CV, o_CV, input_precision=PRECISION)
    _store_rows(o, heads, o_CV, t_C, vs, length, V)


@triton.jit
def _backward_of_head(
    q, q_stride, k, k_stride, v, v_stride, do, do_stride, gate, gate_stride, dq, dv, dgate,
    q_CK, k_CK, dq_CK, dk_CK, length, start,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    GATE: tl.constexpr, GATE_GRAD: tl.constexpr, ALONE: tl.constexpr, SHARED: tl.constexpr, STEP: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Adds what a tile of a head gives to queries and keys, stores the gradients of its values and decays.

    One after the other, as far as registers hold: first queries, which are stored unless heads share them, then what later tiles
    read of keys and values.
    """
    i = tl.arange(0, C)
    t_C, ks, vs = start + i, tl.arange(0, BK), tl.arange(0, BV)
    do_CV = _load_rows(do, do_stride, t_C, vs, length, V, DOT)
    v_CV = _load_rows(v, v_stride, t_C, vs, length, V, DOT)
    if not ALONE:
        state_KV = _state(
            k, k_stride, v, v_stride, gate, gate_stride, start, 0, K, V, BK, BV, STEP, GATE, False, DOT, PRECISION, STAGES
        ).to(DOT)
        read_CK = tl.dot(do_CV, tl.trans(state_KV), input_precision=PRECISION)
    ov_CC = tl.dot(do_CV, tl.trans(v_CV), input_precision=PRECISION)
    qk_CC = tl.dot(q_CK, tl.trans(k_CK), input_precision=PRECISION)
    if GATE != NO_GATE:
        g_C, g_all = _log_decays(gate, gate_stride, t_C, start, length, C, GATE == SCALAR_GATE)
        decay_CC = _decayed(g_C, i, C)
        qk_CC *= decay_CC
        if not ALONE:
            read_CK *= tl.exp2(g_C)[:, None]
        if GATE_GRAD:
            pairs_CC = tl.where(i[:, None] == i[None, :], 0.0, qk_CC * ov_CC)
            sum_C = tl.sum(pairs_CC, 1) - tl.sum(pairs_CC, 0)
            if not ALONE:
                sum_C += tl.sum(read_CK * q_CK.to(tl.float32), 1)
            sum_C = tl.cumsum(sum_C, 0, reverse=True)
        ov_CC *= decay_CC
    else:
        seen_CC = i[:, None] >= i[None, :]
        qk_CC = tl.where(seen_CC, qk_CC, 0.0)
        ov_CC = tl.where(seen_CC, ov_CC, 0.0)
    qk_CC, ov_CC = qk_CC.to(DOT), ov_CC.to(DOT)
    if not ALONE:
        dq_CK = dq_CK + read_CK if SHARED else read_CK
    dq_CK = tl.dot(ov_CC, k_CK, dq_CK, input_precision=PRECISION)
    if not SHARED:
        _store_rows(dq, gate_stride, dq_CK, t_C, ks, length, K)
    dv_CV = tl.zeros([C, BV], tl.float32)
    if not ALONE:
        end = tl.minimum(start + C, length)
        later, later_gate = end.to(tl.int64), gate
        if GATE == SCALAR_GATE:
            later_gate += later * gate_stride
        dstate_KV = _state(
            q + later * q_stride, q_stride, do + later * do_stride, do_stride, later_gate, gate_stride, length - end, 0,
            K, V, BK, BV, STEP, GATE, True, DOT, PRECISION, STAGES,
        )  # fmt: skip
        if GATE_GRAD:
            sum_C += tl.exp2(g_all) * tl.sum(state_KV.to(tl.float32) * dstate_KV)
        dstate_KV = dstate_KV.to(DOT)
        dv_CV = tl.dot(k_CK, dstate_KV, input_precision=PRECISION)
        if GATE != NO_GATE:
            dv_CV *= tl.exp2(g_all - g_C)[:, None]
        if GATE_GRAD:
            kept_C = tl.sum(dv_CV * v_CV.to(tl.float32), 1)
            sum_C += tl.cumsum(kept_C, 0) - kept_C
    if GATE_GRAD:
        tl.store(dgate + t_C * gate_stride, sum_C, mask=t_C < length)
    dv_CV = tl.dot(tl.trans(qk_CC), do_CV, dv_CV, input_precision=PRECISION)
    _store_rows(dv, gate_stride, dv_CV, t_C, vs, length, V)
    if not ALONE:
        kept_CK = tl.dot(v_CV, tl.trans(dstate_KV), input_precision=PRECISION)
        if GATE != NO_GATE:
            kept_CK *= tl.exp2(g_all - g_C)[:, None]
        dk_CK = dk_CK + kept_CK if SHARED else kept_CK
    return dq_CK, tl.dot(tl.trans(ov_CC), q_CK, dk_CK, input_precision=PRECISION)


@entry
def backward_kernel(
    q, k, v, gate, do, dq, dk, dv, dgate,
    q_b: tl.int64, q_t: tl.int64, q_h: tl.int64, k_b: tl.int64, k_t: tl.int64, k_h: tl.int64,
    v_b: tl.int64, v_t: tl.int64, v_h: tl.int64, do_b: tl.int64, do_t: tl.int64, do_h: tl.int64,
    length: tl.int32, heads: tl.int32, group: tl.int32, gate_every: tl.int32,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, UNIT: tl.constexpr, C: tl.constexpr,
    GATE: tl.constexpr, GATE_GRAD: tl.constexpr, ALONE: tl.constexpr, SHARED: tl.constexpr, STEP: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Gradients of queries and keys [B, T, G, K], of values, and of each token's log decay [B, T, H].

    Grid: (B * G * tiles,); with SHARED a program goes through the heads of its group. Strides count UNIT elements.
    """
    groups = heads // group
    tile, shared, _, batch = _place(tl.program_id(0), tl.cdiv(length, C), groups, 1)
    wide, start = batch.to(tl.int64), tile * C
    ks, t_C = tl.arange(0, BK), start + tl.arange(0, C)
    q += (wide * q_b + shared * q_h) * UNIT
    k += (wide * k_b + shared * k_h) * UNIT
    dq += (wide * length * groups + shared) * K
    dk += (wide * length * groups + shared) * K
    q_CK = _load_rows(q, q_t * UNIT, t_C, ks, length, K, DOT)
    k_CK = _load_rows(k, k_t * UNIT, t_C, ks, length, K, DOT)
    dq_CK, dk_CK = tl.zeros([C, BK], tl.float32), tl.zeros([C, BK], tl.float32)
    if SHARED:
        for head in range(shared * group, shared * group + group):
            row = wide * length * heads + head
            dq_CK, dk_CK = _backward_of_head(
                q, q_t * UNIT, k, k_t * UNIT, v + (wide * v_b + head * v_h) * UNIT, v_t * UNIT,
                do + (wide * do_b + head * do_h) * UNIT, do_t * UNIT,
                _gate_of(gate, batch, head, 0, length, heads, gate_every, GATE), heads, dq, dv + row * V, dgate + row,
                q_CK, k_CK, dq_CK, dk_CK, length, start,
                K, V, BK, BV, C, GATE, GATE_GRAD, ALONE, SHARED, STEP, DOT, PRECISION, STAGES,
            )  # fmt: skip
        _store_rows(dq, groups, dq_CK, t_C, ks, length, K)
    else:
        row = wide * length * heads + shared
        _, dk_CK = _backward_of_head(
            q, q_t * UNIT, k, k_t * UNIT, v + (wide * v_b + shared * v_h) * UNIT, v_t * UNIT,
            do + (wide * do_b + shared * do_h) * UNIT, do_t * UNIT,
            _gate_of(gate, batch, shared, 0, length, heads, gate_every, GATE), heads, dq, dv + row * V, dgate + row,
            q_CK, k_CK, dq_CK, dk_CK, length, start,
            K, V, BK, BV, C, GATE, GATE_GRAD, ALONE, SHARED, STEP, DOT, PRECISION, STAGES,
        )  # fmt: skip
    _store_rows(dk, groups, dk_CK, t_C, ks, length, K)


@entry
def pairs_kernel(
    q, k, v, gate, o,
    q_b: tl.int64, q_t: tl.int64, q_h: tl.int64, k_b: tl.int64, k_t: tl.int64, k_h: tl.int64,
    v_b: tl.int64, v_t: tl.int64, v_h: tl.int64,
    length: tl.int32, heads: tl.int32, group: tl.int32, gate_every: tl.int32,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, UNIT: tl.constexpr, C: tl.constexpr, N: tl.constexpr,
    GATE: tl.constexpr, ALONE: tl.constexpr, STEP: tl.constexpr, MOST: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The outputs of C tokens from all pairs with tokens up to them, N at once; decays are summed from the start of the row."""
    COLUMNS: tl.constexpr = (V + BV - 1) // BV
    column, tile, _, rest = _place(tl.program_id(0), COLUMNS, tl.cdiv(length, C), 1)
    head, batch = rest % heads, rest // heads
    wide, start = batch.to(tl.int64), tile * C
    ks, vs, t_C = tl.arange(0, BK), column * BV + tl.arange(0, BV), start + tl.arange(0, C)
    q += (wide * q_b + head // group * q_h) * UNIT
    k += (wide * k_b + head // group * k_h) * UNIT
    v += (wide * v_b + head * v_h) * UNIT
    o += (wide * length * heads + head) * V
    gate = _gate_of(gate, batch, head, 0, length, heads, gate_every, GATE)
    end = tl.minimum(start + C, length)
    q_CK = _load_rows(q, q_t * UNIT, t_C, ks, length, K, DOT)
    if GATE != NO_GATE:
        g_C, _ = _log_decays(gate, heads, t_C, start, length, C, GATE == SCALAR_GATE)
        if GATE == SCALAR_GATE:
            earlier = tl.arange(0, MOST)
            g_C += tl.sum(tl.load(gate + earlier.to(tl.int64) * heads, mask=earlier < start, other=0.0) * 1.4426950408889634, 0)
        else:
            g_C += tl.load(gate) * 1.4426950408889634 * start
    before = tl.zeros([], tl.float32)
    o_CV = tl.zeros([C, BV], tl.float32)
    for first in tl.range(0, end, N, num_stages=STAGES):
        t_N = first + tl.arange(0, N)
        k_NK = _load_rows(k, k_t * UNIT, t_N, ks, end, K, DOT)
        v_NV = _load_rows(v, v_t * UNIT, t_N, vs, end, V, DOT)
        qk_CN = tl.dot(q_CK, tl.trans(k_NK), input_precision=PRECISION)
        seen_CN = t_C[:, None] >= t_N[None, :]
        if GATE != NO_GATE:
            g_N, g_all = _log_decays(gate, heads, t_N, first, length, N, GATE == SCALAR_GATE)
            qk_CN *= tl.exp2(tl.where(seen_CN, g_C[:, None] - (before + g_N)[None, :], float("-inf")))
            before += g_all
        else:
            qk_CN = tl.where(seen_CN, qk_CN, 0.0)
        o_CV = tl.dot(qk_CN.to(DOT), v_NV, o_CV, input_precision=PRECISION)
    _store_rows(o, heads, o_CV, t_C, vs, length, V)
