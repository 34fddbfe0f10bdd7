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

from kernels._entry import entry
from kernels.vector_gate_rows import load_rows
from kernels.vector_gate_tree import (
    decay_exponents,
    gentle,
    in_terms,
    late_half,
    paired,
    past_from_middle,
    past_to_boundary,
    to_boundary,
)


@entry
def prepare_kernel(
    q, k, f, gate, reads, writes, carry, scores, erases, inner,
    q_b: tl.int64, q_t: tl.int32, q_h: tl.int64, k_b: tl.int64, k_t: tl.int32, k_h: tl.int64,
    f_b: tl.int64, f_t: tl.int32, f_h: tl.int64, gate_b: tl.int64, gate_t: tl.int32, gate_h: tl.int64,
    length: tl.int32, heads: tl.int32,
    K: tl.constexpr, KP: tl.constexpr, BK: tl.constexpr, UNIT: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr,
    DELTA: tl.constexpr, OWN: tl.constexpr, TERMS: tl.constexpr, GENTLE: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: (B * H * N,). Strides count UNIT elements.

    reads, writes, erases (Q', W, K exp(G) or F exp(G_{i-1})) are [B, H, N, C, KP], carry is [B, H, N, KP], scores and inner
    (P, M) are [B, H, N, C, C]. Columns of K beyond its width are zero, and their carry is one. OWN says that f holds the keys
    of the erasure, TERMS is for `in_terms`.
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
    p_CC = tl.zeros([C, C], tl.float32)
    m_CC = tl.zeros([C, C], tl.float32) if DELTA else tl.zeros([1, 1], tl.float32)
    own_C = tl.zeros([C], tl.float32)
    none_C = tl.zeros_like(i_C) - 1
    for first in range(0, KP, BK):
        cols = first + tl.arange(0, BK)
        q_CK = load_rows(q, q_t * UNIT, i_C, cols, left, K, DOT).to(tl.float32)
        k_CK = load_rows(k, k_t * UNIT, i_C, cols, left, K, DOT).to(tl.float32)
        high_CK, low_CK = in_terms(load_rows(gate, gate_t * UNIT, i_C, cols, left, K, tl.float32), TERMS)
        own_C += tl.sum(q_CK * k_CK, 1)
        by_key_CK = i_C[:, None] * KP + cols[None, :]
        decay_CK = tl.exp2(decay_exponents(none_C, i_C, high_CK, low_CK, i_C, TERMS))
        tl.store(reads + by_key_CK, (q_CK * decay_CK).to(DOT))
        tl.store(carry + block * KP + i_C[:, None] * 0 + cols[None, :], decay_CK, mask=(i_C == C - 1)[:, None])
        rest_CK = tl.exp2(decay_exponents(i_C, none_C + C, high_CK, low_CK, i_C, TERMS))
        tl.store(writes + by_key_CK, (k_CK * rest_CK).to(DOT))
        f_CK = k_CK
        if OWN:
            f_CK = load_rows(f, f_t * UNIT, i_C, cols, left, K, DOT).to(tl.float32)
            decay_CK = tl.exp2(decay_exponents(none_C, i_C - 1, high_CK, low_CK, i_C, TERMS))
        if DELTA:
            tl.store(erases + by_key_CK, (f_CK * decay_CK).to(DOT))
        to_middle_CK = to_boundary(i_C, LEVELS, high_CK, low_CK, TERMS)
        if gentle(to_middle_CK, GENTLE):
            p_CC, m_CC = _from_middle(
                q_CK, k_CK, f_CK, to_middle_CK, high_CK, low_CK, p_CC, m_CC, i_C,
                C, LEVELS, DELTA, OWN, TERMS, GENTLE, DOT, PRECISION,
            )  # fmt: skip
        else:
            p_CC, m_CC = _from_tree(q_CK, k_CK, f_CK, high_CK, low_CK, p_CC, m_CC, i_C, LEVELS, DELTA, OWN, TERMS, DOT, PRECISION)
    own_CC = tl.where(i_C[:, None] == i_C[None, :], own_C[:, None], 0.0)
    by_pair_CC = i_C[:, None] * C + i_C[None, :]
    tl.store(scores + block * C * C + by_pair_CC, (p_CC + own_CC).to(DOT))
    if DELTA:
        tl.store(inner + block * C * C + by_pair_CC, m_CC)


@triton.jit
def _from_middle(
    q_CK, k_CK, f_CK, to_middle_CK, high_CK, low_CK, p_CC, m_CC, i_C, C: tl.constexpr, LEVELS: tl.constexpr,
    DELTA: tl.constexpr, OWN: tl.constexpr, TERMS: tl.constexpr, GENTLE: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds the part of some channels to P and M where all decays are gentle."""
    from_middle_CK = tl.where(late_half(i_C, LEVELS)[:, None], to_middle_CK, -to_middle_CK)
    late_CK = tl.exp2(from_middle_CK)
    early_KC = tl.trans((k_CK * tl.exp2(-from_middle_CK)).to(DOT))
    below_CC = i_C[:, None] > i_C[None, :]
    p_CC += tl.where(below_CC, tl.dot((q_CK * late_CK).to(DOT), early_KC, input_precision=PRECISION), 0.0)
    if DELTA:
        if OWN:
            late_CK = past_from_middle(i_C, high_CK, low_CK, C, TERMS, GENTLE)
        m_CC += tl.where(below_CC, tl.dot((f_CK * late_CK).to(DOT), early_KC, input_precision=PRECISION), 0.0)
    return p_CC, m_CC


@triton.jit
def _from_tree(
    q_CK, k_CK, f_CK, high_CK, low_CK, p_CC, m_CC, i_C, LEVELS: tl.constexpr, DELTA: tl.constexpr, OWN: tl.constexpr,
    TERMS: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds the part of some channels to P and M for any decays."""
    for level in range(1, LEVELS + 1):
        decay_CK = tl.exp2(to_boundary(i_C, level, high_CK, low_CK, TERMS))
        pairs_CC = paired(i_C[:, None], i_C[None, :], level)
        kd_CK, qd_CK = (k_CK * decay_CK).to(DOT), (q_CK * decay_CK).to(DOT)
        p_CC += tl.where(pairs_CC, tl.dot(qd_CK, tl.trans(kd_CK), input_precision=PRECISION), 0.0)
        if DELTA:
            fd_CK = kd_CK
            if OWN:
                fd_CK = (f_CK * tl.exp2(past_to_boundary(i_C, level, high_CK, low_CK, TERMS))).to(DOT)
            m_CC += tl.where(pairs_CC, tl.dot(fd_CK, tl.trans(kd_CK), input_precision=PRECISION), 0.0)
    return p_CC, m_CC
