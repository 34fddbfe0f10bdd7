"""Decayed products inside a chunk, exact for any gate: the lower triangle as a binary tree of plain products.

A decay of its own for every channel c cannot be pulled out of sum_c a_ic b_jc exp(G_ic - G_jc). Level l of the tree cuts a
chunk in blocks of 2^l tokens and pairs the late half of each (rows) with its early half (columns). Once both sides are
decayed to the boundary between the halves, with G_m that of the last early token, the product is a plain one:

    exp(G_i - G_j) = exp(G_i - G_m) exp(G_m - G_j),    both exponents <= 0

Every token is in one half, so a level costs one exponential per token and channel, and all pairs i > j are met once.
Where no channel of a chunk decays by more than 2^-60 on either side of its middle, the same identity holds for all pairs at
once, with exponents of both signs that cannot overflow: one product instead of one per level. Each chunk decides for itself.

Shape legend: C tokens of a chunk, a power of two; K channels.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def late_half(i, level):
    """Whether tokens are in the late half of their block."""
    return (i & (1 << (level - 1))) != 0


@triton.jit
def paired(row, col, level):
    """Whether a level owns the pair: row in the late and column in the early half of one block."""
    return ((row >> level) == (col >> level)) & late_half(row, level) & (late_half(col, level) == 0)


@triton.jit
def keep_for_boundaries(decays, g_CK):
    """Writes cumulated log2 decays where `at_boundary` will read some of them: rows can't be moved between threads on chip."""
    tl.store(decays, g_CK)
    tl.debug_barrier()


@triton.jit
def at_boundary(decays, row_stride, i_C, level):
    """Cumulated log2 decays of the last early token of each token's block, from those that were kept at `decays`."""
    half = 1 << (level - 1)
    boundary_C = (i_C - i_C % (2 * half)) + half - 1
    return tl.load(decays + (boundary_C - i_C)[:, None] * row_stride)


@triton.jit
def at_middle(g_CK, i_C, C: tl.constexpr):
    """Cumulated log2 decays of the last token of the first half, [1, K]."""
    return tl.sum(tl.where((i_C == C // 2 - 1)[:, None], g_CK, 0.0), 0)[None, :]


@triton.jit
def gentle(from_middle_CK, GENTLE: tl.constexpr):
    """Whether all decays from the middle of the chunk are within 2^-GENTLE .. 2^GENTLE."""
    return tl.max(tl.max(tl.abs(from_middle_CK), 1), 0) <= GENTLE


@triton.jit
def past_late(past_CK, middle_1K, GENTLE: tl.constexpr):
    """Decay from the middle to what an erasure reads; only the first row, which has no pairs, can exceed the limit."""
    return tl.exp2(tl.minimum(past_CK - middle_1K, GENTLE))
