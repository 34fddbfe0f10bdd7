"""Taylor attention over short rows: all pairs of tokens, without sums of monomials, forward and back in one launch each.

With s_ij = q_i . k_j / sqrt(K) and p_ij = 1 + s_ij + s_ij^2 / 2 for j <= i, else 0:

    y = P V       dq = (dY V^T o (1 + s)) K / sqrt(K)       dk = (dY V^T o (1 + s))^T Q / sqrt(K)       dv = P^T dY

With a normaliser y is divided by the sums of the rows of P (and eps), and dY V^T is less by the y . dy of its row.
A program owns a tile of tokens, as queries and as keys: the first tiles have few keys and many queries, the last ones the reverse.

Shape legend: M tokens of a tile, N tokens of another one, K width of q and k, V width of v.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels._entry import entry
from kernels.taylor_features.taylor_triton import load_tile, polynomial


@triton.jit
def _normaliser(y, scale, dy_MV, m, e, length, heads, V: tl.constexpr):
    """What rows of P are multiplied by, and what is taken from the gradient of each of its elements, for tokens m."""
    y_MV = load_tile(y, heads * V, m, e, length, V)
    scale_M = tl.load(scale + m.to(tl.int64) * heads, mask=m < length, other=0.0)
    return scale_M, tl.sum(y_MV.to(tl.float32) * dy_MV.to(tl.float32), 1)


@entry
def forward_kernel(
    q, k, v, y, scale,
    q_b: tl.int64, q_t: tl.int64, q_h: tl.int64, k_b: tl.int64, k_t: tl.int64, k_h: tl.int64,
    v_b: tl.int64, v_t: tl.int64, v_h: tl.int64,
    length: tl.int32, heads: tl.int32, eps: tl.float32,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, UNIT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    NORM: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Outputs of a tile, and scale = 1 / (sum of the weights + eps) if NORM. Grid: (B * H * tiles,)."""
    blocks = tl.cdiv(length, BM)
    head_index, start = tl.program_id(0) // blocks, tl.program_id(0) % blocks * BM
    batch, head = (head_index // heads).to(tl.int64), head_index % heads
    i, e, m = tl.arange(0, BK), tl.arange(0, BV), start + tl.arange(0, BM)
    k += (batch * k_b + head * k_h) * UNIT
    v += (batch * v_b + head * v_h) * UNIT
    q_MK = load_tile(q + (batch * q_b + head * q_h) * UNIT, q_t * UNIT, m, i, length, K).to(DOT)
    y_MV = tl.zeros([BM, BV], tl.float32)
    z_M = tl.zeros([BM], tl.float32)
    end = tl.minimum(start + BM, length)
    for first_key in tl.range(0, end, BN, num_stages=STAGES):
        t = first_key + tl.arange(0, BN)
        k_NK = load_tile(k, k_t * UNIT, t, i, end, K).to(DOT)
        v_NV = load_tile(v, v_t * UNIT, t, e, end, V).to(DOT)
        p_MN = polynomial(tl.dot(q_MK, tl.trans(k_NK), input_precision=PRECISION), K)
        p_MN = tl.where(m[:, None] >= t[None, :], p_MN, 0.0)
        z_M += tl.sum(p_MN, 1)
        y_MV = tl.dot(p_MN.to(DOT), v_NV, y_MV, input_precision=PRECISION)
    row_M = (batch * length + m.to(tl.int64)) * heads + head
    if NORM:
        scale_M = 1.0 / (z_M + eps)
        y_MV *= scale_M[:, None]
        tl.store(scale + row_M, scale_M, mask=m < length)
    tl.store(y + row_M[:, None] * V + e[None, :], y_MV.to(y.dtype.element_ty), mask=(m < length)[:, None] & (e < V)[None, :])


@entry
def backward_kernel(
    q, k, v, y, scale, dy, dq, dk, dv,
    q_b: tl.int64, q_t: tl.int64, q_h: tl.int64, k_b: tl.int64, k_t: tl.int64, k_h: tl.int64,
    v_b: tl.int64, v_t: tl.int64, v_h: tl.int64, dy_b: tl.int64, dy_t: tl.int64, dy_h: tl.int64,
    length: tl.int32, heads: tl.int32,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, UNIT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    NORM: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Every gradient of a tile. Grid: (B * H * tiles,)."""
    blocks = tl.cdiv(length, BM)
    head_index, start = tl.program_id(0) // blocks, tl.program_id(0) % blocks * BM
    batch, head = (head_index // heads).to(tl.int64), head_index % heads
    i, e, m = tl.arange(0, BK), tl.arange(0, BV), start + tl.arange(0, BM)
    q += (batch * q_b + head * q_h) * UNIT
    k += (batch * k_b + head * k_h) * UNIT
    v += (batch * v_b + head * v_h) * UNIT
    dy += (batch * dy_b + head * dy_h) * UNIT
    q_MK = load_tile(q, q_t * UNIT, m, i, length, K).to(DOT)
    k_MK = load_tile(k, k_t * UNIT, m, i, length, K).to(DOT)
    v_MV = load_tile(v, v_t * UNIT, m, e, length, V).to(DOT)
    dy_MV = load_tile(dy, dy_t * UNIT, m, e, length, V).to(DOT)
    row_M1 = ((batch * length + m.to(tl.int64)) * heads + head)[:, None]
    y += (batch * length * heads + head) * V
    scale += batch * length * heads + head
    in_k, in_v = (m < length)[:, None] & (i < K)[None, :], (m < length)[:, None] & (e < V)[None, :]
    if NORM:
        scale_M, own_M = _normaliser(y, scale, dy_MV, m, e, length, heads, V)
    dq_MK = tl.zeros([BM, BK], tl.float32)
    end = tl.minimum(start + BM, length)
    for first in tl.range(0, end, BN, num_stages=STAGES):
        t = first + tl.arange(0, BN)
        k_NK = load_tile(k, k_t * UNIT, t, i, end, K).to(DOT)
        v_NV = load_tile(v, v_t * UNIT, t, e, end, V).to(DOT)
        ds_MN = tl.dot(dy_MV, tl.trans(v_NV), input_precision=PRECISION)
        if NORM:
            ds_MN = (ds_MN - own_M[:, None]) * scale_M[:, None]
        ds_MN *= tl.dot(q_MK, tl.trans(k_NK), input_precision=PRECISION) * K**-0.5 + 1.0
        ds_MN = tl.where(m[:, None] >= t[None, :], ds_MN, 0.0)
        dq_MK = tl.dot(ds_MN.to(DOT), k_NK, dq_MK, input_precision=PRECISION)
    tl.store(dq + row_M1 * K + i[None, :], (dq_MK * K**-0.5).to(dq.dtype.element_ty), mask=in_k)
    dk_MK, dv_MV = tl.zeros([BM, BK], tl.float32), tl.zeros([BM, BV], tl.float32)
    for first in tl.range(start, length, BN, num_stages=STAGES):
        t = first + tl.arange(0, BN)
        q_NK = load_tile(q, q_t * UNIT, t, i, length, K).to(DOT)
        dy_NV = load_tile(dy, dy_t * UNIT, t, e, length, V).to(DOT)
        s_MN = tl.dot(k_MK, tl.trans(q_NK), input_precision=PRECISION)
        ds_MN, p_MN = tl.dot(v_MV, tl.trans(dy_NV), input_precision=PRECISION), polynomial(s_MN, K)
        if NORM:
            scale_N, own_N = _normaliser(y, scale, dy_NV, t, e, length, heads, V)
            ds_MN, p_MN = (ds_MN - own_N[None, :]) * scale_N[None, :], p_MN * scale_N[None, :]
        seen = m[:, None] <= t[None, :]
        p_MN, ds_MN = tl.where(seen, p_MN, 0.0), tl.where(seen, ds_MN * (s_MN * K**-0.5 + 1.0), 0.0)
        dv_MV = tl.dot(p_MN.to(DOT), dy_NV, dv_MV, input_precision=PRECISION)
        dk_MK = tl.dot(ds_MN.to(DOT), q_NK, dk_MK, input_precision=PRECISION)
    tl.store(dk + row_M1 * K + i[None, :], (dk_MK * K**-0.5).to(dk.dtype.element_ty), mask=in_k)
    tl.store(dv + row_M1 * V + e[None, :], dv_MV.to(dv.dtype.element_ty), mask=in_v)
