"""H = X (I + beta X)^-1 of every chunk of the delta rule (see `kernels.delta_rule.delta_triton`), one warp a chunk.

With A = (I + X beta)^-1 = I - H beta, blocks of 16 x 16 tokens on the diagonal grow from single rows: where blocks of
1, 2, 4, 8 rows are solved, A - A L A with the part L of X beta between two neighbours solves both together. Left of the
diagonal, a row of blocks follows from right to left:

    P_IJ = sum_{J < M <= I} A_IM X_MJ        H_IJ = P_IJ - P_IJ beta_J H_JJ        A_IJ = -H_IJ beta_J

which is as stable as substitution row by row. A sum of powers of X would not be: with equal keys its terms grow like binomial
coefficients. Sums are kept in the registers of the lanes that made them: what is a sum's layout is that of a left operand, and
of a right operand after a transposition, so X is made transposed, and the diagonal blocks twice.

Operands are rounded to the dtype MERGE, which is fp16 for both 16-bit dtypes: H needs its digits and not the range of bf16.

Shape legend: B batch, T time, H heads, N chunks, C tokens of a chunk, K key width, S = 16 tokens of a block.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels._entry import entry
from kernels.delta_rule.delta_triton import SIZES
from kernels.walks.walk_triton import LOG2_E, NO_GATE, SCALAR_GATE, _load_rows

S = tl.constexpr(16)
LEVELS = tl.constexpr(4)


@triton.jit
def _gram(k, stride, start, length, K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """Products K_J K_I^T of blocks of rows, J <= I, in the order (0, 0), (1, 0), (1, 1), (2, 0), ..."""
    WIDTH: tl.constexpr = min(BK, 32)
    sums = ()
    for _ in tl.static_range(C // S * (C // S + 1) // 2):
        sums = sums + (tl.zeros([S, S], tl.float32),)
    for first in tl.range(0, BK, WIDTH, num_stages=BK // WIDTH + 1):  # all loads at once
        rows = ()
        for block in tl.static_range(C // S):
            t_S = start + block * S + tl.arange(0, S)
            rows = rows + (_load_rows(k, stride, t_S, first + tl.arange(0, WIDTH), length, K, DOT),)
        more = ()
        for i in tl.static_range(C // S):
            for j in tl.static_range(i + 1):
                product = tl.dot(rows[j], tl.trans(rows[i]), sums[i * (i + 1) // 2 + j], input_precision=PRECISION)
                more = more + (product,)
        sums = more
    return sums


@triton.jit
def _decays(gate, stride, start, length, C: tl.constexpr, SCALAR: tl.constexpr):
    """Log2 decays of each block's tokens, cumulated from the start of the chunk; padding does not decay."""
    blocks = ()
    before = 0.0
    for block in tl.static_range(C // S):
        t_S = start + block * S + tl.arange(0, S)
        if SCALAR:
            step_S = tl.load(gate + t_S.to(tl.int64) * stride, mask=t_S < length, other=0.0) * LOG2_E
            blocks = blocks + (before + tl.cumsum(step_S, 0),)
            before += tl.sum(step_S, 0)
        else:
            passed_S = tl.minimum(t_S + 1, length) - start
            blocks = blocks + (tl.load(gate) * LOG2_E * passed_S.to(tl.float32),)
    return blocks


@triton.jit
def _diagonal(x_SS, xt_SS, beta_S, i, MERGE: tl.constexpr, PRECISION: tl.constexpr):
    """A and H of a block on the diagonal from X and its transpose: A, H, and H transposed; `i` counts its tokens."""
    one_SS = (i[:, None] == i[None, :]).to(tl.float32)
    pair_SS = (i >> 1)[:, None] == (i >> 1)[None, :]
    l_SS, lt_SS = x_SS * -beta_S[None, :], xt_SS * -beta_S[:, None]
    a_SS, at_SS = tl.where(pair_SS, one_SS + l_SS, 0.0), tl.where(pair_SS, one_SS + lt_SS, 0.0)
    for level in tl.static_range(1, LEVELS):
        block = i >> level
        between = (block[:, None] < block[None, :]) & ((block >> 1)[:, None] == (block >> 1)[None, :])
        left_SS, right_SS = a_SS.to(MERGE), at_SS.to(MERGE)
        part_SS = tl.trans(tl.where(between, lt_SS, 0.0)).to(MERGE)
        step_SS = tl.dot(left_SS, part_SS, input_precision=PRECISION)
        a_SS = tl.dot(step_SS.to(MERGE), tl.trans(at_SS).to(MERGE), a_SS, input_precision=PRECISION)
        at_SS = tl.dot(right_SS, tl.trans(step_SS).to(MERGE), at_SS, input_precision=PRECISION)
    h_SS = tl.dot(a_SS.to(MERGE), tl.trans(xt_SS).to(MERGE), input_precision=PRECISION)
    ht_SS = tl.dot(xt_SS.to(MERGE), tl.trans(a_SS).to(MERGE), input_precision=PRECISION)
    return a_SS.to(MERGE), h_SS, ht_SS


@triton.jit
def _store_block(h, x_SS, row, col, C: tl.constexpr):
    i = tl.arange(0, S)
    tl.store(h + (row * S * C + col * S) + i[:, None] * C + i[None, :], x_SS.to(h.dtype.element_ty))


@entry(do_not_specialize=SIZES)
def coupling_kernel(
    k, beta, gate, h, g,
    k_b: tl.int64, k_t: tl.int64, k_h: tl.int64, gate_b: tl.int64, gate_t: tl.int64,
    length: tl.int32, chunks: tl.int32, heads: tl.int32, group: tl.int32, gate_every: tl.int32,
    K: tl.constexpr, BK: tl.constexpr, UNIT: tl.constexpr, C: tl.constexpr, GATE: tl.constexpr,
    DOT: tl.constexpr, MERGE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: (B * H * N,). Writes H [B, H, N, C, C] of every chunk, and its cumulated log2 decays [B, H, N, C]."""
    BLOCKS: tl.constexpr = C // S
    program = tl.program_id(0)
    head_index, chunk = program // chunks, program % chunks
    batch, head = head_index // heads, head_index % heads
    wide, start = batch.to(tl.int64), chunk * C
    # Known to be zero by the chip only: of operands with zeros that the compiler knows, ptxas 13.3 to 13.5 stores registers
    # before it writes them.
    i = tl.arange(0, S) + tl.minimum(length, 0)
    h += program.to(tl.int64) * C * C
    grams = _gram(k + (wide * k_b + (head // group) * k_h) * UNIT, k_t * UNIT, start, length, K, BK, C, DOT, PRECISION)
    betas = ()
    for block in tl.static_range(BLOCKS):
        t_S = start + block * S + i
        beta_S = tl.load(beta + (wide * length + t_S) * heads + head, mask=t_S < length, other=0.0).to(tl.float32)
        betas = betas + (beta_S,)
    if GATE != NO_GATE:
        gate_base = gate + (batch // gate_every) * gate_b + head
        decays = _decays(gate_base, gate_t, start, length, C, GATE == SCALAR_GATE)
        for block in tl.static_range(BLOCKS):
            tl.store(g + program.to(tl.int64) * C + block * S + i, decays[block])
    solved = ()
    transposed = ()
    for block in tl.static_range(BLOCKS):
        gram_SS = grams[block * (block + 1) // 2 + block]
        later = i[:, None] > i[None, :]
        if GATE != NO_GATE:
            fall_SS = decays[block][:, None] - decays[block][None, :]
            x_SS = gram_SS * tl.exp2(tl.where(later, fall_SS, float("-inf")))
            xt_SS = gram_SS * tl.exp2(tl.where(tl.trans(later), -fall_SS, float("-inf")))
        else:
            x_SS, xt_SS = tl.where(later, gram_SS, 0.0), tl.where(i[:, None] < i[None, :], gram_SS, 0.0)
        a_SS, h_SS, ht_SS = _diagonal(x_SS, xt_SS, betas[block], i, MERGE, PRECISION)
        _store_block(h, h_SS, block, block, C)
        solved, transposed = solved + (a_SS,), transposed + (ht_SS,)
    for row in tl.static_range(1, BLOCKS):
        left = (solved[row],)
        for back in tl.static_range(1, row + 1):
            p_SS = tl.zeros([S, S], tl.float32)
            for step in tl.static_range(back):
                xt_SS = grams[(row - step) * (row - step + 1) // 2 + row - back]
                if GATE != NO_GATE:
                    xt_SS = xt_SS * tl.exp2(decays[row - step][None, :] - decays[row - back][:, None])
                p_SS = tl.dot(left[step], tl.trans(xt_SS).to(MERGE), p_SS, input_precision=PRECISION)
            minus_S = -betas[row - back][None, :]
            p_SS = tl.dot((p_SS * minus_S).to(MERGE), tl.trans(transposed[row - back]).to(MERGE), p_SS, input_precision=PRECISION)
            _store_block(h, p_SS, row, row - back, C)
            _store_block(h, tl.zeros([S, S], tl.float32), row - back, row, C)
            left = left + ((p_SS * minus_S).to(MERGE),)
