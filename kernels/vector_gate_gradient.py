"""Gradients of queries, keys and log decays, for all chunks at once.

With S the state that enters a chunk, dS the gradient of the one that leaves it, U the values written (V, or beta E), dV
those of `kernels.vector_gate_walk` and dP and dM those of `kernels.vector_gate_pairs`:

    dQ' = dO S^T,  dW = U dS^T,  dK' = -dV S^T      (K' here is K exp(G))

dP and dM are passed on to q and k along the tree of `kernels.vector_gate_tree`. A log decay of token t is part of every G_i
with i >= t of its chunk and of G_C, and G_i has the gradient q dq of what reads up to token i less k dk of what is read from
there. What a token reads of itself has no decay, and stays out of those differences.

Shape legend: B batch, T time, H heads, N chunks, C tokens of a chunk, K key, V value width; KP and VP are padded widths.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels._entry import entry
from kernels.vector_gate_pairs import load_written
from kernels.vector_gate_rows import load_beta, load_rows, store_rows
from kernels.vector_gate_tree import (
    decay_exponents,
    gentle,
    in_terms,
    late_half,
    paired,
    past_from_middle,
    past_to_boundary,
    range_sums,
    to_boundary,
)


@triton.jit
def _through_states(
    do, do_stride, u, u_stride, dv, states, dstates, beta_C, i_C, d_K, left,
    V: tl.constexpr, VP: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, DELTA: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sums over values: dQ', dW, dK' [C, BK], and the rows of S dS [BK]."""
    dread_CK, dwrite_CK = tl.zeros([C, BK], tl.float32), tl.zeros([C, BK], tl.float32)
    dkey_CK = tl.zeros([C, BK], tl.float32)
    both_K = tl.zeros([BK], tl.float32)
    for first in range(0, V, BV):
        cols = first + tl.arange(0, BV)
        known = (cols < V)[None, :]
        do_CV = load_rows(do, do_stride, i_C, cols, left, V, DOT)
        u_CV = load_written(u, u_stride, beta_C, i_C, cols, left, V, DELTA, DOT)
        state_KV = tl.load(states + (d_K[:, None] * VP + cols[None, :]), mask=known, other=0.0)
        dstate_KV = tl.load(dstates + (d_K[:, None] * VP + cols[None, :]), mask=known, other=0.0)
        dread_CK = tl.dot(do_CV, tl.trans(state_KV), dread_CK, input_precision=PRECISION)
        dwrite_CK = tl.dot(u_CV, tl.trans(dstate_KV), dwrite_CK, input_precision=PRECISION)
        both_K += tl.sum(state_KV.to(tl.float32) * dstate_KV.to(tl.float32), 1)
        if DELTA:
            dv_CV = load_rows(dv, u_stride, i_C, cols, left, V, DOT)
            dkey_CK = tl.dot(dv_CV, tl.trans(state_KV), dkey_CK, input_precision=PRECISION)
    return dread_CK, dwrite_CK, -dkey_CK, both_K


@triton.jit
def _through_middle(
    q_CK, k_CK, f_CK, to_middle_CK, high_CK, low_CK, dp_CC, dm_CC, dq_CK, dk_CK, df_CK, i_C, C: tl.constexpr,
    LEVELS: tl.constexpr, DELTA: tl.constexpr, OWN: tl.constexpr, TERMS: tl.constexpr, GENTLE: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds what P and M pass on where all decays are gentle."""
    from_middle_CK = tl.where(late_half(i_C, LEVELS)[:, None], to_middle_CK, -to_middle_CK)
    late_CK, early_CK = tl.exp2(from_middle_CK), tl.exp2(-from_middle_CK)
    kd_CK, qd_CK = (k_CK * early_CK).to(DOT), (q_CK * late_CK).to(DOT)
    below_CC = i_C[:, None] > i_C[None, :]
    above_CC = i_C[:, None] < i_C[None, :]
    dq_CK += tl.dot(tl.where(below_CC, dp_CC, 0.0), kd_CK, input_precision=PRECISION) * late_CK
    col_CK = tl.dot(tl.where(above_CC, dp_CC, 0.0), qd_CK, input_precision=PRECISION)
    if DELTA:
        if OWN:
            late_CK = past_from_middle(i_C, high_CK, low_CK, C, TERMS, GENTLE)
        fd_CK = (f_CK * late_CK).to(DOT)
        df_CK += tl.dot(tl.where(below_CC, dm_CC, 0.0), kd_CK, input_precision=PRECISION) * late_CK
        col_CK = tl.dot(tl.where(above_CC, dm_CC, 0.0), fd_CK, col_CK, input_precision=PRECISION)
    return dq_CK, dk_CK + col_CK * early_CK, df_CK


@triton.jit
def _through_tree(
    q_CK, k_CK, f_CK, high_CK, low_CK, dp_CC, dm_CC, dq_CK, dk_CK, df_CK, i_C,
    LEVELS: tl.constexpr, DELTA: tl.constexpr, OWN: tl.constexpr, TERMS: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds what P and M pass on for any decays."""
    for level in range(1, LEVELS + 1):
        is_late = late_half(i_C, level)[:, None]
        decay_CK = tl.exp2(to_boundary(i_C, level, high_CK, low_CK, TERMS))
        pairs_CC = paired(i_C[:, None], i_C[None, :], level)
        mirrored_CC = paired(i_C[None, :], i_C[:, None], level)
        qd_CK = (q_CK * decay_CK).to(DOT)
        # Keys as the erasure reads them in the late half, and as they are written in the early one.
        key_decay_CK, kd_CK = decay_CK, k_CK
        if OWN:
            key_decay_CK = tl.where(is_late, tl.exp2(past_to_boundary(i_C, level, high_CK, low_CK, TERMS)), decay_CK)
            kd_CK = tl.where(is_late, f_CK, k_CK)
        kd_CK = (kd_CK * key_decay_CK).to(DOT)
        dq_CK += tl.dot(tl.where(pairs_CC, dp_CC, 0.0), kd_CK, input_precision=PRECISION) * decay_CK
        col_CK = tl.dot(tl.where(mirrored_CC, dp_CC, 0.0), qd_CK, input_precision=PRECISION)
        if DELTA:
            col_CK = tl.dot(tl.where(pairs_CC | mirrored_CC, dm_CC, 0.0), kd_CK, col_CK, input_precision=PRECISION)
            col_CK *= key_decay_CK
            df_CK += tl.where(is_late, col_CK, 0.0)
            dk_CK += tl.where(is_late, 0.0, col_CK)
        else:
            dk_CK += col_CK * decay_CK
    return dq_CK, dk_CK, df_CK


@triton.jit
def _range_sums(after_C, upto_C, x_CK, i_C, TERMS: tl.constexpr):
    """`range_sums` of an fp32 matrix."""
    PAIR: tl.constexpr = 0 if TERMS == 0 else 2
    high_CK, low_CK = in_terms(x_CK, PAIR)
    return range_sums(after_C, upto_C, high_CK, low_CK, i_C, PAIR)


@entry
def gradient_kernel(
    q, k, u, f, gate, beta, do, dv, states, dstates, dscores, dinner, dq, dk, df, dgate,
    q_b: tl.int64, q_t: tl.int32, q_h: tl.int64, k_b: tl.int64, k_t: tl.int32, k_h: tl.int64,
    u_b: tl.int64, u_t: tl.int32, u_h: tl.int64, f_b: tl.int64, f_t: tl.int32, f_h: tl.int64,
    gate_b: tl.int64, gate_t: tl.int32, gate_h: tl.int64,
    do_b: tl.int64, do_t: tl.int32, do_h: tl.int64, length: tl.int32, heads: tl.int32,
    K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    UNIT: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr, DELTA: tl.constexpr, OWN: tl.constexpr,
    TERMS: tl.constexpr, GENTLE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: (B * H * N * key tiles,); the key tiles of a chunk are neighbours and share the L2 cache. u is V or E.

    OWN says that f holds the keys of the erasure, TERMS is for `in_terms`.
    """
    TILES: tl.constexpr = KP // BK
    block, tile = (tl.program_id(0) // TILES).to(tl.int64), tl.program_id(0) % TILES
    chunks = tl.cdiv(length, C)
    head_index, n = block // chunks, (block % chunks).to(tl.int32)
    batch, head = head_index // heads, head_index % heads
    i_C, d_K = tl.arange(0, C), tile * BK + tl.arange(0, BK)
    start, left = n.to(tl.int64) * C, length - n * C
    row, state = (batch * length + start) * heads + head, block * KP * VP
    beta_C = load_beta(beta + row, heads, i_C, left) if DELTA else tl.zeros([C], tl.float32)
    dread_CK, dwrite_CK, dkey_CK, both_K = _through_states(
        do + (batch * do_b + head * do_h + start * do_t) * UNIT, do_t * UNIT,
        u + (batch * u_b + head * u_h + start * u_t) * UNIT, u_t * UNIT, dv + row * V, states + state, dstates + state,
        beta_C, i_C, d_K, left, V, VP, BK, BV, C, DELTA, DOT, PRECISION,
    )  # fmt: skip
    by_pair_CC = i_C[:, None] * C + i_C[None, :]
    dp_CC = tl.load(dscores + block * C * C + by_pair_CC)
    dm_CC = tl.load(dinner + block * C * C + by_pair_CC) if DELTA else dp_CC
    q_CK = load_rows(q + (batch * q_b + head * q_h + start * q_t) * UNIT, q_t * UNIT, i_C, d_K, left, K, DOT)
    k_CK = load_rows(k + (batch * k_b + head * k_h + start * k_t) * UNIT, k_t * UNIT, i_C, d_K, left, K, DOT)
    gate += (batch * gate_b + head * gate_h + start * gate_t) * UNIT
    high_CK, low_CK = in_terms(load_rows(gate, gate_t * UNIT, i_C, d_K, left, K, tl.float32), TERMS)
    none_C = tl.zeros_like(i_C) - 1
    g_CK = decay_exponents(none_C, i_C, high_CK, low_CK, i_C, TERMS)
    dwrite_CK *= tl.exp2(decay_exponents(i_C, none_C + C, high_CK, low_CK, i_C, TERMS))
    dq_CK, dk_CK, df_CK = dread_CK * tl.exp2(g_CK), tl.zeros([C, BK], tl.float32), tl.zeros([1, 1], tl.float32)
    f_CK = k_CK
    if OWN:
        f_CK = load_rows(f + (batch * f_b + head * f_h + start * f_t) * UNIT, f_t * UNIT, i_C, d_K, left, K, DOT)
        g_CK = decay_exponents(none_C, i_C - 1, high_CK, low_CK, i_C, TERMS)
    if DELTA:
        df_CK = dkey_CK * tl.exp2(g_CK)
    to_middle_CK = to_boundary(i_C, LEVELS, high_CK, low_CK, TERMS)
    if gentle(to_middle_CK, GENTLE):
        dq_CK, dk_CK, df_CK = _through_middle(
            q_CK, k_CK, f_CK, to_middle_CK, high_CK, low_CK, dp_CC, dm_CC, dq_CK, dk_CK, df_CK, i_C,
            C, LEVELS, DELTA, OWN, TERMS, GENTLE, DOT, PRECISION,
        )  # fmt: skip
    else:
        dq_CK, dk_CK, df_CK = _through_tree(
            q_CK, k_CK, f_CK, high_CK, low_CK, dp_CC, dm_CC, dq_CK, dk_CK, df_CK, i_C,
            LEVELS, DELTA, OWN, TERMS, DOT, PRECISION,
        )  # fmt: skip
    left_CK, dg_CK, dpast_CK = k_CK * dwrite_CK, q_CK * dq_CK - k_CK * dk_CK, f_CK * df_CK
    dgate_CK = both_K[None, :] * tl.exp2(decay_exponents(none_C, none_C + C, high_CK, low_CK, i_C, TERMS))
    if OWN:
        # What an erasure reads with its own keys has decayed up to the token before it.
        dgate_CK += _range_sums(i_C, none_C + C, dpast_CK, i_C, TERMS)
        store_rows(df + row * K, heads * K, i_C, d_K, left, df_CK, K)
    else:
        dg_CK += dpast_CK
        dk_CK += df_CK
    dgate_CK += _range_sums(none_C, i_C - 1, left_CK, i_C, TERMS) + _range_sums(i_C - 1, none_C + C, dg_CK, i_C, TERMS)
    own_C1 = tl.sum(tl.where(i_C[:, None] == i_C[None, :], dp_CC.to(tl.float32), 0.0), 1)[:, None]
    dq_CK += own_C1 * k_CK
    dk_CK += dwrite_CK + own_C1 * q_CK
    store_rows(dq + row * K, heads * K, i_C, d_K, left, dq_CK, K)
    store_rows(dk + row * K, heads * K, i_C, d_K, left, dk_CK, K)
    store_rows(dgate + row * K, heads * K, i_C, d_K, left, dgate_CK, K)
