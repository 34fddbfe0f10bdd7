"""Taylor linear attention, forward, where heads fill the chip: one program walks over a sequence with its sums on chip.

Each step takes C tokens: scores among them, features of their queries times the sums so far, and features of their keys into the
sums. Between chunks of `taylor_triton` the sums are kept for the backward pass. There is no division here: sums of weights
would not fit beside the rest.

Shape legend and rows of the sums: as in `kernels.taylor_features.taylor_triton`; C tokens of a step, F rows of a tile of the sums.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels._entry import entry
from kernels.taylor_features.taylor_triton import factors, load_tile, polynomial, weights


@triton.jit
def step(
    o_CV, s_VF, q_CK, k_CK, v_CV, i, f, K: tl.constexpr, DOT: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """What a tile of the sums adds to the outputs, and the tile with the step's own tokens in it."""
    first_CF, second_CF = factors(q_CK, i, f, K, DOT, PRECISION)
    before_FV = tl.trans((s_VF * weights(f, K)[None, :]).to(WIDE))
    o_CV = tl.dot((first_CF * second_CF).to(WIDE), before_FV, o_CV, input_precision=PRECISION)
    first_CF, second_CF = factors(k_CK, i, f, K, DOT, PRECISION)
    return o_CV, tl.dot(tl.trans(v_CV), (first_CF * second_CF).to(WIDE), s_VF, input_precision=PRECISION)


@triton.jit
def keep(entering, row, s_VF, e, f, K: tl.constexpr, V: tl.constexpr):
    """Stores a tile of the weighted sums that enter a chunk."""
    mask = (e < V)[:, None] & (f < K + K * (K + 1) // 2 + 1)[None, :]
    kept_VF = (s_VF * weights(f, K)[None, :]).to(entering.dtype.element_ty)
    tl.store(entering + (row + f)[None, :] * V + e[:, None], kept_VF, mask=mask)


@entry
def walk_kernel(
    q, k, v, entering, y,
    q_b: tl.int64, q_t: tl.int64, q_h: tl.int64, k_b: tl.int64, k_t: tl.int64, k_h: tl.int64,
    v_b: tl.int64, v_t: tl.int64, v_h: tl.int64, length: tl.int32, heads: tl.int32, chunk: tl.int32, chunks: tl.int32,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, F: tl.constexpr, UNIT: tl.constexpr,
    C: tl.constexpr, DOT: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Outputs [B, T, H, V] and the weighted sums that enter chunks [B, H, chunks, R, V]. Grid: (B * H,); C divides the chunk."""
    ROWS: tl.constexpr = K + K * (K + 1) // 2 + 1
    tl.static_assert(ROWS <= 5 * F)
    head_index = tl.program_id(0)
    batch, head = (head_index // heads).to(tl.int64), head_index % heads
    i, e, c, f = tl.arange(0, BK), tl.arange(0, BV), tl.arange(0, C), tl.arange(0, F)
    q += (batch * q_b + head * q_h) * UNIT
    k += (batch * k_b + head * k_h) * UNIT
    v += (batch * v_b + head * v_h) * UNIT
    s0 = tl.zeros([BV, F], tl.float32)
    s1, s2, s3, s4 = s0, s0, s0, s0
    for start in tl.range(0, length, C, num_stages=STAGES):
        t = start + c
        q_CK = load_tile(q, q_t * UNIT, t, i, length, K).to(DOT)
        k_CK = load_tile(k, k_t * UNIT, t, i, length, K).to(DOT)
        v_CV = load_tile(v, v_t * UNIT, t, e, length, V).to(WIDE)
        if start % chunk == 0:
            row = (head_index.to(tl.int64) * chunks + start // chunk) * ROWS
            keep(entering, row, s0, e, f, K, V)
            keep(entering, row, s1, e, f + F, K, V)
            keep(entering, row, s2, e, f + 2 * F, K, V)
            keep(entering, row, s3, e, f + 3 * F, K, V)
            keep(entering, row, s4, e, f + 4 * F, K, V)
        p_CC = polynomial(tl.dot(q_CK, tl.trans(k_CK), input_precision=PRECISION), K)
        p_CC = tl.where(c[:, None] >= c[None, :], p_CC, 0.0)
        o_CV = tl.dot(p_CC.to(WIDE), v_CV, input_precision=PRECISION)
        o_CV, s0 = step(o_CV, s0, q_CK, k_CK, v_CV, i, f, K, DOT, WIDE, PRECISION)
        o_CV, s1 = step(o_CV, s1, q_CK, k_CK, v_CV, i, f + F, K, DOT, WIDE, PRECISION)
        o_CV, s2 = step(o_CV, s2, q_CK, k_CK, v_CV, i, f + 2 * F, K, DOT, WIDE, PRECISION)
        o_CV, s3 = step(o_CV, s3, q_CK, k_CK, v_CV, i, f + 3 * F, K, DOT, WIDE, PRECISION)
        o_CV, s4 = step(o_CV, s4, q_CK, k_CK, v_CV, i, f + 4 * F, K, DOT, WIDE, PRECISION)
        token = (batch * length + t) * heads + head
        tl.store(y + token[:, None] * V + e[None, :], o_CV.to(y.dtype.element_ty), mask=(t < length)[:, None] & (e < V)[None, :])
