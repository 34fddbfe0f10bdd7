"""Gradients of Mamba-2's recurrence with narrow states: a program is one warp, owns a chunk of a group and goes through its heads.

States that enter the chunk were kept by the forward pass, gradients of those that leave it come from a walk of their own
(`kernels.narrow.ssd_forward_triton`), so no program waits for another. Products are turned so that what one leaves in registers
is the left operand of the next, [j, i] where token j is written and token i reads; only pairs have to be turned once, for dC.
The gradient of a token's log decay is what is read across it less what is written, a sum over the chunk from its end, and what
leaves the chunk. Both are sums over the states, c_i . dc_i and b_j . db_j of a head: of the same rounded pairs, so that what
does not cross a token cancels. Scalars of tokens are made for all heads at once, before and after, in a layout where a thread
has some tokens of one head.

Bytes: reads x, B, C, raw, dy and both states, writes the rows' gradients and those of raw.

Shape legend: as `kernels.narrow.ssd_forward_triton`; E heads of a group, padded to a power of two.
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
    by_token,
    by_tokens,
    copied,
    into_left,
    lane_shares,
    left_of,
    no_sums,
    plain,
    products,
    right_of,
    slope_of,
    slots,
    softplus,
)

thread_barrier = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier  # the latter from Triton 3.7 on


@gluon.jit
def halves(x_RI, R: gl.constexpr, READ: gl.constexpr):
    """Columns of the same half of tokens as the rows and, of all, those of the other one; only names registers."""
    if R == READ:
        return x_RI, x_RI
    else:
        first, second = gl.split(x_RI.reshape([R, 2, R]).permute([0, 2, 1]))
        return gl.convert_layout(first, products()), gl.convert_layout(second, products())


@gluon.jit
def written(
    half: gl.constexpr, db_RN, xs, dys, dstates, bs, cs, turns, decay_slot, write_slot, keep_slot, skip_h,
    C: gl.constexpr, P: gl.constexpr, BN: gl.constexpr, low: gl.constexpr,
):  # fmt: skip
    """Half of a head's tokens as those that are written, read by itself and what follows: adds to dB, leaves dx in x's place."""
    M: gl.constexpr = products()
    R: gl.constexpr = C // 2
    BEGIN: gl.constexpr = half * R
    READ: gl.constexpr = C - BEGIN
    x_RP = left_of(xs.slice(BEGIN, R))
    b_RN = left_of(bs.slice(BEGIN, R))
    pairs_RI = mma_v2(x_RP, right_of(dys.slice(BEGIN, READ).permute([1, 0])), no_sums(R, READ))
    db_h = mma_v2(x_RP, right_of(dstates.permute([1, 0])), no_sums(R, BN))
    scores_RI = mma_v2(b_RN, right_of(cs.slice(BEGIN, READ).permute([1, 0])), no_sums(R, READ))
    j, i = gl.arange(0, R, gl.SliceLayout(1, M)), gl.arange(0, READ, gl.SliceLayout(0, M))
    same = j[:, None] == i[None, :]
    g_I = decay_slot.slice(BEGIN, READ).load(gl.SliceLayout(0, M))
    log_R = write_slot.slice(BEGIN, R).load(gl.SliceLayout(1, M))
    decay_RI = gl.where(j[:, None] <= i[None, :], gl.exp2(g_I[None, :] + log_R[:, None]), 0.0)
    skipped = lane_shares(gl.where(same, pairs_RI, 0.0), R, READ)
    pairs_low = (pairs_RI * decay_RI).to(low)
    first_RR, later_RR = halves(pairs_low, R, READ)
    turns.index(2 * half).store(first_RR)
    if half == 0:
        turns.index(1).store(later_RR)
    keep_R1 = keep_slot.slice(BEGIN, R).load(gl.SliceLayout(1, M))[:, None]
    # dB, of which what goes beyond the chunk
    b32_RN = as_sums(b_RN)
    db_h *= keep_R1
    later = lane_shares(db_h * b32_RN, R, BN)
    db_h = mma_v2(into_left(pairs_low, low), right_of(cs.slice(BEGIN, READ)), db_h)
    write_slot.slice(BEGIN, R).store(gl.sum(db_h * b32_RN, 1))
    # the skip joins the pairs of a token with itself, in two numbers of 16 bit
    scores_RI = scores_RI * decay_RI + gl.where(same, skip_h, 0.0)
    scores_low = scores_RI.to(low)
    rest_RI = gl.where(same, scores_RI - scores_low.to(gl.float32), 0.0)
    rest_RR, _ = halves(rest_RI, R, READ)
    dx_RP = mma_v2(into_left(rest_RR, low), right_of(dys.slice(BEGIN, R)), no_sums(R, P))
    dx_RP = mma_v2(into_left(b32_RN * keep_R1, low), right_of(dstates), dx_RP)
    dx_RP = mma_v2(into_left(scores_low, low), right_of(dys.slice(BEGIN, READ)), dx_RP)
    xs.slice(BEGIN, R).store(dx_RP.to(low))
    return db_RN + db_h, later, skipped


@gluon.jit
def read(half: gl.constexpr, dc_RN, dys, states, bs, cs, turns, factor_slot, R: gl.constexpr, BN: gl.constexpr):
    """Half of a head's tokens as those that read: adds to dC, leaves what is read of the decays in the factors' place."""
    BEGIN: gl.constexpr = half * R
    factor_R = factor_slot.slice(BEGIN, R).load(gl.SliceLayout(1, products()))
    dc_h = mma_v2(left_of(dys.slice(BEGIN, R)), right_of(states.permute([1, 0])), no_sums(R, BN)) * factor_R[:, None]
    for earlier in gl.static_range(half + 1):
        dc_h = mma_v2(left_of(turns.index(half + earlier).permute([1, 0])), right_of(bs.slice(earlier * R, R)), dc_h)
    factor_slot.slice(BEGIN, R).store(gl.sum(dc_h * as_sums(left_of(cs.slice(BEGIN, R))), 1))
    return dc_RN + dc_h


@gluon.jit
def ask_head(
    xs, dys, states, dstates, x_ptr, dy_ptr, kept_ptr, dkept_ptr, left, enters, leaves,
    C: gl.constexpr, P: gl.constexpr, BN: gl.constexpr, W: gl.constexpr, E: gl.constexpr, WHOLE: gl.constexpr,
):  # fmt: skip
    """Sends all that a head needs on its way."""
    ask(xs, x_ptr, C, P, left, P, WHOLE, W)
    ask(dys, dy_ptr, C, P, left, P, WHOLE, E)
    ask(states, kept_ptr, BN, P, enters, P, False, P)
    ask(dstates, dkept_ptr, BN, P, leaves, P, False, P)
    async_copy.commit_group()


@entry(do_not_specialize=("length", "per_member", "raw_t", "draw_t"), gluon=True)
def ssd_backward(  # noqa: PLR0915 - one loop, whose values live in registers
    xbc, dy, raw, bias, log_rate, skip, kept, dkept, dxbc, draw, parts, length, per_member, raw_t, draw_t,
    H: gl.constexpr, P: gl.constexpr, G: gl.constexpr, N: gl.constexpr, BN: gl.constexpr, C: gl.constexpr,
    HEADS: gl.constexpr, WHOLE: gl.constexpr,
):  # fmt: skip
    """Gradients of rows [B, T, W] and of raw, and shares [B, chunks, 3, H] of those of log rate, bias and skip.

    Grid: (B * chunks * G,). One warp, C = 32. HEADS: those of a group, padded to a power of two; WHOLE: no chunk is broken.
    """
    W: gl.constexpr = H * P + 2 * G * N
    EACH: gl.constexpr = H // G
    M: gl.constexpr = products()
    S: gl.constexpr = by_token(C, HEADS)
    OF_HEAD: gl.constexpr = gl.SliceLayout(0, S)
    low = xbc.dtype.element_ty
    group, chunks = gl.program_id(0) % G, gl.cdiv(length, C)
    sequence = gl.program_id(0) // G // chunks
    chunk, batch = gl.program_id(0) // G - sequence * chunks, sequence.to(gl.int64)
    row, left = batch * length + chunk * C, length - chunk * C
    raw += row * raw_t
    draw += row * draw_t
    parts += (batch * chunks + chunk) * 3 * H
    first, member = group * EACH, sequence // per_member * H
    shared_at = row * W + H * P + group * N
    x_at, dy_at = row * W + first * P, row * (H * P) + first * P
    state_at, state_step = ((batch * H + first) * (chunks - 1) + chunk) * (N * P), (chunks - 1) * (N * P)
    kept -= N * P
    enters, leaves = gl.where(chunk > 0, N, 0), gl.where(chunk + 1 < chunks, N, 0)

    xs = gl.allocate_shared_memory(low, [C, P], slots(P))
    dys = gl.allocate_shared_memory(low, [C, P], slots(P))
    states = gl.allocate_shared_memory(low, [BN, P], slots(P))
    dstates = gl.allocate_shared_memory(low, [BN, P], slots(P))
    bs = gl.allocate_shared_memory(low, [C, BN], slots(BN))
    cs = gl.allocate_shared_memory(low, [C, BN], slots(BN))
    turns = gl.allocate_shared_memory(low, [3, C // 2, C // 2], slots(C // 2))  # the fourth block has no pairs
    ask(bs, xbc + shared_at, C, BN, left, N, WHOLE and N == BN, W)
    ask(cs, xbc + shared_at + G * N, C, BN, left, N, WHOLE and N == BN, W)
    ask_head(
        xs, dys, states, dstates, xbc + x_at, dy + dy_at, kept + state_at, dkept + state_at,
        left, enters, leaves, C, P, BN, W, H * P, WHOLE,
    )  # fmt: skip

    # scalars of tokens, for all heads
    i_C, e_E = gl.arange(0, C, gl.SliceLayout(1, S)), gl.arange(0, HEADS, OF_HEAD)
    is_head, weight_at = e_E < EACH, member + first + e_E
    inside_CE = (i_C < left)[:, None] & is_head[None, :]
    natural_E = gl.exp2(gl.load(log_rate + weight_at, mask=is_head, other=0.0).to(gl.float32) * LOG2_E)
    bias_E = gl.load(bias + weight_at, mask=is_head, other=0.0).to(gl.float32)
    raw_CE = gl.load(raw + (i_C[:, None] * raw_t + first + e_E[None, :]), mask=inside_CE, other=0.0).to(gl.float32)
    dt_CE = gl.where(inside_CE, softplus(raw_CE + bias_E[None, :]), 0.0)
    g_CE = gl.associative_scan(dt_CE * (natural_E * -LOG2_E)[None, :], 0, added)
    g_all_E = gl.sum(dt_CE, 0) * (natural_E * -LOG2_E)
    log_CE = gl.log2(gl.maximum(dt_CE, LEAST)) - g_CE
    # by head and token; when a head is done, what it found takes the place of what it read
    decays = gl.allocate_shared_memory(gl.float32, [HEADS, C], plain(1))
    writes = gl.allocate_shared_memory(gl.float32, [HEADS, C], plain(1))
    keeps = gl.allocate_shared_memory(gl.float32, [HEADS, C], plain(1))
    reads = gl.allocate_shared_memory(gl.float32, [HEADS, C], plain(1))
    skips = gl.allocate_shared_memory(gl.float32, [HEADS, C], plain(1))
    by_tokens(decays, HEADS, C).store(g_CE)
    by_tokens(writes, HEADS, C).store(log_CE)
    by_tokens(keeps, HEADS, C).store(gl.exp2(log_CE + g_all_E[None, :]))
    by_tokens(reads, HEADS, C).store(gl.exp2(g_CE))

    n1, n2 = gl.arange(0, BN, gl.SliceLayout(1, M)), gl.arange(0, BN, gl.SliceLayout(0, M))
    db_0, db_1 = no_sums(C // 2, BN), no_sums(C // 2, BN)
    dc_0, dc_1 = no_sums(C // 2, BN), no_sums(C // 2, BN)
    out: gl.constexpr = copied(P)
    out_t, out_p = gl.arange(0, C, gl.SliceLayout(1, out)), gl.arange(0, P, gl.SliceLayout(0, out))
    for e in range(EACH):
        async_copy.wait_group(0)
        thread_barrier()
        skip_h = gl.load(skip + (member + first + e)).to(gl.float32)
        db_0, later_0, skipped_0 = written(
            0, db_0, xs, dys, dstates, bs, cs, turns, decays.index(e), writes.index(e), keeps.index(e), skip_h, C, P, BN, low
        )
        db_1, later_1, skipped_1 = written(
            1, db_1, xs, dys, dstates, bs, cs, turns, decays.index(e), writes.index(e), keeps.index(e), skip_h, C, P, BN, low
        )
        keeps.index(e).store(later_0 + later_1)
        skips.index(e).store(skipped_0 + skipped_1)
        met_NN = mma_v2(left_of(states), right_of(dstates.permute([1, 0])), no_sums(BN, BN))
        decays.index(e).store(lane_shares(gl.where(n1[:, None] == n2[None, :], met_NN, 0.0), BN, BN))
        dc_0 = read(0, dc_0, dys, states, bs, cs, turns, reads.index(e), C // 2, BN)
        dc_1 = read(1, dc_1, dys, states, bs, cs, turns, reads.index(e), C // 2, BN)
        at_CP = out_t.to(gl.int64)[:, None] * W + out_p[None, :]
        gl.store(dxbc + (x_at + e * P) + at_CP, xs.load(out), mask=(out_t < left)[:, None])
        if EACH > 1:  # how addresses are aligned is found out from the loop
            thread_barrier()
            if e + 1 < EACH:
                ask_head(
                    xs, dys, states, dstates, xbc + (x_at + (e + 1) * P), dy + (dy_at + (e + 1) * P),
                    kept + (state_at + (e + 1) * state_step), dkept + (state_at + (e + 1) * state_step),
                    left, enters, leaves, C, P, BN, W, H * P, WHOLE,
                )  # fmt: skip

    # decays and time steps
    written_CE, read_CE = by_tokens(writes, HEADS, C).load(S), by_tokens(reads, HEADS, C).load(S)
    crossing_E = gl.sum(by_tokens(keeps, HEADS, C).load(S), 0)
    crossing_E += gl.exp2(g_all_E) * gl.sum(by_tokens(decays, HEADS, C).load(S), 0)
    decay_grad_CE = gl.associative_scan(read_CE - written_CE, 0, added, reverse=True) + crossing_E[None, :]
    draw_CE = (written_CE - natural_E[None, :] * decay_grad_CE * dt_CE) * slope_of(dt_CE)
    gl.store(draw + (i_C[:, None] * draw_t + first + e_E[None, :]), draw_CE.to(draw.dtype.element_ty), mask=inside_CE)
    gl.store(parts + first + e_E, gl.sum(decay_grad_CE * dt_CE, 0) * -natural_E, mask=is_head)
    gl.store(parts + H + first + e_E, gl.sum(draw_CE, 0), mask=is_head)
    gl.store(parts + 2 * H + first + e_E, gl.sum(by_tokens(skips, HEADS, C).load(S), 0), mask=is_head)
    bs.slice(0, C // 2).store(db_0.to(low))
    bs.slice(C // 2, C // 2).store(db_1.to(low))
    cs.slice(0, C // 2).store(dc_0.to(low))
    cs.slice(C // 2, C // 2).store(dc_1.to(low))
    rows: gl.constexpr = copied(BN)
    t_C, n_N = gl.arange(0, C, gl.SliceLayout(1, rows)), gl.arange(0, BN, gl.SliceLayout(0, rows))
    at_CN, inside_CN = shared_at + t_C[:, None] * W + n_N[None, :], (t_C < left)[:, None] & (n_N < N)[None, :]
    gl.store(dxbc + at_CN, bs.load(rows), mask=inside_CN)
    gl.store(dxbc + at_CN + G * N, cs.load(rows), mask=inside_CN)
