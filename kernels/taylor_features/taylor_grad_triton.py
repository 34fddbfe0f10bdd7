"""Taylor linear attention, backward: the gradients of q from earlier tokens, those of k and v from later ones.

With r = 1 / (sum of weights + eps) and d = r (dy . y) a weight p_ij = 1 + s + s^2 / 2 has the gradient dp = r (dy_i . v_j) - d_i,
a score ds = dp (1 + s), and a row of the sums that enter a chunk reads r dy_i phi(q_i) and -d_i phi(q_i). The gradients of
the sums are themselves sums, over later chunks: `taylor_triton.state_kernel` and `scan_kernel` make them, in reverse.

Shape legend: as in `kernels.taylor_features.taylor_triton`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels._entry import entry
from kernels.taylor_features.taylor_triton import SIZES, factors, first_factor, load_tile, polynomial, second_factor


@entry(do_not_specialize=SIZES)
def query_kernel(
    q, k, v, entering, entering_norm, y, dy, scale, dq, shift,
    q_b: tl.int64, q_t: tl.int64, q_h: tl.int64, k_b: tl.int64, k_t: tl.int64, k_h: tl.int64,
    v_b: tl.int64, v_t: tl.int64, v_h: tl.int64, dy_b: tl.int64, dy_t: tl.int64, dy_h: tl.int64,
    length: tl.int32, heads: tl.int32, chunk: tl.int32, chunks: tl.int32,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BF: tl.constexpr, UNIT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, NORM: tl.constexpr, FIRST: tl.constexpr,
    DOT: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr, ROW_STAGES: tl.constexpr,
):  # fmt: skip
    """Dq of one tile of queries, and shift = -d if NORM, which later kernels read. Grid: (B * H * ceil(T / BM),)."""
    ROWS: tl.constexpr = K + K * (K + 1) // 2 + 1
    program = tl.program_id(0)
    blocks = tl.cdiv(length, BM)
    head_index, start = program // blocks, program % blocks * BM
    batch, head = (head_index // heads).to(tl.int64), head_index % heads
    i, e, m = tl.arange(0, BK), tl.arange(0, BV), start + tl.arange(0, BM)
    k += (batch * k_b + head * k_h) * UNIT
    v += (batch * v_b + head * v_h) * UNIT
    q_MK = load_tile(q + (batch * q_b + head * q_h) * UNIT, q_t * UNIT, m, i, length, K).to(DOT)
    dy_MV = load_tile(dy + (batch * dy_b + head * dy_h) * UNIT, dy_t * UNIT, m, e, length, V).to(DOT)
    token = batch * length * heads + m.to(tl.int64) * heads + head
    if NORM:
        scale_M = tl.load(scale + token, mask=m < length, other=0.0)
        y_MV = load_tile(y + (batch * length * heads + head) * V, heads * V, m, e, length, V)
        shift_M = -scale_M * tl.sum(y_MV.to(tl.float32) * dy_MV.to(tl.float32), 1)
        tl.store(shift + token, shift_M, mask=m < length)
    dq_MK = tl.zeros([BM, BK], tl.float32)
    n = start // chunk
    if not NORM:
        scale_M, shift_M = tl.full([BM], 1.0, tl.float32), tl.zeros([BM], tl.float32)
    for first_key in tl.range(n * chunk, start, BN, num_stages=STAGES):
        t = first_key + tl.arange(0, BN)
        k_NK = load_tile(k, k_t * UNIT, t, i, length, K).to(DOT)
        v_NV = load_tile(v, v_t * UNIT, t, e, length, V).to(DOT)
        ds_MN = _score_gradient(q_MK, k_NK, dy_MV, v_NV, scale_M, shift_M, K, NORM, PRECISION)
        dq_MK = tl.dot(ds_MN.to(DOT), k_NK, dq_MK, input_precision=PRECISION)
    for first_key in tl.range(start, tl.minimum(start + BM, length), BN, num_stages=1):
        t = first_key + tl.arange(0, BN)
        k_NK = load_tile(k, k_t * UNIT, t, i, length, K).to(DOT)
        v_NV = load_tile(v, v_t * UNIT, t, e, length, V).to(DOT)
        ds_MN = _score_gradient(q_MK, k_NK, dy_MV, v_NV, scale_M, shift_M, K, NORM, PRECISION)
        ds_MN = tl.where(m[:, None] >= t[None, :], ds_MN, 0.0)
        dq_MK = tl.dot(ds_MN.to(DOT), k_NK, dq_MK, input_precision=PRECISION)
    dq_MK = dq_MK * K**-0.5
    row = (head_index.to(tl.int64) * chunks + n) * ROWS
    for first_row in tl.range(0, ROWS if FIRST else tl.where(n > 0, ROWS, 0), BF, num_stages=ROW_STAGES):
        f = first_row + tl.arange(0, BF)
        in_rows = (f < ROWS)[:, None] & (e < V)[None, :]
        state_FV = tl.load(entering + (row + f)[:, None] * V + e[None, :], mask=in_rows, other=0.0)
        dphi_MF = tl.dot(dy_MV.to(WIDE), tl.trans(state_FV), input_precision=PRECISION)
        if NORM:
            norm_F = tl.load(entering_norm + row + f, mask=f < ROWS, other=0.0)
            dphi_MF = dphi_MF * scale_M[:, None] + shift_M[:, None] * norm_F[None, :]
        first_MF, second_MF = factors(q_MK, i, f, K, DOT, PRECISION)
        dq_MK = _through_features(dphi_MF, first_MF, second_MF, dq_MK, i, f, K, WIDE, PRECISION)
    in_q = (m < length)[:, None] & (i < K)[None, :]
    tl.store(dq + token[:, None] * K + i[None, :], dq_MK.to(dq.dtype.element_ty), mask=in_q)


@triton.jit
def _score_gradient(
    q_MK, k_NK, dy_MV, v_NV, scale_M, shift_M, K: tl.constexpr, NORM: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """Gradient of the scores of a tile that is wholly in the past."""
    s_MN = tl.dot(q_MK, tl.trans(k_NK), input_precision=PRECISION)
    dp_MN = tl.dot(dy_MV, tl.trans(v_NV), input_precision=PRECISION)
    if NORM:
        dp_MN = dp_MN * scale_M[:, None] + shift_M[:, None]
    return dp_MN * (s_MN * K**-0.5 + 1.0)


@triton.jit
def _through_features(dphi_MF, first_MF, second_MF, dx_MK, i, f, K: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr):
    """Gradient of x plus the one that a tile of monomials of x, with their two factors, sends back to x."""
    to_first_MF, to_second_MF = (dphi_MF * second_MF).to(WIDE), (dphi_MF * first_MF).to(WIDE)
    dx_MK = tl.dot(to_first_MF, first_factor(i[None, :], f[:, None], K, WIDE), dx_MK, input_precision=PRECISION)
    return tl.dot(to_second_MF, second_factor(i[None, :], f[:, None], K, WIDE), dx_MK, input_precision=PRECISION)


@triton.jit
def _queries_back(
    q, dy, scale, shift, k_NK, v_NV, dk_NK, dv_NV, m, t, i, e, q_t, dy_t, length, heads,
    K: tl.constexpr, V: tl.constexpr, MASKED: tl.constexpr, NORM: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds what a tile of queries passes back to keys and values; MASKED if some keys come after some queries."""
    q_MK = load_tile(q, q_t, m, i, length, K).to(DOT)
    dy_MV = load_tile(dy, dy_t, m, e, length, V).to(DOT)
    s_NM = tl.dot(k_NK, tl.trans(q_MK), input_precision=PRECISION)
    dp_NM = tl.dot(v_NV, tl.trans(dy_MV), input_precision=PRECISION)
    p_NM = polynomial(s_NM, K)
    if NORM:
        scale_M = tl.load(scale + m.to(tl.int64) * heads, mask=m < length, other=0.0)
        shift_M = tl.load(shift + m.to(tl.int64) * heads, mask=m < length, other=0.0)
        p_NM = p_NM * scale_M[None, :]
        dp_NM = dp_NM * scale_M[None, :] + shift_M[None, :]
    ds_NM = dp_NM * (s_NM * K**-0.5 + 1.0)
    if MASKED:
        seen = t[:, None] <= m[None, :]
        p_NM, ds_NM = tl.where(seen, p_NM, 0.0), tl.where(seen, ds_NM, 0.0)
    dv_NV = tl.dot(p_NM.to(DOT), dy_MV, dv_NV, input_precision=PRECISION)
    return tl.dot(ds_NM.to(DOT), q_MK, dk_NK, input_precision=PRECISION), dv_NV


@entry(do_not_specialize=SIZES)
def key_kernel(
    q, k, v, leaving, leaving_norm, dy, scale, shift, dk, dv,
    q_b: tl.int64, q_t: tl.int64, q_h: tl.int64, k_b: tl.int64, k_t: tl.int64, k_h: tl.int64,
    v_b: tl.int64, v_t: tl.int64, v_h: tl.int64, dy_b: tl.int64, dy_t: tl.int64, dy_h: tl.int64,
    length: tl.int32, heads: tl.int32, chunk: tl.int32, chunks: tl.int32,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BF: tl.constexpr, UNIT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, NORM: tl.constexpr, LAST: tl.constexpr,
    DOT: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr, ROW_STAGES: tl.constexpr,
):  # fmt: skip
    """Dk and dv of one tile of keys; `leaving` is the gradient of the sums behind a chunk. Grid: (B * H * ceil(T / BN),).

    LAST: the sums behind the last chunk have a gradient too. BN divides the chunk, BM divides BN.
    """
    ROWS: tl.constexpr = K + K * (K + 1) // 2 + 1
    program = tl.program_id(0)
    blocks = tl.cdiv(length, BN)
    head_index, start = program // blocks, program % blocks * BN
    batch, head = (head_index // heads).to(tl.int64), head_index % heads
    i, e, t = tl.arange(0, BK), tl.arange(0, BV), start + tl.arange(0, BN)
    q += (batch * q_b + head * q_h) * UNIT
    dy += (batch * dy_b + head * dy_h) * UNIT
    k_NK = load_tile(k + (batch * k_b + head * k_h) * UNIT, k_t * UNIT, t, i, length, K).to(DOT)
    v_NV = load_tile(v + (batch * v_b + head * v_h) * UNIT, v_t * UNIT, t, e, length, V).to(DOT)
    scalar = batch * length * heads + head
    dk_NK = tl.zeros([BN, BK], tl.float32)
    dv_NV = tl.zeros([BN, BV], tl.float32)
    n = start // chunk
    for first_query in tl.range(start, tl.minimum(start + BN, length), BM, num_stages=1):
        m = first_query + tl.arange(0, BM)
        dk_NK, dv_NV = _queries_back(
            q, dy, scale + scalar, shift + scalar, k_NK, v_NV, dk_NK, dv_NV, m, t, i, e, q_t * UNIT, dy_t * UNIT, length, heads,
            K, V, True, NORM, DOT, PRECISION,
        )  # fmt: skip
    for first_query in tl.range(start + BN, tl.minimum((n + 1) * chunk, length), BM, num_stages=STAGES):
        m = first_query + tl.arange(0, BM)
        dk_NK, dv_NV = _queries_back(
            q, dy, scale + scalar, shift + scalar, k_NK, v_NV, dk_NK, dv_NV, m, t, i, e, q_t * UNIT, dy_t * UNIT, length, heads,
            K, V, False, NORM, DOT, PRECISION,
        )  # fmt: skip
    dk_NK = dk_NK * K**-0.5
    row = (head_index.to(tl.int64) * chunks + n) * ROWS
    for first_row in tl.range(0, ROWS if LAST else tl.where(n < chunks - 1, ROWS, 0), BF, num_stages=ROW_STAGES):
        f = first_row + tl.arange(0, BF)
        in_rows = (f < ROWS)[:, None] & (e < V)[None, :]
        dstate_FV = tl.load(leaving + (row + f)[:, None] * V + e[None, :], mask=in_rows, other=0.0)
        dphi_NF = tl.dot(v_NV.to(WIDE), tl.trans(dstate_FV), input_precision=PRECISION)
        if NORM:
            dphi_NF += tl.load(leaving_norm + row + f, mask=f < ROWS, other=0.0)[None, :]
        first_NF, second_NF = factors(k_NK, i, f, K, DOT, PRECISION)
        dv_NV = tl.dot((first_NF * second_NF).to(WIDE), dstate_FV, dv_NV, input_precision=PRECISION)
        dk_NK = _through_features(dphi_NF, first_NF, second_NF, dk_NK, i, f, K, WIDE, PRECISION)
    token = scalar + t.to(tl.int64) * heads
    in_k, in_v = (t < length)[:, None] & (i < K)[None, :], (t < length)[:, None] & (e < V)[None, :]
    tl.store(dk + token[:, None] * K + i[None, :], dk_NK.to(dk.dtype.element_ty), mask=in_k)
    tl.store(dv + token[:, None] * V + e[None, :], dv_NV.to(dv.dtype.element_ty), mask=in_v)
