"""The unit-triangular systems of the delta rule, solved for all chunks at once; see `kernels.vector_gate_prepare`.

Shape legend: B batch, T time, H heads, N chunks, C tokens of a chunk, K key, V value width.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels._entry import entry
from kernels.vector_gate_rows import load_beta, load_rows, store_rows
from kernels.vector_gate_tree import paired


@triton.jit
def unit_lower_inverse(strict_CC, i_C, LEVELS: tl.constexpr, PRECISION: tl.constexpr):
    """(I + strict)^-1 by doubling the blocks of the diagonal: [[A, 0], [B, D]]^-1 = [[A', 0], [-D' B A', D']].

    It does the operations of a substitution, with no power of the matrix, and so needs no bound on its entries.
    """
    inverse_CC = tl.where(i_C[:, None] == i_C[None, :], 1.0, 0.0) - tl.where(paired(i_C[:, None], i_C[None, :], 1), strict_CC, 0.0)
    for level in range(2, LEVELS + 1):
        below_CC = tl.where(paired(i_C[:, None], i_C[None, :], level), strict_CC, 0.0)
        left_CC = tl.dot(inverse_CC, below_CC, input_precision=PRECISION)
        inverse_CC -= tl.dot(left_CC, inverse_CC, input_precision=PRECISION)
    return inverse_CC


@entry
def solve_kernel(
    inner, beta, v, erases, targets, inverses, v_b: tl.int64, v_t: tl.int32, v_h: tl.int64, length: tl.int32, heads: tl.int32,
    K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, UNIT: tl.constexpr,
    C: tl.constexpr, LEVELS: tl.constexpr, SAVE: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, SOLVE: tl.constexpr,
):  # fmt: skip
    """Grid: (B * H * N,). Strides of v count UNIT elements.

    Multiplies erases, [B, H, N, C, KP], in place and v into targets, [B, T, H, V], by (I + M beta)^-1, with M in inner,
    [B, H, N, C, C]. SAVE writes (I + beta M)^-1 to inverses, which only the gradients need.
    """
    chunks = tl.cdiv(length, C)
    block = tl.program_id(0).to(tl.int64)
    head_index, n = block // chunks, tl.program_id(0) % chunks
    batch, head = head_index // heads, head_index % heads
    i_C, start, left = tl.arange(0, C), n.to(tl.int64) * C, length - n * C
    row = (batch * length + start) * heads + head
    by_pair_CC = i_C[:, None] * C + i_C[None, :]
    m_CC = tl.load(inner + block * C * C + by_pair_CC)
    beta_C = load_beta(beta + row, heads, i_C, left)
    solve_CC = unit_lower_inverse(m_CC * beta_C[None, :], i_C, LEVELS, SOLVE)
    if SAVE:
        # (I + beta M)^-1 = I - beta (I + M beta)^-1 M
        other_CC = beta_C[:, None] * tl.dot(solve_CC, m_CC, input_precision=SOLVE)
        tl.store(inverses + block * C * C + by_pair_CC, (tl.where(i_C[:, None] == i_C[None, :], 1.0, 0.0) - other_CC).to(DOT))
    solve_CC = solve_CC.to(DOT)
    erases += block * C * KP
    for first in range(0, KP, BK):
        at = erases + (i_C[:, None] * KP + first + tl.arange(0, BK)[None, :])
        tl.store(at, tl.dot(solve_CC, tl.load(at), input_precision=PRECISION).to(DOT))
    v += (batch * v_b + head * v_h + start * v_t) * UNIT
    for first in range(0, V, BV):
        cols = first + tl.arange(0, BV)
        target_CV = tl.dot(solve_CC, load_rows(v, v_t * UNIT, i_C, cols, left, V, DOT), input_precision=PRECISION)
        store_rows(targets + row * V, heads * V, i_C, cols, left, target_CV, V)
