"""Gradients of a tile of keys and values, as every walk over the queries that see them finds them.

Weights are recomputed from the scores and the saved log-sum-exp: p = exp2(score - lse), ds = p (dp - delta).

Shape legend: as in `kernels.indexed.indexed_triton`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.indexed.indexed_triton import LOG2_E, load_rows


@triton.jit
def load_queries(
    q, dy, lse, delta, batch, head, t, i, e, inside, q_b, q_h, q_t, dy_b, dy_h, dy_t, length, heads,
    K: tl.constexpr, V: tl.constexpr, UNIT: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Queries, gradients of their outputs, log-sum-exp and delta of the rows of a tile."""
    q_MK = load_rows(q, (batch * q_b + head * q_h + t * q_t) * UNIT, i, inside, K).to(DOT)
    dy_MV = load_rows(dy, (batch * dy_b + head * dy_h + t * dy_t) * UNIT, e, inside, V).to(DOT)
    scalar = (batch * heads + head) * length + t
    lse_M = tl.load(lse + scalar, mask=inside, other=0.0)
    return q_MK, dy_MV, lse_M, tl.load(delta + scalar, mask=inside, other=0.0)


@triton.jit
def products(k_NK, v_NV, q_MK, dy_MV, K: tl.constexpr, PRECISION: tl.constexpr):
    """Base-2 scores of keys and queries, and the gradients dp of the weights."""
    score_NM = tl.dot(k_NK, tl.trans(q_MK), input_precision=PRECISION) * (K**-0.5 * LOG2_E)
    return score_NM, tl.dot(v_NV, tl.trans(dy_MV), input_precision=PRECISION)


@triton.jit
def through_weights(
    dv_NV, score_NM, dp_NM, seen, lse_M, delta_M, dy_MV, DOT: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """Dv with what these queries add to it, and the gradients ds of the scores, as an operand."""
    p_NM = tl.exp2(tl.where(seen, score_NM - lse_M[None, :], float("-inf")))
    dv_NV = tl.dot(p_NM.to(DOT), dy_MV, dv_NV, input_precision=PRECISION)
    return dv_NV, (p_NM * (dp_NM - delta_M[None, :])).to(DOT)


@triton.jit
def store_gradients(dk, dv, rows, inside, i, e, dk_NK, dv_NV, K: tl.constexpr, V: tl.constexpr):
    """Writes rows of dk, to which its scale is due, and of dv."""
    dk_NK = dk_NK * K**-0.5
    tl.store(dk + rows[:, None] * K + i[None, :], dk_NK.to(dk.dtype.element_ty), mask=inside[:, None] & (i < K)[None, :])
    tl.store(dv + rows[:, None] * V + e[None, :], dv_NV.to(dv.dtype.element_ty), mask=inside[:, None] & (e < V)[None, :])
