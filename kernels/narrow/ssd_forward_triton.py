"""Mamba-2's recurrence with narrow states in Triton, from what its convolution leaves: outputs, and states between chunks.

    S_t = exp(-rate dt_t) S_{t-1} + B_t (dt_t x_t)^T,    y_t = S_t^T C_t + skip x_t,    dt_t = softplus(raw_t + bias)

A program walks a head of one sequence from chunk to chunk. A token's row holds x of all heads, then B and C of all groups, so
nothing is copied apart; time steps and decays are made where they are used, and stand in no tensor.

Bytes: reads x, B, C and raw, writes y and, in 16 bit, the state behind each chunk but the last.

Shape legend: B batch, T time, H heads, P width of a head, G groups, N states, C tokens of a chunk, M members (each B / M
sequences); W = H P + 2 G N numbers of a row.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels._entry import entry

LOG2_E = tl.constexpr(1.4426950408889634)
LEAST = tl.constexpr(1e-37)
"""A time step whose logarithm there is."""
LENGTHS = ("length", "per_member", "raw_t")


@triton.jit
def softplus(z):
    """max(z, 0) + log(1 + exp(-|z|)), small ones without losing the exponential beside the one."""
    e = tl.exp2(-tl.abs(z) * LOG2_E)
    one = 1.0 + e
    return tl.maximum(z, 0.0) + tl.where(one == 1.0, e, tl.log(one) * (e / tl.where(one == 1.0, 1.0, one - 1.0)))


@triton.jit
def head_numbers(log_rate, bias, skip, member, head, H: tl.constexpr):
    """The rate of a head, in powers of two, the bias of its time steps and its skip."""
    place = member * H + head
    rate = tl.exp2(tl.load(log_rate + place).to(tl.float32) * LOG2_E) * LOG2_E
    return rate, tl.load(bias + place).to(tl.float32), tl.load(skip + place).to(tl.float32)


@triton.jit
def steps_of(raw, raw_t, head, bias, t_C, length):
    """Time steps of a chunk; 0 beyond the end: no decay and no input."""
    inside_C = t_C < length
    raw_C = tl.load(raw + t_C * raw_t + head, mask=inside_C, other=0.0).to(tl.float32)
    return tl.where(inside_C, softplus(raw_C + bias), 0.0)


@triton.jit
def columns_of(row, t_C, length, first, column, width, STRIDE: tl.constexpr):
    """Columns of a chunk's rows."""
    inside = (t_C < length)[:, None] & (column < width)[None, :]
    return tl.load(row + t_C[:, None] * STRIDE + first + column[None, :], mask=inside, other=0.0)


@entry(do_not_specialize=LENGTHS)
def ssd_forward(
    xbc, raw, bias, log_rate, skip, y, kept, length, per_member, raw_t,
    H: tl.constexpr, P: tl.constexpr, G: tl.constexpr, N: tl.constexpr, BN: tl.constexpr, C: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Outputs [B, T, H, P] and states behind chunks [B, H, chunks - 1, N, P]. Grid: (B * H,)."""
    W: tl.constexpr = H * P + 2 * G * N
    batch, head = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    rate, bias_h, skip_h = head_numbers(log_rate, bias, skip, batch // per_member, head, H)
    xbc += batch * length * W
    raw += batch * length * raw_t
    y += batch * length * H * P
    chunks = tl.cdiv(length, C)
    kept += (batch * H + head) * (chunks - 1) * N * P
    i, p, n = tl.arange(0, C), tl.arange(0, P), tl.arange(0, BN)
    at_b = H * P + head // (H // G) * N
    seen = i[:, None] >= i[None, :]
    state_NP = tl.zeros([BN, P], tl.float32)
    for chunk in tl.range(0, chunks, num_stages=STAGES):
        t_C = chunk * C + i
        x_CP = columns_of(xbc, t_C, length, head * P, p, P, W)
        b_CN = columns_of(xbc, t_C, length, at_b, n, N, W)
        c_CN = columns_of(xbc, t_C, length, at_b + G * N, n, N, W)
        dt_C = steps_of(raw, raw_t, head, bias_h, t_C, length)
        step_C = dt_C * -rate
        g_C, g_all = tl.cumsum(step_C, 0), tl.sum(step_C, 0)
        read_CP = tl.dot(c_CN, state_NP.to(c_CN.dtype), input_precision="ieee") * tl.exp2(g_C)[:, None]
        scores_CC = tl.dot(c_CN, tl.trans(b_CN), input_precision="ieee")
        # the time step of what is written is part of the exponent
        pairs_CC = scores_CC * tl.exp2(
            tl.where(seen, g_C[:, None] - (g_C - tl.log2(tl.maximum(dt_C, LEAST)))[None, :], float("-inf"))
        )
        y_CP = tl.dot(pairs_CC.to(x_CP.dtype), x_CP, read_CP, input_precision="ieee") + skip_h * x_CP.to(tl.float32)
        write_CN = (b_CN.to(tl.float32) * (dt_C * tl.exp2(g_all - g_C))[:, None]).to(x_CP.dtype)
        state_NP = tl.dot(tl.trans(write_CN), x_CP, state_NP * tl.exp2(g_all), input_precision="ieee")
        tl.store(y + t_C[:, None] * (H * P) + head * P + p[None, :], y_CP.to(y.dtype.element_ty), mask=(t_C < length)[:, None])
        at_NP = chunk * N * P + n[:, None] * P + p[None, :]
        tl.store(kept + at_NP, state_NP.to(kept.dtype.element_ty), mask=(n < N)[:, None] & (chunk + 1 < chunks))


@entry(do_not_specialize=LENGTHS)
def ssd_behind(
    xbc, dy, raw, bias, log_rate, dkept, length, per_member, raw_t,
    H: tl.constexpr, P: tl.constexpr, G: tl.constexpr, N: tl.constexpr, BN: tl.constexpr, C: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Gradients of the states behind chunks, [B, H, chunks - 1, N, P], by a walk from the end. Grid: (B * H,)."""
    W: tl.constexpr = H * P + 2 * G * N
    batch, head = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    rate, bias_h, _ = head_numbers(log_rate, bias, bias, batch // per_member, head, H)
    xbc += batch * length * W
    raw += batch * length * raw_t
    dy += batch * length * H * P
    chunks = tl.cdiv(length, C)
    dkept += (batch * H + head) * (chunks - 1) * N * P
    i, p, n = tl.arange(0, C), tl.arange(0, P), tl.arange(0, BN)
    at_c = H * P + (G + head // (H // G)) * N
    dstate_NP = tl.zeros([BN, P], tl.float32)
    for turn in tl.range(1, chunks, num_stages=STAGES):
        chunk = chunks - turn
        t_C = chunk * C + i
        c_CN = columns_of(xbc, t_C, length, at_c, n, N, W)
        dy_CP = columns_of(dy, t_C, length, head * P, p, P, H * P)
        step_C = steps_of(raw, raw_t, head, bias_h, t_C, length) * -rate
        g_C, g_all = tl.cumsum(step_C, 0), tl.sum(step_C, 0)
        read_CN = (c_CN.to(tl.float32) * tl.exp2(g_C)[:, None]).to(dy_CP.dtype)
        dstate_NP = tl.dot(tl.trans(read_CN), dy_CP, dstate_NP * tl.exp2(g_all), input_precision="ieee")
        at_NP = (chunk - 1) * N * P + n[:, None] * P + p[None, :]
        tl.store(dkept + at_NP, dstate_NP.to(dkept.dtype.element_ty), mask=(n < N)[:, None])
