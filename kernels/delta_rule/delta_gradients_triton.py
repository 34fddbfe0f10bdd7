"""Gradients of the delta rule's inputs, for all chunks at once.

The walks of `delta_triton` leave for every chunk the errors E, the solved gradients Y, the state S that enters and
the gradient dS' of the state that leaves. A token reads with q, and reads what it erases with k; it writes with k. Where
a later i reads what j wrote, P_ij = exp(G_i - G_j) beta_j do_i . E_j and M_ij = -exp(G_i - G_j) beta_j dv_i . E_j, so that

    dq = exp(G) S do + P K + own k            dk = exp(g - G) beta dS' E + P^T Q + M^T K + own q - exp(G) S dv + M K
    dv = beta Y                               dbeta = Y . E                               own_i = beta_i do_i . E_i

Rows of do and Y, and so of P and M, are stacked: they meet the same operands. The gradient of G_i is what its row reads
less what it writes; `own` would cancel there and drown small gradients, so rows are summed before it is added.

Shape legend: B batch, T time, H heads, N chunks, C tokens of a chunk, R = 2C stacked rows, K key, V value width.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels._entry import entry
from kernels.delta_rule.delta_triton import SIZES
from kernels.walks.walk_triton import _load_rows


@triton.jit
def _load_stacked(first, first_stride, second, second_stride, t_R, is_first, cols, length, WIDTH: tl.constexpr, DOT: tl.constexpr):
    """Rows t_R of two matrices of one dtype, one above the other, zero beyond their edges."""
    t_R = t_R.to(tl.int64)
    row = tl.where(is_first, first + t_R * first_stride, second + t_R * second_stride)
    mask = (t_R < length)[:, None] & (cols < WIDTH)[None, :]
    return tl.load(row[:, None] + cols[None, :], mask=mask, other=0.0).to(DOT)


@triton.jit
def _load_states(states, dstates, chunk_index, d, e, K: tl.constexpr, V: tl.constexpr):
    """A block of the state that enters a chunk, and of the gradient of the one that leaves."""
    offsets, mask = chunk_index * K * V + d[:, None] * V + e[None, :], (d < K)[:, None] & (e < V)[None, :]
    return tl.load(states + offsets, mask=mask, other=0.0), tl.load(dstates + offsets, mask=mask, other=0.0)


@triton.jit
def _store_rows(out, x_CW, row_C, live_C, cols, WIDTH: tl.constexpr):
    """Columns of contiguous rows that are WIDTH wide."""
    offsets, mask = row_C[:, None] * WIDTH + cols[None, :], live_C[:, None] & (cols < WIDTH)[None, :]
    tl.store(out + offsets, x_CW.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _unstacked(x_RK, C: tl.constexpr):
    """The upper and the lower half of the rows."""
    return tl.split(tl.permute(tl.reshape(x_RK, [2, C, x_RK.shape[1]]), [1, 2, 0]))


@triton.jit
def _decays(g, weight_R, beta_C, C: tl.constexpr, GATED: tl.constexpr):
    """What products over a chunk are multiplied by, in fp32.

    Args:
        g: cumulated log2 decays of the chunk.
        weight_R: factor of a stacked row.
        beta_C: write strengths.
        C: tokens of a chunk.
        GATED: whether there are decays.

    Returns:
        The weight of a row with the decay since the chunk began [R], beta with the decay until it ends [C], the decay
        of the whole chunk, and by pair of row and writer the weight, beta and decay of a write that is read later [R, C].
    """
    i, r = tl.arange(0, C), tl.arange(0, 2 * C)
    later = (r % C)[:, None] > i[None, :]
    pair_RC = tl.where(later, weight_R[:, None] * beta_C[None, :], 0.0)
    since_R, until_C, whole = weight_R, beta_C, 1.0
    if GATED:
        g_R, g_C, g_all = tl.load(g + r % C), tl.load(g + i), tl.load(g + C - 1)
        since_R, until_C, whole = weight_R * tl.exp2(g_R), beta_C * tl.exp2(g_all - g_C), tl.exp2(g_all)
        # Only exponents that are <= 0 are used; those of earlier readers would overflow and are masked before.
        pair_RC = pair_RC * tl.exp2(tl.where(later, g_R[:, None] - g_C[None, :], 0.0))
    return since_R, until_C, whole, pair_RC


@entry(do_not_specialize=SIZES)
def gradients_kernel(
    q, k, do, beta, g, errors, solved, states, dstates, dq, dk, dv, dbeta, dgate,
    q_b: tl.int64, q_t: tl.int64, q_h: tl.int64, k_b: tl.int64, k_t: tl.int64, k_h: tl.int64,
    do_b: tl.int64, do_t: tl.int64, do_h: tl.int64,
    length: tl.int32, chunks: tl.int32, batches: tl.int32, heads: tl.int32, group: tl.int32,
    K: tl.constexpr, V: tl.constexpr, TK: tl.constexpr, BV: tl.constexpr, UNIT: tl.constexpr, C: tl.constexpr,
    TV: tl.constexpr, GATED: tl.constexpr, GATE_GRAD: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: (B * H * N * key tiles,), a tile being TK columns of dq and dk and TV of dv; values are summed BV at a time.

    `dgate` is [key tiles, B, T, H]; its sum over the first axis is
    the gradient of the log decays, of which each is part of G of its own and all later tokens of the chunk.
    """
    TILES: tl.constexpr = (K + TK - 1) // TK
    program = tl.program_id(0).to(tl.int64)
    chunk_index, tile = program // TILES, program % TILES
    head_index, chunk = chunk_index // chunks, chunk_index % chunks
    batch, head = head_index // heads, head_index % heads
    i, r, d = tl.arange(0, C), tl.arange(0, 2 * C), (tile * TK).to(tl.int32) + tl.arange(0, TK)
    is_first, t_C, t_R = r < C, (chunk * C).to(tl.int32) + i, (chunk * C).to(tl.int32) + r % C
    row, live_C = batch * length * heads + head, t_C < length
    row_C = row + t_C.to(tl.int64) * heads
    q_base, q_stride = q + (batch * q_b + (head // group) * q_h) * UNIT, q_t * UNIT
    k_base, k_stride = k + (batch * k_b + (head // group) * k_h) * UNIT, k_t * UNIT
    do_base, do_stride = do + (batch * do_b + head * do_h) * UNIT, do_t * UNIT
    beta_C = tl.load(beta + row_C, mask=live_C, other=0.0).to(tl.float32)
    beta_R = tl.load(beta + row + t_R.to(tl.int64) * heads, mask=t_R < length, other=0.0).to(tl.float32)
    since_R, until_C, whole, pair_RC = _decays(g + chunk_index * C, tl.where(is_first, 1.0, -beta_R), beta_C, C, GATED)
    k_CK = _load_rows(k_base, k_stride, t_C, d, length, K, DOT)
    reads_RK, writes_KC = tl.zeros([2 * C, TK], tl.float32), tl.zeros([TK, C], tl.float32)
    own_R, dg_all = tl.zeros([2 * C], tl.float32), 0.0
    for v_start in tl.range(0, V, BV, num_stages=1):
        e = v_start + tl.arange(0, BV)
        both_RV = _load_stacked(do_base, do_stride, solved + row * V, heads * V, t_R, is_first, e, length, V, DOT)
        error_CV = tl.load(errors + row_C[:, None] * V + e[None, :], mask=live_C[:, None] & (e < V)[None, :], other=0.0)
        state_KV, dstate_KV = _load_states(states, dstates, chunk_index, d, e, K, V)
        if GATE_GRAD:
            dg_all += whole * tl.sum(tl.sum(state_KV.to(tl.float32) * dstate_KV.to(tl.float32), 1), 0)
        scores_RC = tl.dot(both_RV, tl.trans(error_CV), input_precision=PRECISION)
        own_R += tl.sum(tl.where((r % C)[:, None] == i[None, :], scores_RC, 0.0), 1)
        scores_RC = (scores_RC * pair_RC).to(DOT)
        reads_RK += tl.dot(both_RV, tl.trans(state_KV), input_precision=PRECISION) * since_R[:, None]
        reads_RK = tl.dot(scores_RC, k_CK, reads_RK, input_precision=PRECISION)
        carried_KC = tl.dot(dstate_KV, tl.trans(error_CV), input_precision=PRECISION) * until_C[None, :]
        if GATE_GRAD:
            dg_all += tl.sum(tl.sum(carried_KC * tl.trans(k_CK).to(tl.float32), 1), 0)
        # The transposed scores are a right operand: as a left one, a transposed accumulator is miscompiled on Hopper.
        qk_RK = _load_stacked(q_base, q_stride, k_base, k_stride, t_R, is_first, d, length, K, DOT)
        writes_KC = tl.dot(tl.trans(qk_RK), scores_RC, writes_KC + carried_KC, input_precision=PRECISION)
    dq_CK, dk_CK = _unstacked(reads_RK, C)
    write_CK = tl.trans(writes_KC)
    own_C, dbeta_C = tl.split(tl.trans(tl.reshape(own_R, [2, C])))
    q_wide, k_wide = _load_rows(q_base, q_stride, t_C, d, length, K, DOT).to(tl.float32), k_CK.to(tl.float32)
    if GATE_GRAD:
        dg_C = tl.sum(q_wide * dq_CK + k_wide * (dk_CK - write_CK), 1)
        later_C = tl.sum(dg_C, 0) - tl.cumsum(dg_C, 0) + dg_C
        tl.store(dgate + tile * batches * length * heads + row_C, later_C + dg_all, mask=live_C)
    _store_rows(dq, dq_CK + (own_C * beta_C)[:, None] * k_wide, row_C, live_C, d, K)
    _store_rows(dk, dk_CK + write_CK + (own_C * beta_C)[:, None] * q_wide, row_C, live_C, d, K)
    if tile == 0:
        tl.store(dbeta + row_C, dbeta_C.to(dbeta.dtype.element_ty), mask=live_C)
    e = (tile * TV).to(tl.int32) + tl.arange(0, TV)
    y_CV = tl.load(solved + row_C[:, None] * V + e[None, :], mask=live_C[:, None] & (e < V)[None, :], other=0.0)
    _store_rows(dv, y_CV.to(tl.float32) * beta_C[:, None], row_C, live_C, e, V)
