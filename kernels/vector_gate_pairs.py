"""Gradients of the scores of all chunks, dP = tril(dO U^T) and dM = -tril(dV U^T, -1), as symmetric matrices.

The kernel that follows needs both triangles, and must not turn an accumulator around to get the second: on Hopper,
Triton 3.4 to 3.7 miscompile a product whose left operand is a transposed accumulator. So both come from products of their own.

Shape legend: B batch, T time, H heads, N chunks, C tokens of a chunk, V value width.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels._entry import entry
from kernels.vector_gate_rows import load_beta, load_rows


@triton.jit
def load_written(u, stride, beta_C, i_C, cols, left, V: tl.constexpr, DELTA: tl.constexpr, DOT: tl.constexpr):
    """The values that a chunk writes: rows of V, or of beta E."""
    u_CV = load_rows(u, stride, i_C, cols, left, V, DOT)
    if DELTA:
        u_CV = (u_CV.to(tl.float32) * beta_C[:, None]).to(DOT)
    return u_CV


@entry
def pairs_kernel(
    u, beta, do, dv, dscores, dinner,
    u_b: tl.int64, u_t: tl.int32, u_h: tl.int64, do_b: tl.int64, do_t: tl.int32, do_h: tl.int64,
    length: tl.int32, heads: tl.int32,
    V: tl.constexpr, BV: tl.constexpr, UNIT: tl.constexpr, C: tl.constexpr, DELTA: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: (B * H * N,). u is V or E; strides of u and do count UNIT elements. dscores and dinner are [B, H, N, C, C]."""
    chunks = tl.cdiv(length, C)
    block = tl.program_id(0).to(tl.int64)
    head_index, n = block // chunks, tl.program_id(0) % chunks
    batch, head = head_index // heads, head_index % heads
    i_C, start, left = tl.arange(0, C), n.to(tl.int64) * C, length - n * C
    row = (batch * length + start) * heads + head
    u += (batch * u_b + head * u_h + start * u_t) * UNIT
    do += (batch * do_b + head * do_h + start * do_t) * UNIT
    beta_C = load_beta(beta + row, heads, i_C, left) if DELTA else tl.zeros([C], tl.float32)
    dp_CC, dp_T_CC = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32)
    dm_CC, dm_T_CC = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32)
    for first in range(0, V, BV):
        cols = first + tl.arange(0, BV)
        do_CV = load_rows(do, do_t * UNIT, i_C, cols, left, V, DOT)
        u_CV = load_written(u, u_t * UNIT, beta_C, i_C, cols, left, V, DELTA, DOT)
        dp_CC = tl.dot(do_CV, tl.trans(u_CV), dp_CC, input_precision=PRECISION)
        dp_T_CC = tl.dot(u_CV, tl.trans(do_CV), dp_T_CC, input_precision=PRECISION)
        if DELTA:
            dv_CV = load_rows(dv + row * V, heads * V, i_C, cols, left, V, DOT)
            dm_CC = tl.dot(dv_CV, tl.trans(u_CV), dm_CC, input_precision=PRECISION)
            dm_T_CC = tl.dot(u_CV, tl.trans(dv_CV), dm_T_CC, input_precision=PRECISION)
    below_CC = i_C[:, None] >= i_C[None, :]
    by_pair_CC = i_C[:, None] * C + i_C[None, :]
    tl.store(dscores + block * C * C + by_pair_CC, tl.where(below_CC, dp_CC, dp_T_CC).to(DOT))
    if DELTA:
        tl.store(dinner + block * C * C + by_pair_CC, tl.where(below_CC, -dm_CC, -dm_T_CC).to(DOT))
