"""What the walks over chunks need from queries, keys and gates, for all chunks at once: scores, and keys with their decays.

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

from kernels.vector_gate_rows import load_log2_decays, load_rows
from kernels.vector_gate_tree import at_boundary, at_middle, gentle, keep_for_boundaries, late_half, paired, past_late


@triton.jit
def prepare_kernel(
    q, k, f, gate, decays, reads, writes, carry, scores, erases, inner,
    q_b: tl.int64, q_t: tl.int32, q_h: tl.int64, k_b: tl.int64, k_t: tl.int32, k_h: tl.int64,
    f_b: tl.int64, f_t: tl.int32, f_h: tl.int64, gate_b: tl.int64, gate_t: tl.int32, gate_h: tl.int64,
    length: tl.int32, heads: tl.int32,
    K: tl.constexpr, KP: tl.constexpr, BK: tl.constexpr, UNIT: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr,
    DELTA: tl.constexpr, OWN: tl.constexpr, SAVE: tl.constexpr, GENTLE: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: (B * H * N,). Strides count UNIT elements.

    reads, writes, erases (Q', W, K exp(G) or F exp(G_{i-1})) and decays are [B, H, N, C, KP], carry is [B, H, N, KP], scores and
    inner (P, M) are [B, H, N, C, C]. Columns of K beyond its width are zero, and their carry is one. decays gets the
    cumulated log2 decays where the tree needs them, and with SAVE all. OWN says that f holds the keys of the erasure.
    """
    chunks = tl.cdiv(length, C)
    block = tl.program_id(0).to(tl.int64)
    head_index, n = block // chunks, tl.program_id(0) % chunks
    batch, head = head_index // heads, head_index % heads
    i_C, start, left = tl.arange(0, C), n.to(tl.int64) * C, length - n * C
    q += (batch * q_b + head * q_h + start * q_t) * UNIT
    k += (batch * k_b + head * k_h + start * k_t) * UNIT
    f += (batch * f_b + head * f_h + start * f_t) * UNIT
    gate += (batch * gate_b + head * gate_h + start * gate_t) * UNIT
    reads += block * C * KP
    writes += block * C * KP
    erases += block * C * KP
    decays += block * C * KP
    p_CC = tl.zeros([C, C], tl.float32)
    m_CC = tl.zeros([C, C], tl.float32) if DELTA else tl.zeros([1, 1], tl.float32)
    own_C = tl.zeros([C], tl.float32)
    for first in range(0, KP, BK):
        cols = first + tl.arange(0, BK)
        q_CK = load_rows(q, q_t * UNIT, i_C, cols, left, K, DOT).to(tl.float32)
        k_CK = load_rows(k, k_t * UNIT, i_C, cols, left, K, DOT).to(tl.float32)
        step_CK = load_log2_decays(gate, gate_t * UNIT, i_C, cols, left, K)
        g_CK, last_K = tl.cumsum(step_CK, 0), tl.sum(step_CK, 0)
        own_C += tl.sum(q_CK * k_CK, 1)
        by_key_CK = i_C[:, None] * KP + cols[None, :]
        tl.store(reads + by_key_CK, (q_CK * tl.exp2(g_CK)).to(DOT))
        tl.store(writes + by_key_CK, (k_CK * tl.exp2(last_K[None, :] - g_CK)).to(DOT))
        tl.store(carry + block * KP + cols, tl.exp2(last_K))
        f_CK, past_CK = k_CK, g_CK
        if OWN:
            f_CK, past_CK = load_rows(f, f_t * UNIT, i_C, cols, left, K, DOT).to(tl.float32), g_CK - step_CK
        if DELTA:
            tl.store(erases + by_key_CK, (f_CK * tl.exp2(past_CK)).to(DOT))
        if SAVE:
            tl.store(decays + by_key_CK, g_CK)
        middle_1K = at_middle(g_CK, i_C, C)
        if gentle(g_CK - middle_1K, GENTLE):
            p_CC, m_CC = _from_middle(
                q_CK, k_CK, f_CK, g_CK, past_CK, middle_1K, p_CC, m_CC, i_C, DELTA, OWN, GENTLE, DOT, PRECISION
            )
        else:
            p_CC, m_CC = _from_tree(
                q_CK, k_CK, f_CK, g_CK, past_CK, decays + by_key_CK, KP, p_CC, m_CC, i_C, LEVELS, DELTA, OWN, DOT, PRECISION
            )
    own_CC = tl.where(i_C[:, None] == i_C[None, :], own_C[:, None], 0.0)
    by_pair_CC = i_C[:, None] * C + i_C[None, :]
    tl.store(scores + block * C * C + by_pair_CC, (p_CC + own_CC).to(DOT))
    if DELTA:
        tl.store(inner + block * C * C + by_pair_CC, m_CC)


@triton.jit
def _from_middle(
    q_CK, k_CK, f_CK, g_CK, past_CK, middle_1K, p_CC, m_CC, i_C, DELTA: tl.constexpr, OWN: tl.constexpr,
    GENTLE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds the part of some channels to P and M where all decays are gentle."""
    late_CK = tl.exp2(g_CK - middle_1K)
    early_KC = tl.trans((k_CK * tl.exp2(middle_1K - g_CK)).to(DOT))
    below_CC = i_C[:, None] > i_C[None, :]
    p_CC += tl.where(below_CC, tl.dot((q_CK * late_CK).to(DOT), early_KC, input_precision=PRECISION), 0.0)
    if DELTA:
        if OWN:
            late_CK = past_late(past_CK, middle_1K, GENTLE)
        m_CC += tl.where(below_CC, tl.dot((f_CK * late_CK).to(DOT), early_KC, input_precision=PRECISION), 0.0)
    return p_CC, m_CC


@triton.jit
def _from_tree(
    q_CK, k_CK, f_CK, g_CK, past_CK, decays, row_stride, p_CC, m_CC, i_C, LEVELS: tl.constexpr, DELTA: tl.constexpr,
    OWN: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds the part of some channels to P and M for any decays."""
    keep_for_boundaries(decays, g_CK)
    for level in range(1, LEVELS + 1):
        is_late = late_half(i_C, level)[:, None]
        boundary_CK = at_boundary(decays, row_stride, i_C, level)
        decay_CK = tl.exp2(tl.where(is_late, g_CK - boundary_CK, boundary_CK - g_CK))
        pairs_CC = paired(i_C[:, None], i_C[None, :], level)
        kd_CK, qd_CK = (k_CK * decay_CK).to(DOT), (q_CK * decay_CK).to(DOT)
        p_CC += tl.where(pairs_CC, tl.dot(qd_CK, tl.trans(kd_CK), input_precision=PRECISION), 0.0)
        if DELTA:
            fd_CK = kd_CK
            if OWN:
                fd_CK = (f_CK * tl.exp2(tl.where(is_late, past_CK - boundary_CK, 0.0))).to(DOT)
            m_CC += tl.where(pairs_CC, tl.dot(fd_CK, tl.trans(kd_CK), input_precision=PRECISION), 0.0)
    return p_CC, m_CC
