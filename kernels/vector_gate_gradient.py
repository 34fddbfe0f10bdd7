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

from kernels.vector_gate_pairs import load_written
from kernels.vector_gate_rows import load_beta, load_rows, store_rows
from kernels.vector_gate_tree import at_boundary, gentle, late_half, paired, past_late


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
    q_CK, k_CK, f_CK, g_CK, past_CK, middle_1K, dp_CC, dm_CC, dq_CK, dk_CK, df_CK, i_C,
    DELTA: tl.constexpr, OWN: tl.constexpr, GENTLE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`_through_scores` where all decays are gentle."""
    late_CK, early_CK = tl.exp2(g_CK - middle_1K), tl.exp2(middle_1K - g_CK)
    kd_CK, qd_CK = (k_CK * early_CK).to(DOT), (q_CK * late_CK).to(DOT)
    below_CC = i_C[:, None] > i_C[None, :]
    above_CC = i_C[:, None] < i_C[None, :]
    dq_CK += tl.dot(tl.where(below_CC, dp_CC, 0.0), kd_CK, input_precision=PRECISION) * late_CK
    col_CK = tl.dot(tl.where(above_CC, dp_CC, 0.0), qd_CK, input_precision=PRECISION)
    if DELTA:
        if OWN:
            late_CK = past_late(past_CK, middle_1K, GENTLE)
        fd_CK = (f_CK * late_CK).to(DOT)
        df_CK += tl.dot(tl.where(below_CC, dm_CC, 0.0), kd_CK, input_precision=PRECISION) * late_CK
        col_CK = tl.dot(tl.where(above_CC, dm_CC, 0.0), fd_CK, col_CK, input_precision=PRECISION)
    return dq_CK, dk_CK + col_CK * early_CK, df_CK


@triton.jit
def _through_tree(
    q_CK, k_CK, f_CK, g_CK, past_CK, decays, row_stride, dp_CC, dm_CC, dq_CK, dk_CK, df_CK, i_C,
    LEVELS: tl.constexpr, DELTA: tl.constexpr, OWN: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`_through_scores` for any decays."""
    for level in range(1, LEVELS + 1):
        is_late = late_half(i_C, level)[:, None]
        boundary_CK = at_boundary(decays, row_stride, i_C, level)
        decay_CK = tl.exp2(tl.where(is_late, g_CK - boundary_CK, boundary_CK - g_CK))
        pairs_CC = paired(i_C[:, None], i_C[None, :], level)
        mirrored_CC = paired(i_C[None, :], i_C[:, None], level)
        qd_CK = (q_CK * decay_CK).to(DOT)
        # Keys as the erasure reads them in the late half, and as they are written in the early one.
        key_decay_CK, kd_CK = decay_CK, k_CK
        if OWN:
            key_decay_CK = tl.exp2(tl.where(is_late, past_CK - boundary_CK, boundary_CK - g_CK))
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
def _through_scores(
    q_CK, k_CK, f_CK, g_CK, past_CK, middle_1K, decays, row_stride, dp_CC, dm_CC, dq_CK, dk_CK, df_CK, i_C,
    LEVELS: tl.constexpr, DELTA: tl.constexpr, OWN: tl.constexpr, GENTLE: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds what P and M pass on to q, to k as it is written, and to the keys of the erasure; dP and dM are symmetric."""
    if gentle(g_CK - middle_1K, GENTLE):
        dq_CK, dk_CK, df_CK = _through_middle(
            q_CK, k_CK, f_CK, g_CK, past_CK, middle_1K, dp_CC, dm_CC, dq_CK, dk_CK, df_CK, i_C,
            DELTA, OWN, GENTLE, DOT, PRECISION,
        )  # fmt: skip
    else:
        dq_CK, dk_CK, df_CK = _through_tree(
            q_CK, k_CK, f_CK, g_CK, past_CK, decays, row_stride, dp_CC, dm_CC, dq_CK, dk_CK, df_CK, i_C,
            LEVELS, DELTA, OWN, DOT, PRECISION,
        )  # fmt: skip
    return dq_CK, dk_CK, df_CK


@triton.jit
def gradient_kernel(
    q, k, u, f, beta, do, dv, states, dstates, dscores, dinner, decays, dq, dk, df, dgate,
    q_b: tl.int64, q_t: tl.int32, q_h: tl.int64, k_b: tl.int64, k_t: tl.int32, k_h: tl.int64,
    u_b: tl.int64, u_t: tl.int32, u_h: tl.int64, f_b: tl.int64, f_t: tl.int32, f_h: tl.int64,
    do_b: tl.int64, do_t: tl.int32, do_h: tl.int64, length: tl.int32, heads: tl.int32,
    K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    UNIT: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr, DELTA: tl.constexpr, OWN: tl.constexpr,
    GENTLE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: (B * H * N * key tiles,); the key tiles of a chunk are neighbours and share the L2 cache. u is V or E.

    decays holds the cumulated log2 decays, [B, H, N, C, KP]. OWN says that f holds the keys of the erasure.
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
    q += (batch * q_b + head * q_h + start * q_t) * UNIT
    k += (batch * k_b + head * k_h + start * k_t) * UNIT
    f += (batch * f_b + head * f_h + start * f_t) * UNIT
    decays += block * C * KP + d_K[None, :]
    q_CK = load_rows(q, q_t * UNIT, i_C, d_K, left, K, DOT)
    k_CK = load_rows(k, k_t * UNIT, i_C, d_K, left, K, DOT)
    g_CK, last_1K = tl.load(decays + i_C[:, None] * KP), tl.load(decays + (C - 1) * KP)
    f_CK, past_CK, df_CK = k_CK, g_CK, tl.zeros([1, 1], tl.float32)
    if OWN:
        f_CK = load_rows(f, f_t * UNIT, i_C, d_K, left, K, DOT)
        past_CK = tl.load(decays + (i_C[:, None] - 1) * KP, mask=i_C[:, None] > 0, other=0.0)
    if DELTA:
        df_CK = dkey_CK * tl.exp2(past_CK)
    own_C1 = tl.sum(tl.where(i_C[:, None] == i_C[None, :], dp_CC.to(tl.float32), 0.0), 1)[:, None]
    dwrite_CK *= tl.exp2(last_1K - g_CK)
    dlast_1K = tl.sum(k_CK * dwrite_CK, 0)[None, :] + both_K[None, :] * tl.exp2(last_1K)
    dq_CK, dk_CK, df_CK = _through_scores(
        q_CK, k_CK, f_CK, g_CK, past_CK, tl.load(decays + (C // 2 - 1) * KP), decays + i_C[:, None] * KP, KP, dp_CC, dm_CC,
        dread_CK * tl.exp2(g_CK), dwrite_CK, df_CK, i_C, LEVELS, DELTA, OWN, GENTLE, DOT, PRECISION,
    )  # fmt: skip
    # What an erasure reads with its own keys has decayed up to the token before it.
    dpast_CK = f_CK * df_CK
    dg_CK = q_CK * dq_CK - k_CK * dk_CK + dpast_CK
    dgate_CK = dg_CK - tl.cumsum(dg_CK, 0) + (tl.sum(dg_CK, 0)[None, :] + dlast_1K)
    if OWN:
        dgate_CK -= dpast_CK
        store_rows(df + row * K, heads * K, i_C, d_K, left, df_CK, K)
    else:
        dk_CK += df_CK
    dq_CK += own_C1 * k_CK
    dk_CK += own_C1 * q_CK
    store_rows(dq + row * K, heads * K, i_C, d_K, left, dq_CK, K)
    store_rows(dk + row * K, heads * K, i_C, d_K, left, dk_CK, K)
    store_rows(dgate + row * K, heads * K, i_C, d_K, left, dgate_CK, K)
