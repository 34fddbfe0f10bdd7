"""Decays inside a chunk, exact for any gate: sums of log decays by matrix products, and products of scores along a tree.

A decay of its own for every channel c cannot be pulled out of sum_c a_ic b_jc exp(G_ic - G_jc). Level l of the tree cuts a
chunk in blocks of 2^l tokens and pairs the late half of each (rows) with its early half (columns). Once both sides are
decayed to the boundary between the halves, with G_m that of the last early token, the product is a plain one:

    exp(G_i - G_j) = exp(G_i - G_m) exp(G_m - G_j),    both exponents <= 0

Every token is in one half, so a level costs one exponential per token and channel, and all pairs i > j are met once.
Only rough chunks need it, see `kernels.vector_gates.vector_gate_middle`.

Every exponent is a sum of log decays over a range of tokens, and sums of many ranges are one product with a matrix of zeros
and ones. Tensor cores do it faster than scans, which exchange data between threads, and no difference of long sums loses digits.

Matrices of tokens and channels are [C, K], or [K, C] where a function says BY_KEY.

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
def times_terms(weight_CC, high, low, TERMS: tl.constexpr, BY_KEY: tl.constexpr):
    """A matrix with a row for each result times one from `in_terms`, [C, K], or [K, C] BY_KEY."""
    weight_CC = weight_CC.to(high.dtype)
    precision: tl.constexpr = "tf32x3" if TERMS == 0 else None
    if BY_KEY:
        sums = tl.dot(high, tl.trans(weight_CC), input_precision=precision)
        if TERMS == 2:
            sums = tl.dot(low, tl.trans(weight_CC), sums)
    else:
        sums = tl.dot(weight_CC, high, input_precision=precision)
        if TERMS == 2:
            sums = tl.dot(weight_CC, low, sums)
    return sums


@triton.jit
def range_sums(after_C, upto_C, high, low, i_C, TERMS: tl.constexpr, BY_KEY: tl.constexpr):
    """Sums over the tokens in (after, upto], for each token and channel, of a matrix from `in_terms`."""
    wanted_CC = (i_C[None, :] > after_C[:, None]) & (i_C[None, :] <= upto_C[:, None])
    return times_terms(tl.where(wanted_CC, 1.0, 0.0), high, low, TERMS, BY_KEY)


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
def to_boundary(i_C, level, high, low, TERMS: tl.constexpr, BY_KEY: tl.constexpr):
    """Log2 decay between each token and the boundary of its block, <= 0."""
    boundary_C = last_early(i_C, level)
    return range_sums(tl.minimum(i_C, boundary_C), tl.maximum(i_C, boundary_C), high, low, i_C, TERMS, BY_KEY) * LOG2_E


@triton.jit
def past_to_boundary(i_C, level, high, low, TERMS: tl.constexpr, BY_KEY: tl.constexpr):
    """The same for late tokens, up to the token before."""
    return range_sums(last_early(i_C, level), i_C - 1, high, low, i_C, TERMS, BY_KEY) * LOG2_E


@triton.jit
def in_blocks(i_C, level, high, low, TERMS: tl.constexpr, BY_KEY: tl.constexpr):
    """Log2 decay to each token from where half of its block's decay is done, its first token's aside; positive before that."""
    row, col = i_C[:, None], i_C[None, :]
    inside_CC = ((row >> level) == (col >> level)) & (col > ((row >> level) << level))
    weight_CC = tl.where(inside_CC, tl.where(col <= row, 0.5, -0.5), 0.0)
    return times_terms(weight_CC, high, low, TERMS, BY_KEY) * LOG2_E


@triton.jit
def past_in_blocks(since, gate, i_C, level, BY_KEY: tl.constexpr):
    """The same up to the token before; zero for a block's first token, which has none in its block."""
    is_first_C = (i_C & ((1 << level) - 1)) == 0
    return tl.where(is_first_C[None, :] if BY_KEY else is_first_C[:, None], 0.0, since - gate * LOG2_E)
