"""Gradients of queries, keys and log decays, for all chunks at once.

With S_m the state of a chunk and dS_m its gradient, both about the middle (`vector_gate_walk`), U the values written
(V, or beta E) and dV those of the reverse walk, P and M pass on dP = tril(dO U^T) and dM = -tril(dV U^T, -1), and

    dQ' = dO S_m^T + dP W,    dK' = -dV S_m^T + dM W,    dW = U dS_m^T + dP^T Q' + dM^T K'

A rough chunk passes dP and dM on along the tree of `vector_gate_tree` instead. All this is computed with channels as
rows: sums over tokens stay in a thread's row, and dP and dM are right operands, plain and transposed. As left ones they would be
products of their own: on Hopper, Triton 3.4 to 3.7 miscompile a product whose left operand is a transposed accumulator.

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

from kernels._entry import entry
from kernels.vector_gates.vector_gate_middle import load_factors, load_gates, reads_and_writes
from kernels.vector_gates.vector_gate_rows import SIZES, hidden, load_beta, load_rows, store_rows
from kernels.vector_gates.vector_gate_tree import (
    LOG2_E,
    in_blocks,
    in_terms,
    paired,
    past_in_blocks,
    past_to_boundary,
    range_sums,
    to_boundary,
)


@triton.jit
def _over_values(
    do, do_t, u, u_t, dv, dv_t, states, dstates, beta_C, i_C, token_C, d_K, left,
    V: tl.constexpr, VP: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, DELTA: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Sums over values: S_m dO^T, dS_m U^T, -S_m dV^T [BK, C], rows of S_m o dS_m [BK], dP and dM [C, C]."""
    dread_KC, dwrite_KC, derase_KC = tl.zeros([BK, C], tl.float32), tl.zeros([BK, C], tl.float32), tl.zeros([BK, C], tl.float32)
    dp_CC, dm_CC = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32)
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
        dread_KC = tl.dot(state_KV, tl.trans(do_CV), dread_KC, input_precision=PRECISION)
        dwrite_KC = tl.dot(dstate_KV, tl.trans(u_CV), dwrite_KC, input_precision=PRECISION)
        dp_CC = tl.dot(do_CV, tl.trans(u_CV), dp_CC, input_precision=PRECISION)
        both_K += tl.sum(state_KV.to(tl.float32) * dstate_KV.to(tl.float32), 1)
        if DELTA:
            dv_CV = load_rows(dv, dv_t, i_C, cols, left, V, DOT)
            derase_KC = tl.dot(state_KV, tl.trans(dv_CV), derase_KC, input_precision=PRECISION)
            dm_CC = tl.dot(dv_CV, tl.trans(u_CV), dm_CC, input_precision=PRECISION)
    dp_CC = tl.where(token_C[:, None] >= token_C[None, :], dp_CC, 0.0)
    dm_CC = tl.where(token_C[:, None] > token_C[None, :], -dm_CC, 0.0)
    return dread_KC, dwrite_KC, -derase_KC, both_K, dp_CC, dm_CC.to(DOT)


@triton.jit
def _decays(
    gate, gate_t, i_C, token_C, d_K, left,
    K: tl.constexpr, OWN: tl.constexpr, TERMS: tl.constexpr, TREE: tl.constexpr,
):  # fmt: skip
    """Decays [K, C] of reads, writes and erasures, and the log decays."""
    gate_KC = tl.trans(load_gates(gate, gate_t, i_C, d_K, left, K, TERMS))
    since_KC, until_KC = reads_and_writes(gate_KC, token_C, TERMS, TREE, True)
    past_KC = since_KC
    if OWN:
        past_KC = since_KC - gate_KC * LOG2_E
    return tl.exp2(since_KC), tl.exp2(until_KC), tl.exp2(past_KC), gate_KC


@triton.jit
def _through_middle(
    reads, writes, erases, dread_KC, dwrite_KC, derase_KC, dp_CC, dm_CC, by_key_CK,
    DELTA: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of Q', W and K' of a gentle chunk; x and y, and the part of y that is from K'."""
    qd_KC, kd_KC = tl.trans(tl.load(reads + by_key_CK)), tl.trans(tl.load(writes + by_key_CK))
    dp_CC = dp_CC.to(DOT)
    dread_KC = tl.dot(kd_KC, tl.trans(dp_CC), dread_KC, input_precision=PRECISION)
    back_KC = tl.dot(qd_KC, dp_CC, input_precision=PRECISION)
    past_y_KC = derase_KC
    if DELTA:
        fd_KC = tl.trans(tl.load(erases + by_key_CK))
        derase_KC = tl.dot(kd_KC, tl.trans(dm_CC), derase_KC, input_precision=PRECISION)
        back_KC = tl.dot(fd_KC, dm_CC, back_KC, input_precision=PRECISION)
        past_y_KC = fd_KC * derase_KC
    x_KC, y_KC = kd_KC * dwrite_KC, qd_KC * dread_KC - kd_KC * back_KC
    return dread_KC, dwrite_KC + back_KC, derase_KC, x_KC, y_KC, past_y_KC


@triton.jit
def _through_tree(
    q_KC, k_KC, f_KC, gate_KC, dp_CC, dm_CC, dq_KC, df_KC, i_C, gentle,
    LEVELS: tl.constexpr, DELTA: tl.constexpr, OWN: tl.constexpr, TERMS: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds what P and M pass on for any decays to dq and df, and returns what they pass on to k; y, and the part from f.

    Both ends of a pair add to y with the operands of its products, as they were rounded, so that they cancel where they should.
    """
    high_KC, low_KC = in_terms(gate_KC, TERMS)
    y_KC, past_y_KC = q_KC * dq_KC, f_KC * df_KC
    since_KC = in_blocks(i_C, gentle, high_KC, low_KC, TERMS, True)
    decay_KC, grow_KC = tl.exp2(since_KC), tl.exp2(-since_KC)
    near_CC = (i_C[:, None] >> gentle) == (i_C[None, :] >> gentle)
    qd_KC, kd_KC = (q_KC * decay_KC).to(DOT), (k_KC * grow_KC).to(DOT)
    level_CC = tl.where(near_CC & (i_C[:, None] > i_C[None, :]), dp_CC, 0.0).to(DOT)
    dread_KC = tl.dot(kd_KC, tl.trans(level_CC), input_precision=PRECISION)
    y_KC += qd_KC * dread_KC
    dq_KC += dread_KC * decay_KC
    back_KC = tl.dot(qd_KC, level_CC, input_precision=PRECISION)
    if DELTA:
        if OWN:
            decay_KC = tl.exp2(past_in_blocks(since_KC, gate_KC, i_C, gentle, True))
        fd_KC = (f_KC * decay_KC).to(DOT)
        level_CC = tl.where(near_CC, dm_CC, 0.0).to(DOT)
        dread_KC = tl.dot(kd_KC, tl.trans(level_CC), input_precision=PRECISION)
        past_y_KC += fd_KC * dread_KC
        df_KC += dread_KC * decay_KC
        back_KC = tl.dot(fd_KC, level_CC, back_KC, input_precision=PRECISION)
    y_KC -= kd_KC * back_KC
    dk_KC = back_KC * grow_KC
    for level in range(gentle + 1, LEVELS + 1):
        decay_KC = tl.exp2(to_boundary(i_C, level, high_KC, low_KC, TERMS, True))
        pairs_CC = paired(i_C[:, None], i_C[None, :], level)
        qd_KC, kd_KC = (q_KC * decay_KC).to(DOT), (k_KC * decay_KC).to(DOT)
        level_CC = tl.where(pairs_CC, dp_CC, 0.0).to(DOT)
        dread_KC = tl.dot(kd_KC, tl.trans(level_CC), input_precision=PRECISION)
        y_KC += qd_KC * dread_KC
        dq_KC += dread_KC * decay_KC
        back_KC = tl.dot(qd_KC, level_CC, input_precision=PRECISION)
        if DELTA:
            past_KC = decay_KC
            if OWN:
                past_KC = tl.exp2(past_to_boundary(i_C, level, high_KC, low_KC, TERMS, True))
            fd_KC = (f_KC * past_KC).to(DOT)
            level_CC = tl.where(pairs_CC, dm_CC, 0.0).to(DOT)
            dread_KC = tl.dot(kd_KC, tl.trans(level_CC), input_precision=PRECISION)
            past_y_KC += fd_KC * dread_KC
            df_KC += dread_KC * past_KC
            back_KC = tl.dot(fd_KC, level_CC, back_KC, input_precision=PRECISION)
        y_KC -= kd_KC * back_KC
        dk_KC += back_KC * decay_KC
    return dq_KC, dk_KC, df_KC, y_KC, past_y_KC


@triton.jit
def _of_rough_chunk(
    q, q_t, k, k_t, f, f_t, gate, gate_t, dread_KC, dwrite_KC, derase_KC, dp_CC, dm_CC, i_C, token_C, d_K, left, level,
    K: tl.constexpr, LEVELS: tl.constexpr, DELTA: tl.constexpr, OWN: tl.constexpr, TERMS: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of q, k and f of a rough chunk; x and y, and the part of y that is from f."""
    since_KC, until_KC, past_KC, gate_KC = _decays(gate, gate_t, i_C, token_C, d_K, left, K, OWN, TERMS, True)
    q_KC = tl.trans(load_rows(q, q_t, i_C, d_K, left, K, DOT))
    k_KC = tl.trans(load_rows(k, k_t, i_C, d_K, left, K, DOT))
    f_KC = tl.trans(load_rows(f, f_t, i_C, d_K, left, K, DOT)) if OWN else k_KC
    own_C = tl.sum(tl.where(token_C[:, None] == token_C[None, :], dp_CC, 0.0), 0)[None, :]
    dwrite_KC *= until_KC
    dq_KC, dk_KC, df_KC, y_KC, past_y_KC = _through_tree(
        q_KC, k_KC, f_KC, gate_KC, dp_CC, dm_CC, dread_KC * since_KC, derase_KC * past_KC, token_C, level,
        LEVELS, DELTA, OWN, TERMS, DOT, PRECISION,
    )  # fmt: skip
    return dq_KC + own_C * k_KC, dk_KC + dwrite_KC + own_C * q_KC, df_KC, k_KC * dwrite_KC, y_KC, past_y_KC


@triton.jit
def _gradients(
    q, q_t, k, k_t, f, f_t, gate, gate_t, u, u_t, do, do_t, beta, dv, factors, reads, writes, erases, states, dstates,
    dq, dk, df, dgate, level, tile, length, heads, left,
    K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    LEVELS: tl.constexpr, DELTA: tl.constexpr, OWN: tl.constexpr, TERMS: tl.constexpr, SPLIT: tl.constexpr, TREE: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Writes the gradients of some channels of a chunk, which is rough if TREE."""
    i_C, d_K = tl.arange(0, C), tile * BK + tl.arange(0, BK)
    token_C = hidden(i_C, length)
    beta_C = load_beta(beta, heads, i_C, left) if DELTA else tl.zeros([C], tl.float32)
    dread_KC, dwrite_KC, derase_KC, both_K, dp_CC, dm_CC = _over_values(
        do, do_t, u, u_t, dv, heads * V, states, dstates, beta_C, i_C, token_C, d_K, left,
        V, VP, BK, BV, C, DELTA, DOT, PRECISION, STAGES,
    )  # fmt: skip
    if TREE:
        dq_KC, dk_KC, df_KC, x_KC, y_KC, past_y_KC = _of_rough_chunk(
            q, q_t, k, k_t, f, f_t, gate, gate_t, dread_KC, dwrite_KC, derase_KC, dp_CC, dm_CC, i_C, token_C, d_K, left, level,
            K, LEVELS, DELTA, OWN, TERMS, DOT, PRECISION,
        )  # fmt: skip
    else:
        dq_KC, dk_KC, df_KC, x_KC, y_KC, past_y_KC = _through_middle(
            reads, writes, erases, dread_KC, dwrite_KC, derase_KC, dp_CC, dm_CC, i_C[:, None] * KP + d_K[None, :],
            DELTA, DOT, PRECISION,
        )  # fmt: skip
    own_KC = tl.zeros([BK, C], tl.float32)
    if DELTA:
        y_KC += past_y_KC
        if OWN:
            own_KC = past_y_KC  # what an erasure reads with its own keys has decayed up to the token before it
    _, carry_K, _ = load_factors(factors, 0, d_K, KP)
    high_KC, low_KC = in_terms(x_KC - y_KC, SPLIT)
    dgate_KC = range_sums(tl.zeros_like(i_C) - 1, token_C - 1, high_KC, low_KC, token_C, SPLIT, True) - own_KC
    dgate_KC += (tl.sum(y_KC, 1) + both_K * carry_K)[:, None]
    store_rows(dgate, heads * K, i_C, d_K, left, tl.trans(dgate_KC), K)
    if not TREE:  # last, since the gradients of the decays are done without them
        since_KC, until_KC, past_KC, _ = _decays(gate, gate_t, i_C, token_C, d_K, left, K, OWN, TERMS, TREE)
        dq_KC, dk_KC, df_KC = dq_KC * since_KC, dk_KC * until_KC, df_KC * past_KC
    if OWN:
        store_rows(df, heads * K, i_C, d_K, left, tl.trans(df_KC), K)
    elif DELTA:
        dk_KC += df_KC
    store_rows(dq, heads * K, i_C, d_K, left, tl.trans(dq_KC), K)
    store_rows(dk, heads * K, i_C, d_K, left, tl.trans(dk_KC), K)


@entry(do_not_specialize=SIZES)
def gradient_kernel(
    q, k, f, gate, u, do, beta, dv, levels, factors, reads, writes, erases, states, dstates, dq, dk, df, dgate,
    q_b: tl.int64, q_t: tl.int32, q_h: tl.int64, k_b: tl.int64, k_t: tl.int32, k_h: tl.int64,
    f_b: tl.int64, f_t: tl.int32, f_h: tl.int64, gate_b: tl.int64, gate_t: tl.int32, gate_h: tl.int64,
    u_b: tl.int64, u_t: tl.int32, u_h: tl.int64, do_b: tl.int64, do_t: tl.int32, do_h: tl.int64,
    length: tl.int32, heads: tl.int32,
    K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    UNIT: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr, DELTA: tl.constexpr, OWN: tl.constexpr,
    TERMS: tl.constexpr, SPLIT: tl.constexpr, ROUGH: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Grid: (B * H * N * key tiles,); the key tiles of a chunk are neighbours and share the L2 cache. u is V or E.

    ROUGH is for the rough chunks, a launch without it takes the others. OWN says that f holds the keys of the erasure, TERMS and
    SPLIT are for `in_terms` of log decays and of their gradients.
    """
    TILES: tl.constexpr = KP // BK
    block, tile = (tl.program_id(0) // TILES).to(tl.int64), tl.program_id(0) % TILES
    chunks = tl.cdiv(length, C)
    head_index, n = block // chunks, (block % chunks).to(tl.int32)
    batch, head = head_index // heads, head_index % heads
    start, left = n.to(tl.int64) * C, length - n * C
    row, state = (batch * length + start) * heads + head, block * KP * VP
    q += (batch * q_b + head * q_h + start * q_t) * UNIT
    k += (batch * k_b + head * k_h + start * k_t) * UNIT
    f += (batch * f_b + head * f_h + start * f_t) * UNIT
    gate += (batch * gate_b + head * gate_h + start * gate_t) * UNIT
    u += (batch * u_b + head * u_h + start * u_t) * UNIT
    do += (batch * do_b + head * do_h + start * do_t) * UNIT
    dq, dk, df, dgate = dq + row * K, dk + row * K, df + row * K, dgate + row * K
    reads, writes, erases = reads + block * C * KP, writes + block * C * KP, erases + block * C * KP
    beta, dv, factors, states, dstates = beta + row, dv + row * V, factors + block * 2 * KP, states + state, dstates + state
    level = tl.load(levels + block)
    if (level != LEVELS) == ROUGH:
        _gradients(
            q, q_t * UNIT, k, k_t * UNIT, f, f_t * UNIT, gate, gate_t * UNIT, u, u_t * UNIT, do, do_t * UNIT, beta, dv, factors,
            reads, writes, erases, states, dstates, dq, dk, df, dgate, level, tile, length, heads, left,
            K, V, KP, VP, BK, BV, C, LEVELS, DELTA, OWN, TERMS, SPLIT, ROUGH, DOT, PRECISION, STAGES,
        )  # fmt: skip
