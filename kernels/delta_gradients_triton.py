"""Gradients of the delta rule's queries, keys and decays, for all chunks at once.

The walks of `kernels.delta_triton` leave for every chunk the errors E, the gradients dv, the state S that enters and the
gradient dS' of the state that leaves. A token reads with q, and reads what it erases with k; it writes with k. With
P = do E^T and M = dv E^T, both with the decays Gamma_ij and beta_j of a write, this chunk's part is

    dq = exp(G) S do + tril(P) K              erased = exp(G) S dv + tril(M, -1) K
    dk = exp(g - G) beta dS' E + tril(P)^T Q - tril(M, -1)^T K - erased

and the gradient of G_i is what the row reads less what it writes: q . dq - k . erased - k . (dk + erased).

Shape legend: B batch, T time, H heads, N chunks, C tokens of a chunk, K key, V value width.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.walk_triton import _load_rows


@triton.jit
def gradients_kernel(
    q, k, do, beta, g, errors, dv, states, dstates, dbeta_parts, dq, dk, dbeta, dgate,
    q_b: tl.int64, q_t: tl.int64, q_h: tl.int64, k_b: tl.int64, k_t: tl.int64, k_h: tl.int64,
    do_b: tl.int64, do_t: tl.int64, do_h: tl.int64,
    length: tl.int32, chunks: tl.int32, batches: tl.int32, heads: tl.int32, group: tl.int32,
    K: tl.constexpr, V: tl.constexpr, TK: tl.constexpr, BV: tl.constexpr, UNIT: tl.constexpr, C: tl.constexpr,
    PARTS: tl.constexpr, GATED: tl.constexpr, GATE_GRAD: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Grid: (B * H * N * key tiles,), a tile being TK columns of dq and dk; values are summed BV columns at a time.

    `dbeta_parts` [PARTS, B, T, H] is summed into `dbeta`. `dgate` is [key tiles, B, T, H]; its sum over the first axis is
    the gradient of the log decays, of which each is part of G of its own and all later tokens of the chunk.
    """
    TILES: tl.constexpr = (K + TK - 1) // TK
    program = tl.program_id(0).to(tl.int64)
    chunk_index, tile = program // TILES, program % TILES
    head_index, chunk = chunk_index // chunks, chunk_index % chunks
    batch, head = head_index // heads, head_index % heads
    i, d = tl.arange(0, C), tile * TK + tl.arange(0, TK)
    t_C = (chunk * C).to(tl.int32) + i
    live_C, rows_C = t_C < length, (batch * length + t_C) * heads + head
    do_base = do + (batch * do_b + head * do_h) * UNIT
    states += chunk_index * K * V
    dstates += chunk_index * K * V
    dq_CK, erased_CK, write_CK = tl.zeros([C, TK], tl.float32), tl.zeros([C, TK], tl.float32), tl.zeros([C, TK], tl.float32)
    p_CC, m_CC = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32)
    p_T, m_T = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32)
    carried = tl.zeros([TK], tl.float32)
    for start in tl.range(0, V, BV, num_stages=STAGES):
        e = start + tl.arange(0, BV)
        in_rows, in_state = live_C[:, None] & (e < V)[None, :], (d < K)[:, None] & (e < V)[None, :]
        rows, state_offsets = rows_C[:, None] * V + e[None, :], d[:, None] * V + e[None, :]
        do_CV = _load_rows(do_base, do_t * UNIT, t_C, e, length, V, DOT)
        error_CV = tl.load(errors + rows, mask=in_rows, other=0.0)
        dv_CV = tl.load(dv + rows, mask=in_rows, other=0.0).to(DOT)
        state_KV = tl.load(states + state_offsets, mask=in_state, other=0.0)
        dstate_KV = tl.load(dstates + state_offsets, mask=in_state, other=0.0)
        p_CC = tl.dot(do_CV, tl.trans(error_CV), p_CC, input_precision=PRECISION)
        m_CC = tl.dot(dv_CV, tl.trans(error_CV), m_CC, input_precision=PRECISION)
        # The transposed scores are products of their own: a transposed accumulator as operand is miscompiled on Hopper.
        p_T = tl.dot(error_CV, tl.trans(do_CV), p_T, input_precision=PRECISION)
        m_T = tl.dot(error_CV, tl.trans(dv_CV), m_T, input_precision=PRECISION)
        dq_CK = tl.dot(do_CV, tl.trans(state_KV), dq_CK, input_precision=PRECISION)
        erased_CK = tl.dot(dv_CV, tl.trans(state_KV), erased_CK, input_precision=PRECISION)
        write_CK = tl.dot(error_CV, tl.trans(dstate_KV), write_CK, input_precision=PRECISION)
        if GATE_GRAD:
            carried += tl.sum(state_KV.to(tl.float32) * dstate_KV.to(tl.float32), 1)
    beta_C = tl.load(beta + rows_C, mask=live_C, other=0.0).to(tl.float32)
    q_base = q + (batch * q_b + (head // group) * q_h) * UNIT
    k_base = k + (batch * k_b + (head // group) * k_h) * UNIT
    q_CK = _load_rows(q_base, q_t * UNIT, t_C, d, length, K, DOT)
    k_CK = _load_rows(k_base, k_t * UNIT, t_C, d, length, K, DOT)
    seen, strict = i[:, None] >= i[None, :], i[:, None] > i[None, :]
    p_CC, m_CC = p_CC * beta_C[None, :], m_CC * beta_C[None, :]
    p_T, m_T, write_CK = p_T * beta_C[:, None], m_T * beta_C[:, None], write_CK * beta_C[:, None]
    g_all = 0.0
    if GATED:
        g_C, g_all = tl.load(g + chunk_index * C + i), tl.load(g + chunk_index * C + C - 1)
        pair_CC = g_C[:, None] - g_C[None, :]
        decay_CC = tl.exp2(tl.where(seen, pair_CC, float("-inf")))
        decay_T = tl.exp2(tl.where(seen, float("-inf"), -pair_CC))
        own = i[:, None] == i[None, :]
        decay_T = tl.where(own, 1.0, decay_T)
        p_CC, m_CC, p_T, m_T = p_CC * decay_CC, m_CC * decay_CC, p_T * decay_T, m_T * decay_T
        fade_C = tl.exp2(g_C)
        dq_CK, erased_CK = dq_CK * fade_C[:, None], erased_CK * fade_C[:, None]
        write_CK = write_CK * tl.exp2(g_all - g_C)[:, None]
    inter_C = tl.zeros([C], tl.float32)
    own_C = tl.zeros([C], tl.float32)
    if GATE_GRAD:
        inter_C = tl.sum(k_CK.to(tl.float32) * write_CK, 1)
        # What a token reads of its own write has no decay. It would cancel below, and drown small gradients.
        own_C = tl.sum(tl.where(i[:, None] == i[None, :], p_CC, 0.0), 1)
    p_CC = tl.where(strict if GATE_GRAD else seen, p_CC, 0.0).to(DOT)
    p_T = tl.where(i[:, None] < i[None, :] if GATE_GRAD else i[:, None] <= i[None, :], p_T, 0.0).to(DOT)
    m_CC = tl.where(strict, m_CC, 0.0).to(DOT)
    m_T = tl.where(i[:, None] < i[None, :], -m_T, 0.0).to(DOT)
    dq_CK = tl.dot(p_CC, k_CK, dq_CK, input_precision=PRECISION)
    erased_CK = tl.dot(m_CC, k_CK, erased_CK, input_precision=PRECISION)
    write_CK = tl.dot(p_T, q_CK, write_CK, input_precision=PRECISION)
    write_CK = tl.dot(m_T, k_CK, write_CK, input_precision=PRECISION)
    if GATE_GRAD:
        q_wide, k_wide = q_CK.to(tl.float32), k_CK.to(tl.float32)
        dg_C = tl.sum(q_wide * dq_CK - k_wide * (erased_CK + write_CK), 1)
        after_C = tl.sum(dg_C, 0) - tl.cumsum(dg_C, 0) + dg_C
        dg_all = tl.exp2(g_all) * tl.sum(carried, 0) + tl.sum(inter_C, 0)
        tl.store(dgate + tile * batches * length * heads + rows_C, after_C + dg_all, mask=live_C)
        dq_CK += own_C[:, None] * k_wide
        write_CK += own_C[:, None] * q_wide
    in_rows, rows = live_C[:, None] & (d < K)[None, :], rows_C[:, None] * K + d[None, :]
    tl.store(dq + rows, dq_CK.to(dq.dtype.element_ty), mask=in_rows)
    tl.store(dk + rows, (write_CK - erased_CK).to(dk.dtype.element_ty), mask=in_rows)
    if tile == 0:
        dbeta_C = tl.zeros([C], tl.float32)
        for part in tl.static_range(PARTS):
            dbeta_C += tl.load(dbeta_parts + part * batches * length * heads + rows_C, mask=live_C, other=0.0)
        tl.store(dbeta + rows_C, dbeta_C.to(dbeta.dtype.element_ty), mask=live_C)
