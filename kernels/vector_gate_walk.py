"""The walks over chunks, forward and in reverse, which hold the state and its gradient in registers.

Forward, with the names of `kernels.vector_gate_prepare` and the factors of `kernels.vector_gate_middle`:

    S_m = enter S,  R = V - K' S_m,  E = R - H (beta R),  U = beta E,  O = Q' S_m + P U,  S <- leave (carry S_m + W^T U)

In reverse, with dS the gradient of the state that leaves the chunk:

    dS_m = leave dS,  dU = P^T dO + W dS_m,  Z = dU - H^T (beta dU),  dbeta = rowsum(E o Z),  dV = beta Z
    dS <- enter (carry dS_m + Q'^T dO - K'^T dV)

Without the delta rule E is V and dV is dU. The columns of the state are split over programs, and every program decays
queries and keys itself: they are less to read than what would be prepared, and the two programs of an SM hide each other's waits.

Shape legend: B batch, T time, H heads, N chunks, C tokens of a chunk, K key, V value width; KP and VP are padded widths.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.vector_gate_middle import from_middle, load_gates, load_halves, reads_and_writes, row_factors
from kernels.vector_gate_rows import load_beta, load_rows, store_rows
from kernels.vector_gate_tree import LOG2_E


@triton.jit
def _decayed(
    q, k, f, gate, q_t, k_t, f_t, gate_t, is_rough, early_K, late_K, i_C, d_K, left,
    K: tl.constexpr, C: tl.constexpr, DELTA: tl.constexpr, OWN: tl.constexpr, TERMS: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Q', W and K' of a chunk."""
    gate_CK = load_gates(gate, gate_t, i_C, d_K, left, K, TERMS)
    q_CK = load_rows(q, q_t, i_C, d_K, left, K, DOT)
    k_CK = load_rows(k, k_t, i_C, d_K, left, K, DOT)
    since_CK, until_CK = reads_and_writes(from_middle(gate_CK, i_C, C, TERMS), is_rough, early_K, late_K)
    since_decay_CK = tl.exp2(since_CK)
    read_CK, write_CK = (q_CK * since_decay_CK).to(DOT), (k_CK * tl.exp2(until_CK)).to(DOT)
    erase_CK = read_CK
    if OWN:
        f_CK = load_rows(f, f_t, i_C, d_K, left, K, DOT)
        erase_CK = (f_CK * tl.exp2(since_CK - gate_CK * LOG2_E)).to(DOT)
    elif DELTA:
        erase_CK = (k_CK * since_decay_CK).to(DOT)
    return read_CK, write_CK, erase_CK


@triton.jit
def walk_kernel(
    q, k, f, gate, v, beta, halves, rough, scores, couplings, first, o, last, states, errors,
    q_b: tl.int64, q_t: tl.int32, q_h: tl.int64, k_b: tl.int64, k_t: tl.int32, k_h: tl.int64,
    f_b: tl.int64, f_t: tl.int32, f_h: tl.int64, gate_b: tl.int64, gate_t: tl.int32, gate_h: tl.int64,
    v_b: tl.int64, v_t: tl.int32, v_h: tl.int64, length: tl.int32, heads: tl.int32,
    K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr, BV: tl.constexpr, UNIT: tl.constexpr,
    C: tl.constexpr, DELTA: tl.constexpr, OWN: tl.constexpr, TERMS: tl.constexpr, FIRST: tl.constexpr,
    LAST: tl.constexpr, KEEP: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Grid: (B * H * value tiles,).

    KEEP writes S_m of each chunk to states, [B, H, N, KP, VP], and with the delta rule E to errors, [B, T, H, V], for the
    gradients.
    """
    TILES: tl.constexpr = (V + BV - 1) // BV
    head_index, tile = (tl.program_id(0) // TILES).to(tl.int64), tl.program_id(0) % TILES
    batch, head = head_index // heads, head_index % heads
    i_C, d_K, e_V = tl.arange(0, C), tl.arange(0, KP), tile * BV + tl.arange(0, BV)
    square_CC = i_C[:, None] * C + i_C[None, :]
    by_state = head_index * K * V + d_K[:, None] * V + e_V[None, :]
    in_state = (d_K < K)[:, None] & (e_V < V)[None, :]
    q += (batch * q_b + head * q_h) * UNIT
    k += (batch * k_b + head * k_h) * UNIT
    f += (batch * f_b + head * f_h) * UNIT
    gate += (batch * gate_b + head * gate_h) * UNIT
    v += (batch * v_b + head * v_h) * UNIT
    row = batch * length * heads + head
    state_KV = tl.zeros([KP, BV], tl.float32)
    if FIRST:
        state_KV = tl.load(first + by_state, mask=in_state, other=0.0)
    chunks = tl.cdiv(length, C)
    for n in tl.range(0, chunks, num_stages=STAGES):
        block = head_index * chunks + n
        start, left = tl.cast(n, tl.int64) * C, length - n * C
        here = row + start * heads
        is_rough, early_K, late_K = load_halves(halves, rough, block, d_K, KP)
        read_CK, write_CK, erase_CK = _decayed(
            q + start * q_t * UNIT, k + start * k_t * UNIT, f + start * f_t * UNIT, gate + start * gate_t * UNIT,
            q_t * UNIT, k_t * UNIT, f_t * UNIT, gate_t * UNIT, is_rough, early_K, late_K, i_C, d_K, left,
            K, C, DELTA, OWN, TERMS, DOT,
        )  # fmt: skip
        enter_K, carry_K, leave_K = row_factors(is_rough, early_K, late_K)
        u_CV = load_rows(v + start * v_t * UNIT, v_t * UNIT, i_C, e_V, left, V, DOT)
        score_CC = tl.load(scores + block * C * C + square_CC)
        state_KV *= enter_K[:, None]
        before_KV = state_KV.to(DOT)
        if KEEP:
            tl.store(states + block * KP * VP + d_K[:, None] * VP + e_V[None, :], before_KV)
        if DELTA:
            beta_C = load_beta(beta + here, heads, i_C, left)
            coupling_CC = tl.load(couplings + block * C * C + square_CC)
            error_CV = u_CV.to(tl.float32) - tl.dot(erase_CK, before_KV, input_precision=PRECISION)
            error_CV -= tl.dot(coupling_CC, (error_CV * beta_C[:, None]).to(DOT), input_precision=PRECISION)
            if KEEP:
                store_rows(errors + here * V, heads * V, i_C, e_V, left, error_CV, V)
            u_CV = (error_CV * beta_C[:, None]).to(DOT)
        o_CV = tl.dot(read_CK, before_KV, input_precision=PRECISION)
        o_CV = tl.dot(score_CC, u_CV, o_CV, input_precision=PRECISION)
        store_rows(o + here * V, heads * V, i_C, e_V, left, o_CV, V)
        state_KV = tl.dot(tl.trans(write_CK), u_CV, state_KV * carry_K[:, None], input_precision=PRECISION) * leave_K[:, None]
    if LAST:
        tl.store(last + by_state, state_KV, mask=in_state)


@triton.jit
def reverse_kernel(
    q, k, f, gate, do, beta, halves, rough, scores, couplings, errors, dlast, dv, dbeta, dfirst, dstates,
    q_b: tl.int64, q_t: tl.int32, q_h: tl.int64, k_b: tl.int64, k_t: tl.int32, k_h: tl.int64,
    f_b: tl.int64, f_t: tl.int32, f_h: tl.int64, gate_b: tl.int64, gate_t: tl.int32, gate_h: tl.int64,
    do_b: tl.int64, do_t: tl.int32, do_h: tl.int64, length: tl.int32, batches: tl.int32, heads: tl.int32,
    K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr, BV: tl.constexpr, UNIT: tl.constexpr,
    C: tl.constexpr, DELTA: tl.constexpr, OWN: tl.constexpr, TERMS: tl.constexpr, FIRST: tl.constexpr,
    DLAST: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Grid: (B * H * value tiles,). dstates, [B, H, N, KP, VP], gets dS_m of each chunk.

    dbeta is [value tiles, B, T, H], to be summed over the first axis. FIRST writes dfirst, the gradient of S_0.
    """
    TILES: tl.constexpr = (V + BV - 1) // BV
    head_index, tile = (tl.program_id(0) // TILES).to(tl.int64), tl.program_id(0) % TILES
    batch, head = head_index // heads, head_index % heads
    i_C, d_K, e_V = tl.arange(0, C), tl.arange(0, KP), tile * BV + tl.arange(0, BV)
    square_CC = i_C[:, None] * C + i_C[None, :]
    by_state = head_index * K * V + d_K[:, None] * V + e_V[None, :]
    in_state = (d_K < K)[:, None] & (e_V < V)[None, :]
    q += (batch * q_b + head * q_h) * UNIT
    k += (batch * k_b + head * k_h) * UNIT
    f += (batch * f_b + head * f_h) * UNIT
    gate += (batch * gate_b + head * gate_h) * UNIT
    do += (batch * do_b + head * do_h) * UNIT
    row = batch * length * heads + head
    dbeta += (tile.to(tl.int64) * batches * length * heads) + row
    grad_KV = tl.zeros([KP, BV], tl.float32)
    if DLAST:
        grad_KV = tl.load(dlast + by_state, mask=in_state, other=0.0)
    chunks = tl.cdiv(length, C)
    for step in tl.range(0, chunks, num_stages=STAGES):
        n = chunks - 1 - step
        block = head_index * chunks + n
        start, left = tl.cast(n, tl.int64) * C, length - n * C
        here = row + start * heads
        is_rough, early_K, late_K = load_halves(halves, rough, block, d_K, KP)
        read_CK, write_CK, erase_CK = _decayed(
            q + start * q_t * UNIT, k + start * k_t * UNIT, f + start * f_t * UNIT, gate + start * gate_t * UNIT,
            q_t * UNIT, k_t * UNIT, f_t * UNIT, gate_t * UNIT, is_rough, early_K, late_K, i_C, d_K, left,
            K, C, DELTA, OWN, TERMS, DOT,
        )  # fmt: skip
        enter_K, carry_K, leave_K = row_factors(is_rough, early_K, late_K)
        do_CV = load_rows(do + start * do_t * UNIT, do_t * UNIT, i_C, e_V, left, V, DOT)
        score_CC = tl.load(scores + block * C * C + square_CC)
        grad_KV *= leave_K[:, None]
        after_KV = grad_KV.to(DOT)
        tl.store(dstates + block * KP * VP + d_K[:, None] * VP + e_V[None, :], after_KV)
        du_CV = tl.dot(tl.trans(score_CC), do_CV, input_precision=PRECISION)
        du_CV = tl.dot(write_CK, after_KV, du_CV, input_precision=PRECISION)
        grad_KV = tl.dot(tl.trans(read_CK), do_CV, grad_KV * carry_K[:, None], input_precision=PRECISION)
        if DELTA:
            beta_C = load_beta(beta + here, heads, i_C, left)
            coupling_CC = tl.load(couplings + block * C * C + square_CC)
            error_CV = load_rows(errors + here * V, heads * V, i_C, e_V, left, V, tl.float32)
            du_CV -= tl.dot(tl.trans(coupling_CC), (beta_C[:, None] * du_CV).to(DOT), input_precision=PRECISION)
            tl.store(dbeta + start * heads + i_C * heads, tl.sum(du_CV * error_CV, 1), mask=i_C < left)
            du_CV *= beta_C[:, None]
            grad_KV = tl.dot(tl.trans(erase_CK), (-du_CV).to(DOT), grad_KV, input_precision=PRECISION)
        store_rows(dv + here * V, heads * V, i_C, e_V, left, du_CV, V)
        grad_KV *= enter_K[:, None]
    if FIRST:
        tl.store(dfirst + by_state, grad_KV, mask=in_state)
