"""Taylor linear attention, forward, where heads fill the chip: one program walks a sequence with its sums on chip.

Shape legend and rows of the sums: as in `kernels.taylor_triton`; C tokens of a step, F rows of a tile of the sums.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels._entry import entry
from kernels.taylor_triton import factors, load_tile, polynomial, weights

STRIDES = tuple(f"{tensor}_{axis}" for tensor in ("q", "k", "v") for axis in "bth")
SIZES = (*STRIDES, "length", "heads", "chunk", "chunks")


@triton.jit
def step(
    o_CV, z_C, s_VF, z_F, q_CK, k_CK, v_CV, inside_C, i, f,
    K: tl.constexpr, NORM: tl.constexpr, DOT: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What a tile of the sums adds to the outputs, and the tile with the step's own tokens in it."""
    weight_F = weights(f, K)
    first_CF, second_CF = factors(q_CK, i, f, K, DOT, PRECISION)
    phi_CF = first_CF * second_CF
    if NORM:
        z_C += tl.sum(phi_CF * (z_F * weight_F)[None, :], 1)
    o_CV = tl.dot(phi_CF.to(WIDE), tl.trans((s_VF * weight_F[None, :]).to(WIDE)), o_CV, input_precision=PRECISION)
    first_CF, second_CF = factors(k_CK, i, f, K, DOT, PRECISION)
    phi_CF = first_CF * second_CF
    if NORM:
        z_F += tl.sum(tl.where(inside_C[:, None], phi_CF, 0.0), 0)
    s_VF = tl.dot(tl.trans(v_CV), phi_CF.to(WIDE), s_VF, input_precision=PRECISION)
    return o_CV, z_C, s_VF, z_F


@triton.jit
def keep(entering, entering_norm, row, s_VF, z_F, e, f, K: tl.constexpr, V: tl.constexpr, NORM: tl.constexpr):
    """Stores a tile of the weighted sums that enter a chunk."""
    ROWS: tl.constexpr = K + K * (K + 1) // 2 + 1
    weight_F = weights(f, K)
    mask = (e < V)[:, None] & (f < ROWS)[None, :]
    tl.store(entering + (row + f)[None, :] * V + e[:, None], (s_VF * weight_F[None, :]).to(entering.dtype.element_ty), mask=mask)
    if NORM:
        tl.store(entering_norm + row + f, z_F * weight_F, mask=f < ROWS)


@entry(do_not_specialize=SIZES)
def walk_kernel(
    q, k, v, entering, entering_norm, y, scale,
    q_b: tl.int64, q_t: tl.int64, q_h: tl.int64, k_b: tl.int64, k_t: tl.int64, k_h: tl.int64,
    v_b: tl.int64, v_t: tl.int64, v_h: tl.int64,
    length: tl.int32, heads: tl.int32, chunk: tl.int32, chunks: tl.int32, eps: tl.float32,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BF: tl.constexpr, UNIT: tl.constexpr,
    C: tl.constexpr, NORM: tl.constexpr, DOT: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Outputs, 1 / (sum of the weights + eps) if NORM, and the sums that enter each chunk. Grid: (B * H,); C divides the chunk."""
    ROWS: tl.constexpr = K + K * (K + 1) // 2 + 1
    TILES: tl.constexpr = (ROWS + BF - 1) // BF
    tl.static_assert(TILES <= 5)
    head_index = tl.program_id(0)
    batch, head = (head_index // heads).to(tl.int64), head_index % heads
    i, e, c, f = tl.arange(0, BK), tl.arange(0, BV), tl.arange(0, C), tl.arange(0, BF)
    q += (batch * q_b + head * q_h) * UNIT
    k += (batch * k_b + head * k_h) * UNIT
    v += (batch * v_b + head * v_h) * UNIT
    s0 = tl.zeros([BV, BF], tl.float32)
    s1, s2, s3, s4 = s0, s0, s0, s0
    z0 = tl.zeros([BF], tl.float32)
    z1, z2, z3, z4 = z0, z0, z0, z0
    for start in tl.range(0, length, C, num_stages=STAGES):
        t = start + c
        inside_C = t < length
        q_CK = load_tile(q, q_t * UNIT, t, i, length, K).to(DOT)
        k_CK = load_tile(k, k_t * UNIT, t, i, length, K).to(DOT)
        v_CV = load_tile(v, v_t * UNIT, t, e, length, V).to(WIDE)
        if start % chunk == 0:
            row = (head_index.to(tl.int64) * chunks + start // chunk) * ROWS
            keep(entering, entering_norm, row, s0, z0, e, f, K, V, NORM)
            if TILES > 1:
                keep(entering, entering_norm, row, s1, z1, e, f + BF, K, V, NORM)
            if TILES > 2:
                keep(entering, entering_norm, row, s2, z2, e, f + 2 * BF, K, V, NORM)
            if TILES > 3:
                keep(entering, entering_norm, row, s3, z3, e, f + 3 * BF, K, V, NORM)
            if TILES > 4:
                keep(entering, entering_norm, row, s4, z4, e, f + 4 * BF, K, V, NORM)
        p_CC = polynomial(tl.dot(q_CK, tl.trans(k_CK), input_precision=PRECISION), K)
        p_CC = tl.where(c[:, None] >= c[None, :], p_CC, 0.0)
        z_C = tl.sum(p_CC, 1)
        o_CV = tl.dot(p_CC.to(WIDE), v_CV, input_precision=PRECISION)
        o_CV, z_C, s0, z0 = step(o_CV, z_C, s0, z0, q_CK, k_CK, v_CV, inside_C, i, f, K, NORM, DOT, WIDE, PRECISION)
        if TILES > 1:
            o_CV, z_C, s1, z1 = step(o_CV, z_C, s1, z1, q_CK, k_CK, v_CV, inside_C, i, f + BF, K, NORM, DOT, WIDE, PRECISION)
        if TILES > 2:
            o_CV, z_C, s2, z2 = step(o_CV, z_C, s2, z2, q_CK, k_CK, v_CV, inside_C, i, f + 2 * BF, K, NORM, DOT, WIDE, PRECISION)
        if TILES > 3:
            o_CV, z_C, s3, z3 = step(o_CV, z_C, s3, z3, q_CK, k_CK, v_CV, inside_C, i, f + 3 * BF, K, NORM, DOT, WIDE, PRECISION)
        if TILES > 4:
            o_CV, z_C, s4, z4 = step(o_CV, z_C, s4, z4, q_CK, k_CK, v_CV, inside_C, i, f + 4 * BF, K, NORM, DOT, WIDE, PRECISION)
        token = batch * length * heads + t.to(tl.int64) * heads + head
        if NORM:
            scale_C = 1.0 / (z_C + eps)
            o_CV = o_CV * scale_C[:, None]
            tl.store(scale + token, scale_C, mask=inside_C)
        tl.store(y + token[:, None] * V + e[None, :], o_CV.to(y.dtype.element_ty), mask=inside_C[:, None] & (e < V)[None, :])
