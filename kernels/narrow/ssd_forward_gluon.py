"""Mamba-2's recurrence with narrow states, one warp a program: outputs, and states between chunks.

A program walks a head of one sequence from chunk to chunk; the next one is on its way into shared memory. The state goes through
shared memory in 16 bit, from where it is stored and comes back as an operand.

Shape legend: as `kernels.narrow.ssd_forward_triton`.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from kernels._entry import entry
from kernels.narrow.ssd_pieces_gluon import (
    LEAST,
    LOG2_E,
    added,
    as_sums,
    ask,
    copied,
    into_left,
    left_of,
    no_sums,
    plain,
    products,
    right_of,
    slots,
    softplus,
)

thread_barrier = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier  # the latter from Triton 3.7 on


@gluon.constexpr_function
def lanes():
    """[C]: a lane has a token."""
    return gl.BlockedLayout([1], [32], [1], [0])


@gluon.jit
def own_columns(x_RW, R: gl.constexpr, W: gl.constexpr):
    """The last R columns; only names registers."""
    if R == W:
        return x_RW
    else:
        _, last = gl.split(x_RW.reshape([R, 2, R]).permute([0, 2, 1]))
        return gl.convert_layout(last, products())


@gluon.jit
def outputs(
    half: gl.constexpr, xs, bs, cs, state, decays, logs, factors, skip_h, R: gl.constexpr, P: gl.constexpr, low: gl.constexpr
):
    """Half of a chunk's tokens, [R, P]."""
    M: gl.constexpr = products()
    BEGIN: gl.constexpr = half * R
    SEEN: gl.constexpr = BEGIN + R
    c_RN = left_of(cs.slice(BEGIN, R))
    scores_RS = mma_v2(c_RN, right_of(bs.slice(0, SEEN).permute([1, 0])), no_sums(R, SEEN))
    i, j = BEGIN + gl.arange(0, R, gl.SliceLayout(1, M)), gl.arange(0, SEEN, gl.SliceLayout(0, M))
    same = i[:, None] == j[None, :]
    g_R, log_S = decays.slice(BEGIN, R).load(gl.SliceLayout(1, M)), logs.slice(0, SEEN).load(gl.SliceLayout(0, M))
    # the time step of what is written is part of the exponent
    decay_RS = gl.where(j[None, :] <= i[:, None], gl.exp2(g_R[:, None] + log_S[None, :]), 0.0)
    y_RP = mma_v2(c_RN, right_of(state), no_sums(R, P)) * factors.slice(BEGIN, R).load(gl.SliceLayout(1, M))[:, None]
    # the skip joins the pairs of a token with itself, in two numbers of 16 bit
    scores_RS = scores_RS * decay_RS + gl.where(same, skip_h, 0.0)
    scores_low = scores_RS.to(low)
    rest_RS = gl.where(same, scores_RS - scores_low.to(gl.float32), 0.0)
    y_RP = mma_v2(into_left(own_columns(rest_RS, R, SEEN), low), right_of(xs.slice(BEGIN, R)), y_RP)
    return mma_v2(into_left(scores_low, low), right_of(xs.slice(0, SEEN)), y_RP).to(low)


@entry(do_not_specialize=("length", "per_member", "raw_t"), gluon=True)
def ssd_forward(  # noqa: PLR0915 - one loop, whose state lives in registers
    xbc, raw, bias, log_rate, skip, y, kept, length, per_member, raw_t,
    H: gl.constexpr, P: gl.constexpr, G: gl.constexpr, N: gl.constexpr, BN: gl.constexpr, C: gl.constexpr, WHOLE: gl.constexpr,
):  # fmt: skip
    """Outputs [B, T, H, P] and states behind chunks [B, H, chunks - 1, N, P]. Grid: (B * H,). One warp, C = 32."""
    W: gl.constexpr = H * P + 2 * G * N
    R: gl.constexpr = C // 2
    M: gl.constexpr = products()
    low = xbc.dtype.element_ty
    sequence, head = gl.program_id(0) // H, gl.program_id(0) % H
    batch, weight = sequence.to(gl.int64), sequence // per_member * H + head
    natural = gl.exp2(gl.load(log_rate + weight).to(gl.float32) * LOG2_E)
    bias_h, skip_h = gl.load(bias + weight).to(gl.float32), gl.load(skip + weight).to(gl.float32)
    chunks = gl.cdiv(length, C)
    xbc += batch * length * W
    raw += batch * length * raw_t + head
    y += batch * length * (H * P) + head * P
    kept += (batch * H + head) * (chunks - 1) * (N * P)
    at_b = H * P + head // (H // G) * N

    xs = gl.allocate_shared_memory(low, [2, C, P], slots(P))
    bs = gl.allocate_shared_memory(low, [2, C, BN], slots(BN))
    cs = gl.allocate_shared_memory(low, [2, C, BN], slots(BN))
    state = gl.allocate_shared_memory(low, [BN, P], slots(P))
    decays = gl.allocate_shared_memory(gl.float32, [C], plain(1))
    logs = gl.allocate_shared_memory(gl.float32, [C], plain(1))
    keeps = gl.allocate_shared_memory(gl.float32, [C], plain(1))
    factors = gl.allocate_shared_memory(gl.float32, [C], plain(1))
    ask(xs.index(0), xbc + head * P, C, P, length, P, WHOLE, W)
    ask(bs.index(0), xbc + at_b, C, BN, length, N, WHOLE and N == BN, W)
    ask(cs.index(0), xbc + (at_b + G * N), C, BN, length, N, WHOLE and N == BN, W)
    async_copy.commit_group()
    i_C = gl.arange(0, C, lanes())
    raw_C = gl.load(raw + i_C * raw_t, mask=i_C < length, other=0.0).to(gl.float32)
    out: gl.constexpr = copied(P)
    out_t, out_n = gl.arange(0, C, gl.SliceLayout(1, out)), gl.arange(0, BN, gl.SliceLayout(1, out))
    out_p = gl.arange(0, P, gl.SliceLayout(0, out))
    state_NP = no_sums(BN, P)
    state.store(state_NP.to(low))
    at_NP = out_n[:, None] * P + out_p[None, :]
    for chunk in range(chunks):
        slot, left = chunk % 2, length - chunk * C
        async_copy.wait_group(0)
        thread_barrier()
        if chunk + 1 < chunks:
            row = xbc + C * W
            ask(xs.index(1 - slot), row + head * P, C, P, left - C, P, WHOLE, W)
            ask(bs.index(1 - slot), row + at_b, C, BN, left - C, N, WHOLE and N == BN, W)
            ask(cs.index(1 - slot), row + (at_b + G * N), C, BN, left - C, N, WHOLE and N == BN, W)
            async_copy.commit_group()
        dt_C = gl.where(i_C < left, softplus(raw_C + bias_h), 0.0)
        raw += C * raw_t
        raw_C = gl.load(raw + i_C * raw_t, mask=i_C < left - C, other=0.0).to(gl.float32)
        step_C = dt_C * (natural * -LOG2_E)
        g_C, g_all = gl.associative_scan(step_C, 0, added), gl.sum(step_C, 0)
        log_C = gl.log2(gl.maximum(dt_C, LEAST)) - g_C
        decays.store(g_C)
        logs.store(log_C)
        keeps.store(gl.exp2(log_C + g_all))
        factors.store(gl.exp2(g_C))
        y_0 = outputs(0, xs.index(slot), bs.index(slot), cs.index(slot), state, decays, logs, factors, skip_h, R, P, low)
        y_1 = outputs(1, xs.index(slot), bs.index(slot), cs.index(slot), state, decays, logs, factors, skip_h, R, P, low)
        write_NC = as_sums(left_of(bs.index(slot).permute([1, 0]))) * keeps.load(gl.SliceLayout(0, M))[None, :]
        state_NP = mma_v2(into_left(write_NC, low), right_of(xs.index(slot)), state_NP * gl.exp2(g_all))
        state.store(state_NP.to(low))
        xs.index(slot).slice(0, R).store(y_0)
        xs.index(slot).slice(R, R).store(y_1)
        at_CP = out_t.to(gl.int64)[:, None] * (H * P) + out_p[None, :]
        if WHOLE:
            gl.store(y + at_CP, xs.index(slot).load(out))
        else:
            gl.store(y + at_CP, xs.index(slot).load(out), mask=(out_t < left)[:, None])
        if chunk + 1 < chunks:
            gl.store(kept + at_NP, state.load(out), mask=(out_n < N)[:, None])
        xbc += C * W
        y += C * H * P
        kept += N * P
