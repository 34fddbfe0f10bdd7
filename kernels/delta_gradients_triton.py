"""Gradients of the delta rule's queries, keys and decays, for all chunks at once.

The walks of `kernels.delta_triton` leave for every chunk the errors E, the gradients dv, the state S that enters and the
gradient dS' of the state that leaves. A token reads with q, and reads what it erases with k; it writes with k. Where a
later i reads what j wrote, P_ij = exp(G_i - G_j) beta_j do_i . E_j and M_ij = exp(G_i - G_j) beta_j dv_i . E_j, so that

    dq = exp(G) S do + P K + own k        erased = exp(G) S dv + M K
    dk = exp(g - G) beta dS' E + P^T Q - M^T K + own q - erased        own_i = beta_i do_i . E_i

The gradient of G_i is what its row reads less what it writes; `own` would cancel there and drown small gradients, so
rows are summed before it is added.

Shape legend: B batch, T time, H heads, N chunks, C tokens of a chunk, K key, V value width.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.walk_triton import _load_rows


@triton.jit
def _decays(g, beta_C, i, GATED: tl.constexpr):
    """Of rows: the decay since the chunk began, and beta with the decay until it ends; and that of the whole chunk."""
    since_C, until_C, whole = tl.full(beta_C.shape, 1.0, tl.float32), beta_C, 1.0
    if GATED:
        g_C, g_all = tl.load(g + i), tl.load(g + beta_C.shape[0] - 1)
        since_C, until_C, whole = tl.exp2(g_C), beta_C * tl.exp2(g_all - g_C), tl.exp2(g_all)
    return since_C, until_C, whole


@triton.jit
def _decay_pairs(x_CC, g, beta_C, i, READERS: tl.constexpr, GATED: tl.constexpr, DOT: tl.constexpr):
    """A matrix of readers x writers, or else of writers x readers, with the decays and the beta of the write.

    Only later readers count, so that every exponent is <= 0.
    """
    if READERS:
        counts, beta = i[:, None] > i[None, :], beta_C[None, :]
    else:
        counts, beta = i[:, None] < i[None, :], beta_C[:, None]
    x_CC = x_CC * beta
    if GATED:
        g_C = tl.load(g + i)
        difference = g_C[:, None] - g_C[None, :]
        x_CC = x_CC * tl.exp2(tl.where(counts, difference if READERS else -difference, 0.0))
    return tl.where(counts, x_CC, 0.0).to(DOT)


@triton.jit
def gradients_kernel(
    q, k, do, beta, g, errors, dv, states, dstates, dbeta_parts, dq, dk, dbeta, dgate,
    q_b: tl.int64, q_t: tl.int64, q_h: tl.int64, k_b: tl.int64, k_t: tl.int64, k_h: tl.int64,
    do_b: tl.int64, do_t: tl.int64, do_h: tl.int64,
    length: tl.int32, chunks: tl.int32, batches: tl.int32, heads: tl.int32, group: tl.int32,
    K: tl.constexpr, V: tl.constexpr, TK: tl.constexpr, BV: tl.constexpr, UNIT: tl.constexpr, C: tl.constexpr,
    PARTS: tl.constexpr, GATED: tl.constexpr, GATE_GRAD: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
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
    i, d = tl.arange(0, C), (tile * TK).to(tl.int32) + tl.arange(0, TK)
    t_C = (chunk * C).to(tl.int32) + i
    live_C, row_C = t_C < length, (batch * length + t_C) * heads + head
    do_base = do + (batch * do_b + head * do_h) * UNIT
    states += chunk_index * K * V
    dstates += chunk_index * K * V
    g += chunk_index * C
    beta_C = tl.load(beta + row_C, mask=live_C, other=0.0).to(tl.float32)
    q_CK = _load_rows(q + (batch * q_b + (head // group) * q_h) * UNIT, q_t * UNIT, t_C, d, length, K, DOT)
    k_CK = _load_rows(k + (batch * k_b + (head // group) * k_h) * UNIT, k_t * UNIT, t_C, d, length, K, DOT)
    since_C, until_C, whole = _decays(g, beta_C, i, GATED)
    dq_CK, dk_CK = tl.zeros([C, TK], tl.float32), tl.zeros([C, TK], tl.float32)
    dg_C, dg_all = tl.zeros([C], tl.float32), 0.0
    for start in tl.range(0, V, BV, num_stages=1):
        e = start + tl.arange(0, BV)
        in_rows, in_state = live_C[:, None] & (e < V)[None, :], (d < K)[:, None] & (e < V)[None, :]
        do_CV = _load_rows(do_base, do_t * UNIT, t_C, e, length, V, DOT)
        error_CV = tl.load(errors + row_C[:, None] * V + e[None, :], mask=in_rows, other=0.0)
        dv_CV = tl.load(dv + row_C[:, None] * V + e[None, :], mask=in_rows, other=0.0).to(DOT)
        state_KV = tl.load(states + d[:, None] * V + e[None, :], mask=in_state, other=0.0)
        dstate_KV = tl.load(dstates + d[:, None] * V + e[None, :], mask=in_state, other=0.0)
        if GATE_GRAD:
            dg_all += whole * tl.sum(tl.sum(state_KV.to(tl.float32) * dstate_KV.to(tl.float32), 1), 0)

        p_CC = tl.dot(do_CV, tl.trans(error_CV), input_precision=PRECISION)
        own_C = tl.sum(tl.where(i[:, None] == i[None, :], p_CC, 0.0), 1) * beta_C
        p_CC = _decay_pairs(p_CC, g, beta_C, i, True, GATED, DOT)
        part_CK = tl.dot(do_CV, tl.trans(state_KV), input_precision=PRECISION) * since_C[:, None]
        part_CK = tl.dot(p_CC, k_CK, part_CK, input_precision=PRECISION)
        if GATE_GRAD:
            dg_C += tl.sum(part_CK * q_CK.to(tl.float32), 1)
        dq_CK += part_CK + own_C[:, None] * k_CK.to(tl.float32)

        m_CC = tl.dot(dv_CV, tl.trans(error_CV), input_precision=PRECISION)
        m_CC = _decay_pairs(m_CC, g, beta_C, i, True, GATED, DOT)
        part_CK = tl.dot(dv_CV, tl.trans(state_KV), input_precision=PRECISION) * since_C[:, None]
        part_CK = tl.dot(m_CC, k_CK, part_CK, input_precision=PRECISION)
        if GATE_GRAD:
            dg_C -= tl.sum(part_CK * k_CK.to(tl.float32), 1)
        dk_CK += own_C[:, None] * q_CK.to(tl.float32) - part_CK

        # The transposed pairs are products of their own: a transposed accumulator as operand is miscompiled on Hopper.
        part_CK = tl.dot(error_CV, tl.trans(dstate_KV), input_precision=PRECISION) * until_C[:, None]
        if GATE_GRAD:
            dg_all += tl.sum(tl.sum(part_CK * k_CK.to(tl.float32), 1), 0)
        p_CC = tl.dot(error_CV, tl.trans(do_CV), input_precision=PRECISION)
        p_CC = _decay_pairs(p_CC, g, beta_C, i, False, GATED, DOT)
        part_CK = tl.dot(p_CC, q_CK, part_CK, input_precision=PRECISION)
        m_CC = tl.dot(error_CV, tl.trans(dv_CV), input_precision=PRECISION)
        m_CC = _decay_pairs(-m_CC, g, beta_C, i, False, GATED, DOT)
        part_CK = tl.dot(m_CC, k_CK, part_CK, input_precision=PRECISION)
        if GATE_GRAD:
            dg_C -= tl.sum(part_CK * k_CK.to(tl.float32), 1)
        dk_CK += part_CK
    out, in_out = row_C[:, None] * K + d[None, :], live_C[:, None] & (d < K)[None, :]
    tl.store(dq + out, dq_CK.to(dq.dtype.element_ty), mask=in_out)
    tl.store(dk + out, dk_CK.to(dk.dtype.element_ty), mask=in_out)
    if GATE_GRAD:
        dg_C = tl.sum(dg_C, 0) - tl.cumsum(dg_C, 0) + dg_C + dg_all
        tl.store(dgate + tile * batches * length * heads + row_C, dg_C, mask=live_C)
    if tile == 0:
        dbeta_C = tl.zeros([C], tl.float32)
        for part in tl.static_range(PARTS):
            dbeta_C += tl.load(dbeta_parts + part * batches * length * heads + row_C, mask=live_C, other=0.0)
        tl.store(dbeta + row_C, dbeta_C.to(dbeta.dtype.element_ty), mask=live_C)
