"""What the walks over chunks need from queries, keys and gates, for all chunks at once.

With G the cumulated log decay of a chunk and S the state that enters it, the recurrence of a chunk is

    E = V - K' S  without the delta rule: E = V,    O = Q' S + P U,    S <- exp(G_C) S + W^T U,    U = beta E

    Q' = Q exp(G),  W = K exp(G_C - G),  P = tril(Q K^T o exp(G_i - G_j)),  M = tril(K K^T o exp(G_i - G_j), -1)
    E = (I + M beta)^-1 (V - K exp(G) S)

so that Q', W, P, exp(G_C) and, with the inverse multiplied out, K' = (I + M beta)^-1 K exp(G) and V' = (I + M beta)^-1 V are
all that the walks need: they see no gate.
With keys F of their own for the erasure, which read before the decay of their token, M = tril(F K^T o exp(G_{i-1} - G_j), -1)
and F exp(G_{i-1}) take the place of K exp(G) in K'.

Shape legend: B batch, T time, H heads, N chunks, C tokens of a chunk, K key, V value width.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.vector_gate_tree import at_boundary, at_middle, gentle, keep_for_boundaries, late_half, paired
from kernels.walk_triton import LOG2_E, _load_rows


@triton.jit
def log2_decays(gate, stride, t_C, cols, length, WIDTH: tl.constexpr):
    """Log2 decays of rows t_C; padding does not decay."""
    return _load_rows(gate, stride, t_C, cols, length, WIDTH, tl.float32) * LOG2_E


@triton.jit
def load_beta(beta, stride, t_C, length):
    """Write strengths of rows t_C; padding writes nothing."""
    return tl.load(beta + t_C.to(tl.int64) * stride, mask=t_C < length, other=0.0).to(tl.float32)


@triton.jit
def unit_lower_inverse(strict_CC, i_C, LEVELS: tl.constexpr, PRECISION: tl.constexpr):
    """(I + strict)^-1 by doubling the blocks of the diagonal: [[A, 0], [B, D]]^-1 = [[A', 0], [-D' B A', D']].

    It does the operations of a substitution, with no power of the matrix, and so needs no bound on its entries.
    """
    inverse_CC = tl.where(i_C[:, None] == i_C[None, :], 1.0, 0.0) - tl.where(paired(i_C[:, None], i_C[None, :], 1), strict_CC, 0.0)
    for level in range(2, LEVELS + 1):
        below_CC = tl.where(paired(i_C[:, None], i_C[None, :], level), strict_CC, 0.0)
        left_CC = tl.dot(inverse_CC, below_CC, input_precision=PRECISION)
        inverse_CC -= tl.dot(left_CC, inverse_CC, input_precision=PRECISION)
    return inverse_CC


@triton.jit
def _scores_and_keys(
    q, q_stride, k, k_stride, f, f_stride, gate, gate_stride, decays, reads, writes, carry, t_C, i_C, length,
    K: tl.constexpr, KP: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr, DELTA: tl.constexpr,
    OWN: tl.constexpr, GENTLE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """P and M of one chunk; Q', W and exp(G_C) go to memory."""
    p_CC = tl.zeros([C, C], tl.float32)
    m_CC = tl.zeros([C, C], tl.float32)
    own_C = tl.zeros([C], tl.float32)
    for start in range(0, KP, BK):
        cols = start + tl.arange(0, BK)
        q_CK = _load_rows(q, q_stride, t_C, cols, length, K, DOT)
        k_CK = _load_rows(k, k_stride, t_C, cols, length, K, DOT)
        step_CK = log2_decays(gate, gate_stride, t_C, cols, length, K)
        g_CK, last_K = tl.cumsum(step_CK, 0), tl.sum(step_CK, 0)
        wide_q_CK, wide_k_CK = q_CK.to(tl.float32), k_CK.to(tl.float32)
        own_C += tl.sum(wide_q_CK * wide_k_CK, 1)
        offsets_CK = i_C[:, None] * KP + cols[None, :]
        tl.store(reads + offsets_CK, (wide_q_CK * tl.exp2(g_CK)).to(DOT))
        tl.store(writes + offsets_CK, (wide_k_CK * tl.exp2(last_K[None, :] - g_CK)).to(DOT))
        tl.store(carry + cols, tl.exp2(last_K))
        erase_CK, past_CK = wide_k_CK, g_CK
        if OWN:
            erase_CK = _load_rows(f, f_stride, t_C, cols, length, K, DOT).to(tl.float32)
            past_CK = g_CK - step_CK
        middle_1K = at_middle(g_CK, i_C, C)
        if gentle(g_CK - middle_1K, GENTLE):
            late_CK = tl.exp2(g_CK - middle_1K)
            early_KC = tl.trans((wide_k_CK * tl.exp2(middle_1K - g_CK)).to(DOT))
            below_CC = i_C[:, None] > i_C[None, :]
            p_CC += tl.where(below_CC, tl.dot((wide_q_CK * late_CK).to(DOT), early_KC, input_precision=PRECISION), 0.0)
            if DELTA:
                if OWN:
                    late_CK = tl.exp2(past_CK - middle_1K)
                m_CC += tl.where(below_CC, tl.dot((erase_CK * late_CK).to(DOT), early_KC, input_precision=PRECISION), 0.0)
        else:
            keep_for_boundaries(decays + offsets_CK, g_CK)
            for level in range(1, LEVELS + 1):
                is_late = late_half(i_C, level)[:, None]
                boundary_CK = at_boundary(decays + offsets_CK, KP, i_C, level)
                decay_CK = tl.exp2(tl.where(is_late, g_CK - boundary_CK, boundary_CK - g_CK))
                pairs_CC = paired(i_C[:, None], i_C[None, :], level)
                kd_CK = (wide_k_CK * decay_CK).to(DOT)
                qd_CK = (wide_q_CK * decay_CK).to(DOT)
                p_CC += tl.where(pairs_CC, tl.dot(qd_CK, tl.trans(kd_CK), input_precision=PRECISION), 0.0)
                if DELTA:
                    fd_CK = kd_CK
                    if OWN:
                        fd_CK = (erase_CK * tl.exp2(tl.where(is_late, past_CK - boundary_CK, 0.0))).to(DOT)
                    m_CC += tl.where(pairs_CC, tl.dot(fd_CK, tl.trans(kd_CK), input_precision=PRECISION), 0.0)
    return p_CC + tl.where(i_C[:, None] == i_C[None, :], own_C[:, None], 0.0), m_CC


@triton.jit
def prepare_kernel(
    q, k, v, f, gate, beta, decays, reads, writes, carry, scores, erases, targets, inverses,
    q_b: tl.int64, q_t: tl.int64, q_h: tl.int64, k_b: tl.int64, k_t: tl.int64, k_h: tl.int64,
    v_b: tl.int64, v_t: tl.int64, v_h: tl.int64, f_b: tl.int64, f_t: tl.int64, f_h: tl.int64,
    gate_b: tl.int64, gate_t: tl.int64, gate_h: tl.int64, length: tl.int32, heads: tl.int32,
    K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, UNIT: tl.constexpr,
    C: tl.constexpr, LEVELS: tl.constexpr, DELTA: tl.constexpr, OWN: tl.constexpr, SAVE: tl.constexpr,
    GENTLE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, SOLVE: tl.constexpr,
):  # fmt: skip
    """Grid: (B * H * N,). Strides count UNIT elements.

    reads, writes, erases (Q', W, K') and decays, a scratch, are [B, H, N, C, KP], carry is [B, H, N, KP], scores and
    inverses are [B, H, N, C, C], targets (V') is [B, T, H, V]. Columns of K beyond its width are zero, and their carry is
    one. inverses holds (I + beta M)^-1, which only the gradients need. OWN says that f holds the keys of the erasure.
    """
    chunks = tl.cdiv(length, C)
    block = tl.program_id(0).to(tl.int64)
    head_index, n = block // chunks, tl.program_id(0) % chunks
    batch, head = head_index // heads, head_index % heads
    i_C = tl.arange(0, C)
    t_C = n * C + i_C
    q += (batch * q_b + head * q_h) * UNIT
    k += (batch * k_b + head * k_h) * UNIT
    f += (batch * f_b + head * f_h) * UNIT
    gate += (batch * gate_b + head * gate_h) * UNIT
    p_CC, m_CC = _scores_and_keys(
        q, q_t * UNIT, k, k_t * UNIT, f, f_t * UNIT, gate, gate_t * UNIT, decays + block * C * KP,
        reads + block * C * KP, writes + block * C * KP, carry + block * KP, t_C, i_C, length,
        K, KP, BK, C, LEVELS, DELTA, OWN, GENTLE, DOT, PRECISION,
    )  # fmt: skip
    square_CC = i_C[:, None] * C + i_C[None, :]
    tl.store(scores + block * C * C + square_CC, p_CC.to(DOT))
    if DELTA:
        beta_C = load_beta(beta + batch * length * heads + head, heads, t_C, length)
        solve_CC = unit_lower_inverse(m_CC * beta_C[None, :], i_C, LEVELS, SOLVE)
        if SAVE:
            # (I + beta M)^-1 = I - beta (I + M beta)^-1 M
            other_CC = beta_C[:, None] * tl.dot(solve_CC, m_CC, input_precision=SOLVE)
            other_CC = tl.where(i_C[:, None] == i_C[None, :], 1.0, 0.0) - other_CC
            tl.store(inverses + block * C * C + square_CC, other_CC.to(DOT))
        solve_CC = solve_CC.to(DOT)
        for start in range(0, KP, BK):
            cols = start + tl.arange(0, BK)
            step_CK = log2_decays(gate, gate_t * UNIT, t_C, cols, length, K)
            g_CK = tl.cumsum(step_CK, 0)
            if OWN:
                key_CK = _load_rows(f, f_t * UNIT, t_C, cols, length, K, tl.float32) * tl.exp2(g_CK - step_CK)
            else:
                key_CK = _load_rows(k, k_t * UNIT, t_C, cols, length, K, tl.float32) * tl.exp2(g_CK)
            erase_CK = tl.dot(solve_CC, key_CK.to(DOT), input_precision=PRECISION)
            tl.store(erases + block * C * KP + i_C[:, None] * KP + cols[None, :], erase_CK.to(DOT))
        v += (batch * v_b + head * v_h) * UNIT
        targets += (batch * length * heads + head) * V
        for start in range(0, V, BV):
            cols = start + tl.arange(0, BV)
            v_CV = _load_rows(v, v_t * UNIT, t_C, cols, length, V, DOT)
            target_CV = tl.dot(solve_CC, v_CV, input_precision=PRECISION)
            inside = (t_C < length)[:, None] & (cols < V)[None, :]
            tl.store(targets + t_C[:, None].to(tl.int64) * heads * V + cols[None, :], target_CV.to(DOT), mask=inside)
