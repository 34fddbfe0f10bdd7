"""Decays of a chunk about its middle, which turn most chunks into those of attention without a gate.

With G the cumulated log decay of a chunk and S the state that enters it, let keys and queries, and the state itself, be decayed
to where half of each channel's decay is done instead of to the boundaries:

    Q' = Q exp(G - G_C / 2),  W = K exp(G_C / 2 - G),  S_m = exp(G_C / 2) S:
    O = Q' S_m + tril(Q' W^T) U,  S <- exp(G_C / 2) (S_m + W^T U)

Exponents have both signs, but cannot overflow where half of what a channel decays by is above 2^-96: a gentle chunk. Products of
two factors may, but only those of a later key and an earlier query, which are masked. A rough chunk takes the decays to its
boundaries, Q' = Q exp(G), W = K exp(G_C - G), all exponents <= 0, and its scores are those of `vector_gate_tree`. Each
chunk decides for itself, and only factors of rows of the state differ:

    S_m = enter S,    O = Q' S_m + P U,    S <- leave (carry S_m + W^T U)

Matrices of tokens and channels are [C, K], or [K, C] where a function says BY_KEY.

Shape legend: C tokens of a chunk, a power of two; K channels.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.vector_gates.vector_gate_rows import load_rows
from kernels.vector_gates.vector_gate_tree import LOG2_E, in_terms, times_terms


@triton.jit
def load_gates(start, stride, i_C, d_K, left, K: tl.constexpr, TERMS: tl.constexpr):
    """Log decays of a chunk, in the dtype that `in_terms` wants."""
    return load_rows(start, stride, i_C, d_K, left, K, tl.bfloat16 if TERMS == 1 else tl.float32)


@triton.jit
def half_decay(gate, TERMS: tl.constexpr, BY_KEY: tl.constexpr):
    """Half of the log2 decays [K] of a chunk, of the terms that `from_middle` adds up."""
    high, low = in_terms(gate, TERMS)
    gate = high.to(tl.float32)
    if TERMS == 2:
        gate += low.to(tl.float32)
    axis: tl.constexpr = 1 if BY_KEY else 0
    return tl.sum(gate, axis) * (0.5 * LOG2_E)


@triton.jit
def from_middle(gate, i_C, TERMS: tl.constexpr, BY_KEY: tl.constexpr):
    """Log2 of the decay from the middle to each token, positive before it: one product with a matrix of halves."""
    high, low = in_terms(gate, TERMS)
    return times_terms(tl.where(i_C[None, :] <= i_C[:, None], 0.5, -0.5), high, low, TERMS, BY_KEY) * LOG2_E


@triton.jit
def reads_and_writes(gate, i_C, TERMS: tl.constexpr, ROUGH: tl.constexpr, BY_KEY: tl.constexpr):
    """Log2 decays of what reads from a chunk, and of what is written in it, of the shape of the log decays."""
    if ROUGH:
        high, low = in_terms(gate, TERMS)
        read_CC = tl.where(i_C[None, :] <= i_C[:, None], 1.0, 0.0)
        since = times_terms(read_CC, high, low, TERMS, BY_KEY) * LOG2_E
        until = times_terms(1.0 - read_CC, high, low, TERMS, BY_KEY) * LOG2_E
    else:
        since = from_middle(gate, i_C, TERMS, BY_KEY)
        until = -since
    return since, until


@triton.jit
def store_factors(factors, half_K, d_K, KP: tl.constexpr, ROUGH: tl.constexpr):
    """Writes the factors [2, KP] of the rows of a state: enter and leave, or -1 and carry. For three, a walk has no memory left."""
    tl.store(factors + d_K, tl.zeros_like(half_K) - 1.0 if ROUGH else tl.exp2(half_K))
    tl.store(factors + KP + d_K, tl.exp2(2 * half_K if ROUGH else half_K))


@triton.jit
def load_factors(factors, block, d_K, KP: tl.constexpr):
    """The factors of the rows of a state: enter, carry, leave."""
    first_K, second_K = tl.load(factors + block * 2 * KP + d_K), tl.load(factors + block * 2 * KP + KP + d_K)
    is_rough = first_K < 0
    return tl.where(is_rough, 1.0, first_K), tl.where(is_rough, second_K, 1.0), tl.where(is_rough, 1.0, second_K)
