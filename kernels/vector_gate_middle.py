"""Decays of a chunk about its middle, which turn most chunks into those of attention without a gate.

With G the cumulated log decay of a chunk, G_m that of the last token of its early half and S the state that enters it, let
keys and queries, and the state itself, be decayed to the middle instead of the boundaries:

    Q' = Q exp(G - G_m),  W = K exp(G_m - G),  S_m = exp(G_m) S:    O = Q' S_m + tril(Q' W^T) U,  S <- exp(G_C - G_m) (S_m + W^T U)

Exponents have both signs, but cannot overflow where no channel decays by more than 2^-60 in either half: a gentle chunk. A
rough one takes the decays to its boundaries, Q' = Q exp(G), W = K exp(G_C - G), all exponents <= 0, and its scores are those of
`kernels.vector_gate_tree`. Each chunk decides for itself, and only factors of rows of the state differ:

    S_m = enter S,    O = Q' S_m + P U,    S <- leave (carry S_m + W^T U)

Matrices of tokens and channels are [C, K], or [K, C] where a function says BY_KEY.

Shape legend: C tokens of a chunk, a power of two; K channels.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.vector_gate_rows import load_rows
from kernels.vector_gate_tree import LOG2_E, in_terms, times_terms


@triton.jit
def load_gates(start, stride, i_C, d_K, left, K: tl.constexpr, TERMS: tl.constexpr):
    """Log decays of a chunk, in the dtype that `in_terms` wants."""
    return load_rows(start, stride, i_C, d_K, left, K, tl.bfloat16 if TERMS == 1 else tl.float32)


@triton.jit
def half_sums(gate, i_C, C: tl.constexpr, TERMS: tl.constexpr, BY_KEY: tl.constexpr):
    """Log2 decays [K] of the early and of the late half, of the terms that `from_middle` adds up."""
    high, low = in_terms(gate, TERMS)
    gate = high.to(tl.float32)
    if TERMS == 2:
        gate += low.to(tl.float32)
    is_late = i_C >= C // 2
    is_late = is_late[None, :] if BY_KEY else is_late[:, None]
    axis: tl.constexpr = 1 if BY_KEY else 0
    return tl.sum(tl.where(is_late, 0.0, gate), axis) * LOG2_E, tl.sum(tl.where(is_late, gate, 0.0), axis) * LOG2_E


@triton.jit
def from_middle(gate, i_C, C: tl.constexpr, TERMS: tl.constexpr, BY_KEY: tl.constexpr):
    """Log2 of the decay from the middle to each token, positive before it: one product with a matrix of -1, 0 and 1."""
    to_C, token_C = i_C[:, None], i_C[None, :]
    late_CC = (token_C >= C // 2) & (token_C <= to_C)
    early_CC = (token_C < C // 2) & (token_C > to_C)
    high, low = in_terms(gate, TERMS)
    return times_terms(tl.where(late_CC, 1.0, tl.where(early_CC, -1.0, 0.0)), high, low, TERMS, BY_KEY) * LOG2_E


@triton.jit
def reads_and_writes(gate, i_C, C: tl.constexpr, TERMS: tl.constexpr, ROUGH: tl.constexpr, BY_KEY: tl.constexpr):
    """Log2 decays of what reads from a chunk, and of what is written in it, of the shape of the log decays."""
    since = from_middle(gate, i_C, C, TERMS, BY_KEY)
    until = -since
    if ROUGH:
        early_K, late_K = half_sums(gate, i_C, C, TERMS, BY_KEY)
        since += early_K[:, None] if BY_KEY else early_K[None, :]
        until += late_K[:, None] if BY_KEY else late_K[None, :]
    return since, until


@triton.jit
def store_factors(factors, early_K, late_K, d_K, KP: tl.constexpr, ROUGH: tl.constexpr):
    """Writes the factors [2, KP] of the rows of a state: enter and leave, or -1 and carry. For three, a walk has no memory left."""
    tl.store(factors + d_K, tl.zeros_like(early_K) - 1.0 if ROUGH else tl.exp2(early_K))
    tl.store(factors + KP + d_K, tl.exp2(early_K + late_K if ROUGH else late_K))


@triton.jit
def load_factors(factors, block, d_K, KP: tl.constexpr):
    """The factors of the rows of a state: enter, carry, leave."""
    first_K, second_K = tl.load(factors + block * 2 * KP + d_K), tl.load(factors + block * 2 * KP + KP + d_K)
    is_rough = first_K < 0
    return tl.where(is_rough, 1.0, first_K), tl.where(is_rough, second_K, 1.0), tl.where(is_rough, 1.0, second_K)
