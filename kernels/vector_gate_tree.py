"""Decays inside a chunk, exact for any gate: sums of log decays by matrix products, and products of scores along a tree.

A decay of its own for every channel c cannot be pulled out of sum_c a_ic b_jc exp(G_ic - G_jc). Level l of the tree cuts a
chunk in blocks of 2^l tokens and pairs the late half of each (rows) with its early half (columns). Once both sides are
decayed to the boundary between the halves, with G_m that of the last early token, the product is a plain one:

    exp(G_i - G_j) = exp(G_i - G_m) exp(G_m - G_j),    both exponents <= 0

Every token is in one half, so a level costs one exponential per token and channel, and all pairs i > j are met once.
Only rough chunks need it, see `kernels.vector_gate_middle`.

Every exponent is a sum of log decays over a range of tokens, and sums of many ranges are one product with a matrix of zeros
and ones. Tensor cores do it faster than scans, which exchange data between threads, and no difference of long sums loses digits.

Shape legend: C tokens of a chunk, a power of two; K channels.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def in_terms(x_CK, TERMS: tl.constexpr):
    """A matrix as the sum of two bf16 ones if TERMS is 2; itself if TERMS is 0, or 1, which says that it is in bf16."""
    high_CK, low_CK = x_CK, x_CK
    if TERMS == 2:  # one return: Triton 3.6 wants all of them to have one type
        high_CK = x_CK.to(tl.bfloat16)
        low_CK = (x_CK - high_CK.to(tl.float32)).to(tl.bfloat16)
    return high_CK, low_CK


@triton.jit
def range_sums(after_C, upto_C, high_CK, low_CK, i_C, TERMS: tl.constexpr):
    """Sums over the tokens in (after, upto], for each row of C and each channel, of a matrix from `in_terms`."""
    wanted_CC = (i_C[None, :] > after_C[:, None]) & (i_C[None, :] <= upto_C[:, None])
    ones_CC = tl.where(wanted_CC, 1.0, 0.0).to(high_CK.dtype)
    sums_CK = tl.dot(ones_CC, high_CK, input_precision="tf32x3" if TERMS == 0 else None)
    if TERMS == 2:
        sums_CK = tl.dot(ones_CC, low_CK, sums_CK)
    return sums_CK


@triton.jit
def decay_exponents(after_C, upto_C, high_CK, low_CK, i_C, TERMS: tl.constexpr):
    """`range_sums` of natural log decays, as powers of 2."""
    return range_sums(after_C, upto_C, high_CK, low_CK, i_C, TERMS) * LOG2_E


@triton.jit
def late_half(i, level):
    """Whether tokens are in the late half of their block."""
    return (i & (1 << (level - 1))) != 0


@triton.jit
def paired(row, col, level):
    """Whether a level owns the pair: row in the late and column in the early half of one block."""
    return ((row >> level) == (col >> level)) & late_half(row, level) & (late_half(col, level) == 0)


@triton.jit
def last_early(i_C, level):
    """The last early token of each token's block."""
    half = 1 << (level - 1)
    return i_C - i_C % (2 * half) + half - 1


@triton.jit
def to_boundary(i_C, level, high_CK, low_CK, TERMS: tl.constexpr):
    """Log2 decay between each token and the boundary of its block, <= 0."""
    boundary_C = last_early(i_C, level)
    return decay_exponents(tl.minimum(i_C, boundary_C), tl.maximum(i_C, boundary_C), high_CK, low_CK, i_C, TERMS)


@triton.jit
def past_to_boundary(i_C, level, high_CK, low_CK, TERMS: tl.constexpr):
    """The same for late tokens, up to the token before."""
    return decay_exponents(last_early(i_C, level), i_C - 1, high_CK, low_CK, i_C, TERMS)
