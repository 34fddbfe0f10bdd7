"""What the walks over chunks need of a chunk's pairs of tokens, for all chunks at once: decays, scores and couplings.

With G the cumulated log decay of a chunk and S the state that enters it, the recurrence of a chunk is

    E = V - K' S  without the delta rule: E = V,    O = Q' S + P U,    S <- exp(G_C) S + W^T U,    U = beta E

    Q' = Q exp(G),  W = K exp(G_C - G),  P = tril(Q K^T o exp(G_i - G_j)),  M = tril(K K^T o exp(G_i - G_j), -1)
    E = (I + M beta)^-1 R,   R = V - K exp(G) S

The inverse is I - H beta with H = M (I + beta M)^-1, and that of the gradients I - H^T beta, see `kernels.delta_rule.delta_triton`.
With keys F of their own for the erasure, which read before the decay of their token, M = tril(F K^T o exp(G_{i-1} - G_j), -1)
and F exp(G_{i-1}) takes the place of K exp(G).

Shape legend: B batch, T time, H heads, N chunks, C tokens of a chunk, K key, V value width.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels._entry import entry
from kernels.vector_gates.vector_gate_middle import half_decay, load_gates, reads_and_writes, store_factors
from kernels.vector_gates.vector_gate_rows import SIZES, hidden, load_rows
from kernels.vector_gates.vector_gate_tree import LOG2_E, in_blocks, in_terms, paired, past_in_blocks, past_to_boundary, to_boundary


@entry(do_not_specialize=SIZES)
def prepare_kernel(
    q, k, f, gate, levels, factors, reads, writes, erases, scores, systems,
    q_b: tl.int64, q_t: tl.int32, q_h: tl.int64, k_b: tl.int64, k_t: tl.int32, k_h: tl.int64,
    f_b: tl.int64, f_t: tl.int32, f_h: tl.int64, gate_b: tl.int64, gate_t: tl.int32, gate_h: tl.int64,
    length: tl.int32, heads: tl.int32,
    K: tl.constexpr, KP: tl.constexpr, BK: tl.constexpr, UNIT: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr,
    DELTA: tl.constexpr, OWN: tl.constexpr, TERMS: tl.constexpr, GENTLE: tl.constexpr, ROUGH: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: (B * H * N,). A first launch takes every chunk for a gentle one, one with ROUGH those that it found rough.

    Strides count UNIT elements. factors gets those of the rows of states, [B, H, N, 2, KP], levels the log2 of the tokens of
    gentle blocks, [B, H, N]; reads, writes and erases get Q', W and K', [B, H, N, C, KP], scores P and systems M transposed,
    [B, H, N, C, C]. OWN says that f holds the keys of the erasure, TERMS is for `in_terms`.
    """
    chunks = tl.cdiv(length, C)
    block = tl.program_id(0).to(tl.int64)
    head_index, n = block // chunks, tl.program_id(0) % chunks
    batch, head = head_index // heads, head_index % heads
    i_C, start, left = tl.arange(0, C), n.to(tl.int64) * C, length - n * C
    token_C = hidden(i_C, length)
    gate += (batch * gate_b + head * gate_h + start * gate_t) * UNIT
    factors += block * 2 * KP
    q += (batch * q_b + head * q_h + start * q_t) * UNIT
    k += (batch * k_b + head * k_h + start * k_t) * UNIT
    f += (batch * f_b + head * f_h + start * f_t) * UNIT
    reads, writes, erases = reads + block * C * KP, writes + block * C * KP, erases + block * C * KP
    scores, systems, level = scores + block * C * C, systems + block * C * C, tl.full([], LEVELS, tl.int32)
    if not ROUGH:
        lowest = _keys_and_scores(
            q, k, f, gate, q_t * UNIT, k_t * UNIT, f_t * UNIT, gate_t * UNIT, factors, reads, writes, erases, scores, systems,
            i_C, token_C, left, level, K, KP, BK, C, LEVELS, DELTA, OWN, TERMS, GENTLE, False, DOT, PRECISION,
        )  # fmt: skip
        tl.store(levels + block, tl.where(lowest < -GENTLE, -1, LEVELS))
    elif tl.load(levels + block) < 0:
        level = _gentle_level(gate, gate_t * UNIT, i_C, token_C, left, K, KP, BK, TERMS, LEVELS, GENTLE)
        _keys_and_scores(
            q, k, f, gate, q_t * UNIT, k_t * UNIT, f_t * UNIT, gate_t * UNIT, factors, reads, writes, erases, scores, systems,
            i_C, token_C, left, level, K, KP, BK, C, LEVELS, DELTA, OWN, TERMS, GENTLE, True, DOT, PRECISION,
        )  # fmt: skip
        tl.store(levels + block, level)


@triton.jit
def _gentle_level(
    gate, gate_t, i_C, token_C, left,
    K: tl.constexpr, KP: tl.constexpr, BK: tl.constexpr, TERMS: tl.constexpr, LEVELS: tl.constexpr, GENTLE: tl.constexpr,
):  # fmt: skip
    """Log2 of the tokens of the longest blocks that are gentle, all of them and in every channel; one token always is."""
    level, highest = tl.full([], LEVELS, tl.int32), tl.full([], GENTLE + 1.0, tl.float32)
    while (highest > GENTLE) & (level > 0):
        level -= 1
        highest = tl.full([], 0.0, tl.float32)
        for first in range(0, KP, BK):
            gate_CK = load_gates(gate, gate_t, i_C, first + tl.arange(0, BK), left, K, TERMS)
            high_CK, low_CK = in_terms(gate_CK, TERMS)
            highest = tl.maximum(highest, tl.max(tl.max(in_blocks(token_C, level, high_CK, low_CK, TERMS, False), 1), 0))
    return level


@triton.jit
def _keys_and_scores(
    q, k, f, gate, q_t, k_t, f_t, gate_t, factors, reads, writes, erases, scores, systems,
    i_C, token_C, left, level,
    K: tl.constexpr, KP: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr, DELTA: tl.constexpr,
    OWN: tl.constexpr, TERMS: tl.constexpr, GENTLE: tl.constexpr, TREE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Writes Q', W, K', P, M and the factors, and returns the least of the half decays."""
    p_CC, m_CC, lowest = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32), 0.0
    for first in range(0, KP, BK):
        cols = first + tl.arange(0, BK)
        q_CK = load_rows(q, q_t, i_C, cols, left, K, DOT)
        k_CK = load_rows(k, k_t, i_C, cols, left, K, DOT)
        gate_CK = load_gates(gate, gate_t, i_C, cols, left, K, TERMS)
        half_K = half_decay(gate_CK, TERMS, False)
        store_factors(factors, half_K, cols, KP, TREE)
        lowest = tl.minimum(lowest, tl.min(half_K, 0))
        since_CK, until_CK = reads_and_writes(gate_CK, token_C, TERMS, TREE, False)
        f_CK, past_CK = k_CK, since_CK
        if OWN:
            f_CK = load_rows(f, f_t, i_C, cols, left, K, DOT)
            past_CK = since_CK - gate_CK * LOG2_E
        if not TREE:  # of a chunk that is rough, the products would overflow for nothing
            since_CK = tl.clamp(since_CK, -GENTLE, GENTLE)
            until_CK, past_CK = -since_CK, tl.clamp(past_CK, -GENTLE, GENTLE) if OWN else since_CK
        read_CK, write_CK = (q_CK * tl.exp2(since_CK)).to(DOT), (k_CK * tl.exp2(until_CK)).to(DOT)
        by_key_CK = i_C[:, None] * KP + cols[None, :]
        tl.store(reads + by_key_CK, read_CK)
        tl.store(writes + by_key_CK, write_CK)
        if DELTA:
            erase_CK = (f_CK * tl.exp2(past_CK)).to(DOT)
            tl.store(erases + by_key_CK, erase_CK)
        if TREE:
            p_CC, m_CC = _from_tree(
                q_CK, k_CK, f_CK, gate_CK, p_CC, m_CC, token_C, level, LEVELS, DELTA, OWN, TERMS, DOT, PRECISION
            )
        else:
            p_CC = tl.dot(read_CK, tl.trans(write_CK), p_CC, input_precision=PRECISION)
            if DELTA:
                m_CC = tl.dot(erase_CK, tl.trans(write_CK), m_CC, input_precision=PRECISION)
    seen_CC, before_CC = token_C[:, None] >= token_C[None, :], token_C[:, None] > token_C[None, :]
    tl.store(scores + i_C[:, None] * C + i_C[None, :], tl.where(seen_CC, p_CC, 0.0).to(DOT))
    if DELTA:
        tl.store(systems + i_C[:, None] + i_C[None, :] * C, tl.where(before_CC, m_CC, 0.0).to(systems.dtype.element_ty))
    return lowest


@triton.jit
def _from_tree(
    q_CK, k_CK, f_CK, gate_CK, p_CC, m_CC, i_C, gentle, LEVELS: tl.constexpr, DELTA: tl.constexpr, OWN: tl.constexpr,
    TERMS: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds the part of some channels to P and to M, for any decays: of blocks of 2^gentle tokens about their middles."""
    high_CK, low_CK = in_terms(gate_CK, TERMS)
    since_CK = in_blocks(i_C, gentle, high_CK, low_CK, TERMS, False)
    near_CC = (i_C[:, None] >> gentle) == (i_C[None, :] >> gentle)
    kd_CK, decay_CK = (k_CK * tl.exp2(-since_CK)).to(DOT), tl.exp2(since_CK)
    p_CC += tl.where(near_CC, tl.dot((q_CK * decay_CK).to(DOT), tl.trans(kd_CK), input_precision=PRECISION), 0.0)
    if DELTA:
        if OWN:
            decay_CK = tl.exp2(past_in_blocks(since_CK, gate_CK, i_C, gentle, False))
        m_CC += tl.where(near_CC, tl.dot((f_CK * decay_CK).to(DOT), tl.trans(kd_CK), input_precision=PRECISION), 0.0)
    for level in range(gentle + 1, LEVELS + 1):
        decay_CK = tl.exp2(to_boundary(i_C, level, high_CK, low_CK, TERMS, False))
        pairs_CC = paired(i_C[:, None], i_C[None, :], level)
        kd_CK, qd_CK = (k_CK * decay_CK).to(DOT), (q_CK * decay_CK).to(DOT)
        p_CC += tl.where(pairs_CC, tl.dot(qd_CK, tl.trans(kd_CK), input_precision=PRECISION), 0.0)
        if DELTA:
            fd_CK = kd_CK
            if OWN:
                fd_CK = (f_CK * tl.exp2(past_to_boundary(i_C, level, high_CK, low_CK, TERMS, False))).to(DOT)
            m_CC += tl.where(pairs_CC, tl.dot(fd_CK, tl.trans(kd_CK), input_precision=PRECISION), 0.0)
    return p_CC, m_CC
