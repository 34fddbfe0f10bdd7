"""Gradients of queries, keys and log decays, for all chunks at once.

With S_m the state of a chunk and dS_m its gradient, both about the middle (`kernels.vector_gate_walk`), U the values written
(V, or beta E) and dV those of the reverse walk, P and M pass on dP = tril(dO U^T) and dM = -tril(dV U^T, -1), and

    dQ' = dO S_m^T + dP W,    dK' = -dV S_m^T + dM W,    dW = U dS_m^T + dP^T Q' + dM^T K'

A rough chunk passes dP and dM on along the tree of `kernels.vector_gate_tree` instead. Both triangles of dP and dM are products
of their own: on Hopper, Triton 3.4 to 3.7 miscompile a product whose left operand is a transposed accumulator.

A log decay of token t is part of every G_i with i >= t of its chunk and of G_C, and G_i has the gradient q dq of what reads up to
token i less k dk of what is read from there; what the state behind the chunk gets from token j passes the decays after j. With
x = W o U dS_m^T and y = Q' o dQ' + K' o dK' - W o (dP^T Q' + dM^T K'),

    dg_t = sum_{j < t} x_j + sum_{i >= t} y_i + rowsum(carry S_m o dS_m)

No sum runs over the sequence.

Shape legend: B batch, T time, H heads, N chunks, C tokens of a chunk, K key, V value width; KP and VP are padded widths.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.vector_gate_middle import load_factors, load_gates, reads_and_writes
from kernels.vector_gate_rows import load_beta, load_rows, store_rows
from kernels.vector_gate_tree import LOG2_E, in_terms, late_half, paired, past_to_boundary, range_sums, to_boundary


@triton.jit
def _over_values(
    do, do_t, u, u_t, dv, dv_t, states, dstates, beta_C, i_C, d_K, left,
    V: tl.constexpr, VP: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, DELTA: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Sums over values: dO S_m^T, U dS_m^T, -dV S_m^T [C, BK], rows of S_m o dS_m [BK], dP and its transpose, dM and its [C, C]."""
    dread_CK, dwrite_CK, derase_CK = tl.zeros([C, BK], tl.float32), tl.zeros([C, BK], tl.float32), tl.zeros([C, BK], tl.float32)
    dp_CC, dp_T_CC = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32)
    dm_CC, dm_T_CC = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32)
    both_K = tl.zeros([BK], tl.float32)
    for first in tl.range(0, V, BV, num_stages=STAGES):
        cols = first + tl.arange(0, BV)
        known = (cols < V)[None, :]
        do_CV = load_rows(do, do_t, i_C, cols, left, V, DOT)
        u_CV = load_rows(u, u_t, i_C, cols, left, V, DOT)
        state_KV = tl.load(states + (d_K[:, None] * VP + cols[None, :]), mask=known, other=0.0)
        dstate_KV = tl.load(dstates + (d_K[:, None] * VP + cols[None, :]), mask=known, other=0.0)
        if DELTA:
            u_CV = (u_CV * beta_C[:, None]).to(DOT)
        dread_CK = tl.dot(do_CV, tl.trans(state_KV), dread_CK, input_precision=PRECISION)
        dwrite_CK = tl.dot(u_CV, tl.trans(dstate_KV), dwrite_CK, input_precision=PRECISION)
        dp_CC = tl.dot(do_CV, tl.trans(u_CV), dp_CC, input_precision=PRECISION)
        dp_T_CC = tl.dot(u_CV, tl.trans(do_CV), dp_T_CC, input_precision=PRECISION)
        both_K += tl.sum(state_KV.to(tl.float32) * dstate_KV.to(tl.float32), 1)
        if DELTA:
            dv_CV = load_rows(dv, dv_t, i_C, cols, left, V, DOT)
            derase_CK = tl.dot(dv_CV, tl.trans(state_KV), derase_CK, input_precision=PRECISION)
            dm_CC = tl.dot(dv_CV, tl.trans(u_CV), dm_CC, input_precision=PRECISION)
            dm_T_CC = tl.dot(u_CV, tl.trans(dv_CV), dm_T_CC, input_precision=PRECISION)
    below_CC, above_CC = i_C[:, None] >= i_C[None, :], i_C[:, None] <= i_C[None, :]
    dp_CC, dp_T_CC = tl.where(below_CC, dp_CC, 0.0), tl.where(above_CC, dp_T_CC, 0.0)
    other_CC = i_C[:, None] != i_C[None, :]
    dm_CC, dm_T_CC = tl.where(below_CC & other_CC, -dm_CC, 0.0), tl.where(above_CC & other_CC, -dm_T_CC, 0.0)
    return dread_CK, dwrite_CK, -derase_CK, both_K, dp_CC, dp_T_CC.to(DOT), dm_CC.to(DOT), dm_T_CC.to(DOT)


@triton.jit
def _through_tree(
    q_CK, k_CK, f_CK, high_CK, low_CK, dp_CC, dp_T_CC, dm_CC, dm_T_CC, dq_CK, dk_CK, df_CK, i_C,
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
        col_CK = tl.dot(tl.where(mirrored_CC, dp_T_CC, 0.0), qd_CK, input_precision=PRECISION)
        if DELTA:
            col_CK = tl.dot(tl.where(pairs_CC, dm_CC, tl.where(mirrored_CC, dm_T_CC, 0.0)), kd_CK, col_CK, input_precision=PRECISION)
            col_CK *= key_decay_CK
            df_CK += tl.where(is_late, col_CK, 0.0)
            dk_CK += tl.where(is_late, 0.0, col_CK)
        else:
            dk_CK += col_CK * decay_CK
    return dq_CK, dk_CK, df_CK


@triton.jit
def gradient_kernel(
    q, k, f, gate, u, do, beta, dv, rough, factors, reads, writes, erases, states, dstates, dq, dk, df, dgate,
    q_b: tl.int64, q_t: tl.int32, q_h: tl.int64, k_b: tl.int64, k_t: tl.int32, k_h: tl.int64,
    f_b: tl.int64, f_t: tl.int32, f_h: tl.int64, gate_b: tl.int64, gate_t: tl.int32, gate_h: tl.int64,
    u_b: tl.int64, u_t: tl.int32, u_h: tl.int64,
    do_b: tl.int64, do_t: tl.int32, do_h: tl.int64, length: tl.int32, heads: tl.int32,
    K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    UNIT: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr, DELTA: tl.constexpr, OWN: tl.constexpr,
    TERMS: tl.constexpr, SPLIT: tl.constexpr, TREE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Grid: (B * H * N * key tiles,); the key tiles of a chunk are neighbours and share the L2 cache. u is V or E.

    TREE is for the rough chunks, a launch without it takes the others. OWN says that f holds the keys of the erasure, TERMS and SPLIT are for `in_terms` of log decays and of their gradients.
    """
    TILES: tl.constexpr = KP // BK
    block, tile = (tl.program_id(0) // TILES).to(tl.int64), tl.program_id(0) % TILES
    chunks = tl.cdiv(length, C)
    head_index, n = block // chunks, (block % chunks).to(tl.int32)
    batch, head = head_index // heads, head_index % heads
    i_C, d_K = tl.arange(0, C), tile * BK + tl.arange(0, BK)
    start, left = n.to(tl.int64) * C, length - n * C
    row, state = (batch * length + start) * heads + head, block * KP * VP
    if (tl.load(rough + block) != 0) == TREE:
        beta_C = load_beta(beta + row, heads, i_C, left) if DELTA else tl.zeros([C], tl.float32)
        dread_CK, dwrite_CK, derase_CK, both_K, dp_CC, dp_T_CC, dm_CC, dm_T_CC = _over_values(
            do + (batch * do_b + head * do_h + start * do_t) * UNIT, do_t * UNIT,
            u + (batch * u_b + head * u_h + start * u_t) * UNIT, u_t * UNIT, dv + row * V, heads * V, states + state, dstates + state,
            beta_C, i_C, d_K, left, V, VP, BK, BV, C, DELTA, DOT, PRECISION, STAGES,
        )  # fmt: skip
        gate_CK = load_gates(gate + (batch * gate_b + head * gate_h + start * gate_t) * UNIT, gate_t * UNIT, i_C, d_K, left, K, TERMS)
        since_CK, until_CK = reads_and_writes(gate_CK, i_C, C, TERMS, TREE)
        past_CK = since_CK
        if OWN:
            past_CK = since_CK - gate_CK * LOG2_E
        since_CK, until_CK, past_CK = tl.exp2(since_CK), tl.exp2(until_CK), tl.exp2(past_CK)
        if TREE:
            q_CK = load_rows(q + (batch * q_b + head * q_h + start * q_t) * UNIT, q_t * UNIT, i_C, d_K, left, K, DOT)
            k_CK = load_rows(k + (batch * k_b + head * k_h + start * k_t) * UNIT, k_t * UNIT, i_C, d_K, left, K, DOT)
            f_CK = k_CK
            if OWN:
                f_CK = load_rows(f + (batch * f_b + head * f_h + start * f_t) * UNIT, f_t * UNIT, i_C, d_K, left, K, DOT)
            own_C1 = tl.sum(tl.where(i_C[:, None] == i_C[None, :], dp_CC, 0.0), 1)[:, None]
            high_CK, low_CK = in_terms(gate_CK, TERMS)
            dq_CK, dk_CK, df_CK = dread_CK * since_CK, tl.zeros([C, BK], tl.float32), derase_CK * past_CK
            dq_CK, dk_CK, df_CK = _through_tree(
                q_CK, k_CK, f_CK, high_CK, low_CK, dp_CC.to(DOT), dp_T_CC, dm_CC, dm_T_CC, dq_CK, dk_CK, df_CK, i_C,
                LEVELS, DELTA, OWN, TERMS, DOT, PRECISION,
            )  # fmt: skip
            dwrite_CK *= until_CK
            x_CK, y_CK, past_y_CK = k_CK * dwrite_CK, q_CK * dq_CK - k_CK * dk_CK, f_CK * df_CK
            dq_CK += own_C1 * k_CK
            dk_CK += dwrite_CK + own_C1 * q_CK
        else:
            by_key_CK = block * C * KP + (i_C[:, None] * KP + d_K[None, :])
            qd_CK, kd_CK = tl.load(reads + by_key_CK), tl.load(writes + by_key_CK)
            dread_CK = tl.dot(dp_CC.to(DOT), kd_CK, dread_CK, input_precision=PRECISION)
            back_CK = tl.dot(dp_T_CC, qd_CK, input_precision=PRECISION)
            past_y_CK = derase_CK
            if DELTA:
                fd_CK = tl.load(erases + by_key_CK)
                derase_CK = tl.dot(dm_CC, kd_CK, derase_CK, input_precision=PRECISION)
                back_CK = tl.dot(dm_T_CC, fd_CK, back_CK, input_precision=PRECISION)
                past_y_CK = fd_CK * derase_CK
            x_CK, y_CK = kd_CK * dwrite_CK, qd_CK * dread_CK - kd_CK * back_CK
            dq_CK, dk_CK, df_CK = dread_CK * since_CK, (dwrite_CK + back_CK) * until_CK, derase_CK * past_CK
        _, carry_K, _ = load_factors(factors, block, d_K, KP)
        if OWN:
            # What an erasure reads with its own keys has decayed up to the token before it.
            later_K = tl.sum(y_CK + past_y_CK, 0)
            x_CK, y_CK = x_CK - y_CK - past_y_CK, -past_y_CK
            store_rows(df + row * K, heads * K, i_C, d_K, left, df_CK, K)
        else:
            if DELTA:
                y_CK += past_y_CK
                dk_CK += df_CK
            later_K = tl.sum(y_CK, 0)
            x_CK -= y_CK
            y_CK = tl.zeros([C, BK], tl.float32)
        high_CK, low_CK = in_terms(x_CK, SPLIT)
        dgate_CK = range_sums(tl.zeros_like(i_C) - 1, i_C - 1, high_CK, low_CK, i_C, SPLIT) + y_CK + (later_K + both_K * carry_K)[None, :]
        store_rows(dq + row * K, heads * K, i_C, d_K, left, dq_CK, K)
        store_rows(dk + row * K, heads * K, i_C, d_K, left, dk_CK, K)
        store_rows(dgate + row * K, heads * K, i_C, d_K, left, dgate_CK, K)
