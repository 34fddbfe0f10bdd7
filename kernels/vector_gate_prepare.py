"""What the walks over chunks need of a chunk's pairs of tokens, for all chunks at once: decays, scores and couplings.

With G the cumulated log decay of a chunk and S the state that enters it, the recurrence of a chunk is

    E = V - K' S  without the delta rule: E = V,    O = Q' S + P U,    S <- exp(G_C) S + W^T U,    U = beta E

    Q' = Q exp(G),  W = K exp(G_C - G),  P = tril(Q K^T o exp(G_i - G_j)),  M = tril(K K^T o exp(G_i - G_j), -1)
    E = (I + M beta)^-1 R,   R = V - K exp(G) S

The inverse is I - H beta with H = M (I + beta M)^-1, and that of the gradients I - H^T beta, see `kernels.delta_triton`.
With keys F of their own for the erasure, which read before the decay of their token, M = tril(F K^T o exp(G_{i-1} - G_j), -1)
and F exp(G_{i-1}) takes the place of K exp(G).

Shape legend: B batch, T time, H heads, N chunks, C tokens of a chunk, K key, V value width.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.delta_triton import _coupling
from kernels.vector_gate_middle import from_middle, half_sums, load_gates
from kernels.vector_gate_rows import load_beta, load_rows
from kernels.vector_gate_tree import LOG2_E, in_terms, paired, past_to_boundary, to_boundary


@triton.jit
def prepare_kernel(
    q, k, f, gate, beta, halves, rough, scores, couplings,
    q_b: tl.int64, q_t: tl.int32, q_h: tl.int64, k_b: tl.int64, k_t: tl.int32, k_h: tl.int64,
    f_b: tl.int64, f_t: tl.int32, f_h: tl.int64, gate_b: tl.int64, gate_t: tl.int32, gate_h: tl.int64,
    length: tl.int32, heads: tl.int32,
    K: tl.constexpr, KP: tl.constexpr, BK: tl.constexpr, UNIT: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr,
    DELTA: tl.constexpr, OWN: tl.constexpr, TERMS: tl.constexpr, GENTLE: tl.constexpr,
    DOT: tl.constexpr, MERGE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: (B * H * N,). Strides count UNIT elements.

    halves gets the log2 decays of the halves, [B, H, N, 2, KP], rough whether one is below -GENTLE, [B, H, N], scores and
    couplings get P and H, [B, H, N, C, C]. OWN says that f holds the keys of the erasure, TERMS is for `in_terms`.
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
    lowest = 0.0
    for first in tl.static_range(0, KP, BK):
        cols = first + tl.arange(0, BK)
        early_K, late_K = half_sums(load_gates(gate, gate_t * UNIT, i_C, cols, left, K, TERMS), i_C, C, TERMS)
        tl.store(halves + block * 2 * KP + cols, early_K)
        tl.store(halves + block * 2 * KP + KP + cols, late_K)
        lowest = tl.minimum(lowest, tl.min(tl.minimum(early_K, late_K), 0))
    is_rough = lowest < -GENTLE
    tl.store(rough + block, is_rough.to(tl.int32))
    p_CC = tl.zeros([C, C], tl.float32)
    m_CC = tl.zeros([C, C], tl.float32) if DELTA else tl.zeros([1, 1], tl.float32)
    if is_rough:
        p_CC, m_CC = _from_tree(
            q, k, f, gate, q_t * UNIT, k_t * UNIT, f_t * UNIT, gate_t * UNIT, p_CC, m_CC, i_C, left,
            K, KP, BK, LEVELS, DELTA, OWN, TERMS, DOT, PRECISION,
        )  # fmt: skip
    else:
        p_CC, m_CC = _from_middle(
            q, k, f, gate, q_t * UNIT, k_t * UNIT, f_t * UNIT, gate_t * UNIT, p_CC, m_CC, i_C, left,
            K, KP, BK, C, DELTA, OWN, TERMS, DOT, PRECISION,
        )  # fmt: skip
    by_pair_CC = i_C[:, None] * C + i_C[None, :]
    tl.store(scores + block * C * C + by_pair_CC, p_CC.to(DOT))
    if DELTA:
        beta_C = load_beta(beta + (batch * length + start) * heads + head, heads, i_C, left)
        tl.store(couplings + block * C * C + by_pair_CC, _coupling(m_CC, beta_C, C, LEVELS, MERGE, PRECISION).to(DOT))


@triton.jit
def _from_middle(
    q, k, f, gate, q_t, k_t, f_t, gate_t, p_CC, m_CC, i_C, left,
    K: tl.constexpr, KP: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, DELTA: tl.constexpr, OWN: tl.constexpr,
    TERMS: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """P and M of a gentle chunk."""
    for first in range(0, KP, BK):
        cols = first + tl.arange(0, BK)
        q_CK = load_rows(q, q_t, i_C, cols, left, K, DOT)
        k_CK = load_rows(k, k_t, i_C, cols, left, K, DOT)
        gate_CK = load_gates(gate, gate_t, i_C, cols, left, K, TERMS)
        exponent_CK = from_middle(gate_CK, i_C, C, TERMS)
        late_CK = tl.exp2(exponent_CK)
        write_CK = (k_CK * tl.exp2(-exponent_CK)).to(DOT)
        read_CK = (q_CK * late_CK).to(DOT)
        p_CC = tl.dot(read_CK, tl.trans(write_CK), p_CC, input_precision=PRECISION)
        if DELTA:
            f_CK = k_CK
            if OWN:
                f_CK = load_rows(f, f_t, i_C, cols, left, K, DOT)
                late_CK = tl.exp2(exponent_CK - gate_CK * LOG2_E)
            erase_CK = (f_CK * late_CK).to(DOT)
            m_CC = tl.dot(erase_CK, tl.trans(write_CK), m_CC, input_precision=PRECISION)
    p_CC = tl.where(i_C[:, None] >= i_C[None, :], p_CC, 0.0)
    if DELTA:
        m_CC = tl.where(i_C[:, None] > i_C[None, :], m_CC, 0.0)
    return p_CC, m_CC


@triton.jit
def _from_tree(
    q, k, f, gate, q_t, k_t, f_t, gate_t, p_CC, m_CC, i_C, left,
    K: tl.constexpr, KP: tl.constexpr, BK: tl.constexpr, LEVELS: tl.constexpr, DELTA: tl.constexpr, OWN: tl.constexpr,
    TERMS: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """P and M of a chunk with any decays."""
    own_C = tl.zeros_like(i_C).to(tl.float32)
    for first in range(0, KP, BK):
        cols = first + tl.arange(0, BK)
        q_CK = load_rows(q, q_t, i_C, cols, left, K, DOT).to(tl.float32)
        k_CK = load_rows(k, k_t, i_C, cols, left, K, DOT).to(tl.float32)
        f_CK = k_CK
        if OWN:
            f_CK = load_rows(f, f_t, i_C, cols, left, K, DOT).to(tl.float32)
        high_CK, low_CK = in_terms(load_gates(gate, gate_t, i_C, cols, left, K, TERMS), TERMS)
        own_C += tl.sum(q_CK * k_CK, 1)
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
    return p_CC + tl.where(i_C[:, None] == i_C[None, :], own_C[:, None], 0.0), m_CC
