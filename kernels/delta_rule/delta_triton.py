"""The delta rule as a walk over chunks: one small inverse per chunk, a forward walk and its reverse.

With cumulated log decay G inside a chunk that S enters, Gamma_ij = exp(G_i - G_j) and X = tril(K K^T o Gamma, -1), the
errors E that the chunk's writes U = beta E correct solve (I + X beta) E = R for R = V - exp(G) K S. The inverse is
I - H beta with H = X (I + beta X)^-1, and the transposed solve of the gradients is I - H^T beta with the same H:

    E = R - H (beta R)               S' = exp(g) S + K^T (exp(g - G) beta E)      o = exp(G) Q S + (Q K^T o Gamma) beta E
    Y = dU - H^T (beta dU)           dS = exp(g) dS' + Q^T exp(G) do - K^T exp(G) beta Y
    dU = exp(g - G) K dS' + (Q K^T o Gamma)^T do

H depends on keys, beta and decays only, so `delta_coupling_triton` makes that of all chunks in parallel beforehand.
Beta may be zero: nothing divides by it. Sources: Yang et al. 2024 (DeltaNet), eq. 10; Gated DeltaNet 2025, eq. 8; the form
with errors in place of writes is ours.

Shape legend: B batch, T time, H heads, N chunks, C tokens of a chunk, K key, V value width.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels._entry import entry
from kernels.walks.walk_triton import _load_rows

# What differs from call to call is not specialised, so that a new batch, length or head count compiles nothing.
SIZES = [f"{tensor}_{axis}" for tensor in ("q", "k", "v", "do", "gate") for axis in "bth"]
SIZES += ["length", "chunks", "batches", "heads", "group", "gate_every"]


@triton.jit
def _small(beta, g, h, t_C, length, heads, chunk_index, C: tl.constexpr, GATED: tl.constexpr):
    """Beta, H and the cumulated log2 decays of a chunk, and the last of these."""
    i = tl.arange(0, C)
    beta_C = tl.load(beta + t_C.to(tl.int64) * heads, mask=t_C < length, other=0.0).to(tl.float32)
    h_CC = tl.load(h + chunk_index * C * C + i[:, None] * C + i[None, :])
    g_C, g_all = beta_C, 0.0
    if GATED:
        g_C, g_all = tl.load(g + chunk_index * C + i), tl.load(g + chunk_index * C + C - 1)
    return beta_C, h_CC, g_C, g_all


@entry(do_not_specialize=SIZES)
def forward_kernel(
    q, k, v, beta, h, g, first, o, last, errors, states,
    q_b: tl.int64, q_t: tl.int64, q_h: tl.int64, k_b: tl.int64, k_t: tl.int64, k_h: tl.int64,
    v_b: tl.int64, v_t: tl.int64, v_h: tl.int64,
    length: tl.int32, heads: tl.int32, group: tl.int32,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, UNIT: tl.constexpr, C: tl.constexpr,
    GATED: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr, KEEP: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Grid: (B * H * value tiles,). KEEP writes E [B, T, H, V] and the state that enters each chunk [B, H, N, K, V]."""
    TILES: tl.constexpr = (V + BV - 1) // BV
    program = tl.program_id(0)
    head_index = (program // TILES).to(tl.int64)
    batch, head = head_index // heads, head_index % heads
    row = batch * length * heads + head
    q_base = q + (batch * q_b + (head // group) * q_h) * UNIT
    k_base = k + (batch * k_b + (head // group) * k_h) * UNIT
    v_base = v + (batch * v_b + head * v_h) * UNIT
    i, d, e = tl.arange(0, C), tl.arange(0, BK), (program % TILES) * BV + tl.arange(0, BV)
    seen = i[:, None] >= i[None, :]
    state_offsets, in_state = d[:, None] * V + e[None, :], (d < K)[:, None] & (e < V)[None, :]
    state_KV = tl.zeros([BK, BV], tl.float32)
    if FIRST:
        state_KV = tl.load(first + head_index * K * V + state_offsets, mask=in_state, other=0.0)
    n_chunks = tl.cdiv(length, C)
    for n in tl.range(0, n_chunks, num_stages=STAGES):
        t_C, chunk_index = n * C + i, head_index * n_chunks + n
        k_CK = _load_rows(k_base, k_t * UNIT, t_C, d, length, K, DOT)
        q_CK = _load_rows(q_base, q_t * UNIT, t_C, d, length, K, DOT)
        v_CV = _load_rows(v_base, v_t * UNIT, t_C, e, length, V, DOT)
        beta_C, h_CC, g_C, g_all = _small(beta + row, g, h, t_C, length, heads, chunk_index, C, GATED)
        narrow_KV = state_KV.to(DOT)
        if KEEP:
            tl.store(states + chunk_index * K * V + state_offsets, narrow_KV, mask=in_state)
        scores_CC = tl.dot(q_CK, tl.trans(k_CK), input_precision=PRECISION)
        if GATED:
            scores_CC = scores_CC * tl.exp2(tl.where(seen, g_C[:, None] - g_C[None, :], float("-inf")))
        else:
            scores_CC = tl.where(seen, scores_CC, 0.0)
        scores_CC = scores_CC.to(DOT)
        read_CV = tl.dot(k_CK, narrow_KV, input_precision=PRECISION)
        if GATED:
            read_CV = read_CV * tl.exp2(g_C)[:, None]
        error_CV = v_CV.to(tl.float32) - read_CV
        error_CV -= tl.dot(h_CC, (error_CV * beta_C[:, None]).to(DOT), input_precision=PRECISION)
        out, in_out = row * V + t_C.to(tl.int64)[:, None] * (heads * V) + e[None, :], (t_C < length)[:, None] & (e < V)[None, :]
        if KEEP:
            tl.store(errors + out, error_CV.to(DOT), mask=in_out)
        o_CV = tl.dot(q_CK, narrow_KV, input_precision=PRECISION)
        if GATED:
            o_CV = o_CV * tl.exp2(g_C)[:, None]
        write_CV = error_CV * beta_C[:, None]
        o_CV = tl.dot(scores_CC, write_CV.to(DOT), o_CV, input_precision=PRECISION)
        tl.store(o + out, o_CV.to(o.dtype.element_ty), mask=in_out)
        if GATED:
            write_CV = write_CV * tl.exp2(g_all - g_C)[:, None]
            state_KV = state_KV * tl.exp2(g_all)
        state_KV = tl.dot(tl.trans(k_CK), write_CV.to(DOT), state_KV, input_precision=PRECISION)
    if LAST:
        tl.store(last + head_index * K * V + state_offsets, state_KV, mask=in_state)


@entry(do_not_specialize=SIZES)
def reverse_kernel(
    q, k, do, beta, h, g, dlast, solved, dfirst, dstates,
    q_b: tl.int64, q_t: tl.int64, q_h: tl.int64, k_b: tl.int64, k_t: tl.int64, k_h: tl.int64,
    do_b: tl.int64, do_t: tl.int64, do_h: tl.int64,
    length: tl.int32, heads: tl.int32, group: tl.int32,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, UNIT: tl.constexpr, C: tl.constexpr,
    GATED: tl.constexpr, FIRST: tl.constexpr, DLAST: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Grid: (B * H * value tiles,). Walks back with dL/dS and writes it after each chunk [B, H, N, K, V], and Y."""
    TILES: tl.constexpr = (V + BV - 1) // BV
    program = tl.program_id(0)
    head_index = (program // TILES).to(tl.int64)
    batch, head = head_index // heads, head_index % heads
    row = batch * length * heads + head
    q_base = q + (batch * q_b + (head // group) * q_h) * UNIT
    k_base = k + (batch * k_b + (head // group) * k_h) * UNIT
    do_base = do + (batch * do_b + head * do_h) * UNIT
    i, d, e = tl.arange(0, C), tl.arange(0, BK), (program % TILES) * BV + tl.arange(0, BV)
    seen = i[:, None] <= i[None, :]
    state_offsets, in_state = d[:, None] * V + e[None, :], (d < K)[:, None] & (e < V)[None, :]
    dstate_KV = tl.zeros([BK, BV], tl.float32)
    if DLAST:
        dstate_KV = tl.load(dlast + head_index * K * V + state_offsets, mask=in_state, other=0.0)
    n_chunks = tl.cdiv(length, C)
    for back in tl.range(0, n_chunks, num_stages=STAGES):
        n = n_chunks - 1 - back
        t_C, chunk_index = n * C + i, head_index * n_chunks + n
        k_CK = _load_rows(k_base, k_t * UNIT, t_C, d, length, K, DOT)
        q_CK = _load_rows(q_base, q_t * UNIT, t_C, d, length, K, DOT)
        do_CV = _load_rows(do_base, do_t * UNIT, t_C, e, length, V, DOT)
        beta_C, h_CC, g_C, g_all = _small(beta + row, g, h, t_C, length, heads, chunk_index, C, GATED)
        # The transposed scores are a product of their own: a transposed accumulator as operand is miscompiled on Hopper.
        scores_CC = tl.dot(k_CK, tl.trans(q_CK), input_precision=PRECISION)
        narrow_KV = dstate_KV.to(DOT)
        dwrite_CV = tl.dot(k_CK, narrow_KV, input_precision=PRECISION)
        tl.store(dstates + chunk_index * K * V + state_offsets, narrow_KV, mask=in_state)  # on chip it is no longer needed
        if GATED:
            scores_CC = scores_CC * tl.exp2(tl.where(seen, g_C[None, :] - g_C[:, None], float("-inf")))
            dwrite_CV = dwrite_CV * tl.exp2(g_all - g_C)[:, None]
        else:
            scores_CC = tl.where(seen, scores_CC, 0.0)
        dwrite_CV = tl.dot(scores_CC.to(DOT), do_CV, dwrite_CV, input_precision=PRECISION)
        dwrite_CV -= tl.dot(tl.trans(h_CC), (dwrite_CV * beta_C[:, None]).to(DOT), input_precision=PRECISION)
        in_out = (t_C < length)[:, None] & (e < V)[None, :]
        out = row * V + t_C.to(tl.int64)[:, None] * (heads * V) + e[None, :]
        tl.store(solved + out, dwrite_CV.to(solved.dtype.element_ty), mask=in_out)
        erased_CV, fading_CV = dwrite_CV * -beta_C[:, None], do_CV
        if GATED:
            fade_C = tl.exp2(g_C)
            erased_CV, fading_CV = erased_CV * fade_C[:, None], (do_CV.to(tl.float32) * fade_C[:, None]).to(DOT)
            dstate_KV = dstate_KV * tl.exp2(g_all)
        dstate_KV = tl.dot(tl.trans(k_CK), erased_CV.to(DOT), dstate_KV, input_precision=PRECISION)
        dstate_KV = tl.dot(tl.trans(q_CK), fading_CV, dstate_KV, input_precision=PRECISION)
    if FIRST:
        tl.store(dfirst + head_index * K * V + state_offsets, dstate_KV, mask=in_state)
