"""Gradients of Mamba-2's recurrence with narrow states: a program owns a chunk of a group and goes through the group's heads.

States that enter the chunk were kept by the forward pass, gradients of those that leave it come from a walk of their own
(`kernels.narrow.ssd_forward_triton`), so no program waits for another. What heads add to dB and dC stays in registers. The
gradient of a token's log decay is what is read across it less what is written, a sum over the chunk from its end, and what
leaves the chunk.

Bytes: reads x, B, C, raw, dy and both states, writes the rows' gradients and those of raw.

Shape legend: as `kernels.narrow.ssd_forward_triton`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels._entry import entry
from kernels.narrow.ssd_forward_triton import LENGTHS, LOG2_E, columns_of, head_numbers, steps_of


@triton.jit
def _slope(dt_C):
    """1 - exp(-dt), the derivative of a softplus where that is dt; small ones without a difference of ones."""
    return tl.where(dt_C < 0.01, dt_C - 0.5 * dt_C * dt_C, 1.0 - tl.exp2(-dt_C * LOG2_E))


@entry(do_not_specialize=(*LENGTHS, "draw_t"))
def ssd_backward(  # noqa: PLR0915 - one loop, whose values live in registers
    xbc, dy, raw, bias, log_rate, skip, kept, dkept, dxbc, draw, parts, length, per_member, raw_t, draw_t,
    H: tl.constexpr, P: tl.constexpr, G: tl.constexpr, N: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr,
    C: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Gradients of rows [B, T, W] and of raw, and shares [B, chunks, 3, H] of those of log rate, bias and skip.

    Grid: (B * chunks * G,).
    """
    W: tl.constexpr = H * P + 2 * G * N
    EACH: tl.constexpr = H // G
    group, chunks = tl.program_id(0) % G, tl.cdiv(length, C)
    chunk, batch = tl.program_id(0) // G % chunks, (tl.program_id(0) // G // chunks).to(tl.int64)
    xbc += batch * length * W
    dxbc += batch * length * W
    dy += batch * length * H * P
    raw += batch * length * raw_t
    draw += batch * length * draw_t
    parts += (batch * chunks + chunk) * 3 * H
    i, p, n = tl.arange(0, C), tl.arange(0, BP), tl.arange(0, BN)
    t_C, at_b = chunk * C + i, H * P + group * N
    inside_C1, seen = (t_C < length)[:, None], i[:, None] >= i[None, :]
    b_CN = columns_of(xbc, t_C, length, at_b, n, N, W)
    c_CN = columns_of(xbc, t_C, length, at_b + G * N, n, N, W)
    scores_CC = tl.dot(c_CN, tl.trans(b_CN), input_precision="ieee")
    db_CN = tl.zeros([C, BN], tl.float32)
    dc_CN = tl.zeros([C, BN], tl.float32)
    enters, leaves = (n < N)[:, None] & (chunk > 0), (n < N)[:, None] & (chunk + 1 < chunks)
    for head in tl.range(group * EACH, (group + 1) * EACH, num_stages=STAGES):
        rate, bias_h, skip_h = head_numbers(log_rate, bias, skip, batch // per_member, head, H)
        dt_C = steps_of(raw, raw_t, head, bias_h, t_C, length)
        step_C = dt_C * -rate
        g_C, g_all = tl.cumsum(step_C, 0), tl.sum(step_C, 0)
        # pairs inside of the chunk
        along_CC = tl.zeros([C, C], tl.float32)
        for tile in tl.range(0, P // BP, num_stages=STAGES):
            x_CP = columns_of(xbc, t_C, length, head * P + tile * BP, p, BP, W)
            dy_CP = columns_of(dy, t_C, length, head * P + tile * BP, p, BP, H * P)
            along_CC = tl.dot(dy_CP, tl.trans(x_CP), along_CC, input_precision="ieee")
        decay_CC = tl.exp2(tl.where(seen, g_C[:, None] - g_C[None, :], float("-inf")))
        along_CC *= decay_CC
        both_CC = scores_CC * along_CC
        written_C = tl.sum(both_CC, 0)
        read_C = tl.sum(both_CC * dt_C[None, :], 1)
        along_low_CC = (along_CC * dt_C[None, :]).to(b_CN.dtype)
        dc_CN = tl.dot(along_low_CC, b_CN, dc_CN, input_precision="ieee")
        db_CN = tl.dot(tl.trans(along_low_CC), c_CN, db_CN, input_precision="ieee")
        turned_CC = tl.trans((scores_CC * decay_CC * dt_C[None, :]).to(b_CN.dtype))
        # what is read from the state that enters, and written into the one that leaves
        factor_C, keep_C = tl.exp2(g_C), tl.exp2(g_all - g_C)
        later_C, skipped_C, crossing = tl.zeros([C], tl.float32), tl.zeros([C], tl.float32), 0.0
        for tile in tl.range(0, P // BP, num_stages=STAGES):
            x_CP = columns_of(xbc, t_C, length, head * P + tile * BP, p, BP, W)
            dy_CP = columns_of(dy, t_C, length, head * P + tile * BP, p, BP, H * P)
            states = ((batch * H + head) * (chunks - 1) + chunk) * N * P + tile * BP + n[:, None] * P + p[None, :]
            state_NP = tl.load(kept + (states - N * P), mask=enters, other=0.0)
            dstate_NP = tl.load(dkept + states, mask=leaves, other=0.0)
            read_CP = dy_CP.to(tl.float32) * factor_C[:, None]
            read_C += tl.sum(tl.dot(c_CN, state_NP, input_precision="ieee") * read_CP, 1)
            dc_CN = tl.dot(read_CP.to(b_CN.dtype), tl.trans(state_NP), dc_CN, input_precision="ieee")
            write_CP = x_CP.to(tl.float32) * keep_C[:, None]
            later_CP = tl.dot(b_CN, dstate_NP, input_precision="ieee")
            later_C += tl.sum(later_CP * write_CP, 1)
            db_CN = tl.dot((write_CP * dt_C[:, None]).to(b_CN.dtype), tl.trans(dstate_NP), db_CN, input_precision="ieee")
            dx_CP = later_CP * (keep_C * dt_C)[:, None] + skip_h * dy_CP.to(tl.float32)
            dx_CP = tl.dot(turned_CC, dy_CP, dx_CP, input_precision="ieee")
            at_CP = t_C[:, None] * W + head * P + tile * BP + p[None, :]
            tl.store(dxbc + at_CP, dx_CP.to(dxbc.dtype.element_ty), mask=inside_C1)
            skipped_C += tl.sum(x_CP.to(tl.float32) * dy_CP.to(tl.float32), 1)
            crossing += tl.sum(tl.sum(state_NP.to(tl.float32) * dstate_NP.to(tl.float32), 0), 0)
        # decays and time steps
        written_C += later_C
        crossing = crossing * tl.exp2(g_all) + tl.sum(later_C * dt_C, 0)
        decay_grad_C = tl.cumsum(read_C - dt_C * written_C, 0, reverse=True) + crossing
        natural = rate / LOG2_E
        draw_C = (written_C - natural * decay_grad_C) * _slope(dt_C)
        tl.store(draw + t_C * draw_t + head, draw_C.to(draw.dtype.element_ty), mask=t_C < length)
        tl.store(parts + head, tl.sum(decay_grad_C * dt_C, 0) * -natural)
        tl.store(parts + H + head, tl.sum(draw_C, 0))
        tl.store(parts + 2 * H + head, tl.sum(skipped_C, 0))
    inside_CN = inside_C1 & (n < N)[None, :]
    at_CN = t_C[:, None] * W + at_b + n[None, :]
    tl.store(dxbc + at_CN, db_CN.to(dxbc.dtype.element_ty), mask=inside_CN)
    tl.store(dxbc + at_CN + G * N, dc_CN.to(dxbc.dtype.element_ty), mask=inside_CN)
