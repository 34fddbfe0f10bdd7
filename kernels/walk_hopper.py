"""The walk of `kernels.walk_triton` for Hopper, in Gluon: rows come by themselves, and products run on their own.

A walk is a chain: the next chunk waits for the state. Plain Triton waits for every product of a chunk, in order. Here the scores
of the next chunk are made while the sums of this one are, and nothing of the chain waits for outputs, which leave on their own.

Shape legend: B batch, T time, H heads, C = 64 tokens of a chunk, K key, V value width, D rows and E columns of a state, BD and BE
the same on chip.
"""

from __future__ import annotations

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from kernels._entry import entry
from kernels.delta_hopper import sums_layout, thread_barrier
from kernels.delta_hopper_walk import at_stage
from kernels.walk_hopper_parts import (
    bring,
    bring_pair,
    bring_probe,
    buffers_of,
    entering,
    falls,
    half_of,
    pair_buffers_of,
    pairs_seen,
    program,
    rate_of,
    seen,
    start_of,
    state_layout,
    state_of,
)
from kernels.walk_triton import CONSTANT_GATE, NO_GATE, SCALAR_GATE

NO_PROBE, STATE_PROBE, PAIRS_PROBE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
# What differs from call to call is not specialised, so that a new batch, length or head count compiles nothing.
SIZES = ["length", "batches", "heads", "group", "gate_every", "segments", "span"]


@gluon.jit
def _leave(out, at, out_buffer, out_CE, DOT: gl.constexpr):
    """Starts to store outputs."""
    tma.store_wait(0)
    thread_barrier()
    out_buffer.store(out_CE.to(DOT))
    fence_async_shared()
    tma.async_copy_shared_to_global(out, at, out_buffer)


@gluon.jit
def _pairs_of_keys(pairs_CC, scores_buffer, square: gl.constexpr):
    """What keys of a chunk get from its own queries, of products K Q^T and the same rounded scores that made dq."""
    return gl.sum(pairs_CC * scores_buffer.permute([1, 0]).load(square).to(gl.float32), 1)


@gluon.jit
def walk(  # noqa: PLR0912, PLR0915 - one turn of a pipeline, whose order is the point
    rows, probe, out, states, lines, rate, given, last, entered, sums, decays, rowsum, place, buffers, length, heads, segments, span,
    D: gl.constexpr, E: gl.constexpr, BD: gl.constexpr, BE: gl.constexpr, GROUPS: gl.constexpr, C: gl.constexpr, STAGES: gl.constexpr,
    SLOTS: gl.constexpr, GATE: gl.constexpr, REVERSE: gl.constexpr, TURNED: gl.constexpr, START: gl.constexpr,
    CUT: gl.constexpr, ENTER: gl.constexpr, KEEP: gl.constexpr, LAST: gl.constexpr, PROBE: gl.constexpr, FACTORS: gl.constexpr, CHECK: gl.constexpr, DOT: gl.constexpr,
):  # fmt: skip
    """One head's walk; `rows` are descriptors of a, b and c, and of the lines of decays under a scalar gate."""
    batch, head, piece, _ = place
    stages, work, of_probe, bars = buffers
    state_buffer, out_buffer, scores_buffer = work
    square: gl.constexpr = sums_layout(C, GROUPS)
    narrow: gl.constexpr = sums_layout(BE, GROUPS)
    tall: gl.constexpr = state_layout(BD, BE, GROUPS) if GATE != NO_GATE else narrow
    of_rows: gl.constexpr = gl.SliceLayout(1, narrow)
    n_first, steps = piece * span, gl.minimum(span, (length + C - 1) // C - piece * span)
    none_CE, none_CC = gl.zeros([C, BE], gl.float32, narrow), gl.zeros([C, C], gl.float32, square)
    for early in gl.static_range(SLOTS if PROBE else 0):
        bring_probe(probe, of_probe, batch, head, start_of(n_first, early, steps, C, REVERSE), early, BE, C, SLOTS)
    for early in gl.static_range(STAGES - 1):
        bring(bars, rows, stages, place, heads, start_of(n_first, early, steps, C, REVERSE), early, BD, BE, C, STAGES, GATE)
    d, e = gl.arange(0, BD, gl.SliceLayout(1, tall)), gl.arange(0, BE, gl.SliceLayout(0, tall))
    offsets = (d[:, None] + e[None, :] * D) if TURNED else (d[:, None] * E + e[None, :])
    inside = (d < D)[:, None] & (e < E)[None, :]
    state_DE = state_of(given, sums, decays, place, heads, segments, offsets, inside, tall, D * E, BD, BE, START, CUT, REVERSE)
    if ENTER:
        index = (batch * segments + piece) * heads + head
        gl.store(entered + index.to(gl.int64) * D * E + offsets, state_DE, mask=inside)
    t = start_of(n_first, 0, steps, C, REVERSE)
    half = half_of(lines, rate, batch, head, heads, t, length, C, GATE)
    mbarrier.wait(bars.index(0), 0)
    first = at_stage(stages, 0)
    early_scores = warpgroup_mma(first[0], first[1].permute([1, 0]), none_CC, use_acc=False, is_async=True)
    early_CC = warpgroup_mma_wait(0, [early_scores])
    scores_buffer.store(seen(early_CC, first, rate, half, t, length, square, C, GATE, REVERSE, FACTORS).to(DOT))
    state_buffer.store(state_DE.to(DOT))
    fence_async_shared()
    for step in range(steps):
        own, following = at_stage(stages, step % STAGES), at_stage(stages, (step + 1) % STAGES)
        t_next = start_of(n_first, step + 1, steps, C, REVERSE)
        next_half = half_of(lines, rate, batch, head, heads, t_next, length, C, GATE)
        probe_CE = own[2]
        read = warpgroup_mma(own[0], state_buffer, none_CE, use_acc=False, is_async=True)
        if GATE == NO_GATE and CHECK != 4:
            read = warpgroup_mma(scores_buffer, own[2], read, is_async=True)
            state = warpgroup_mma(own[1].permute([1, 0]), own[2], state_DE, is_async=True)
        elif GATE == NO_GATE:
            state = warpgroup_mma(own[1].permute([1, 0]), own[2], state_DE, is_async=True)
            read = warpgroup_mma(scores_buffer, own[2], read, is_async=True)
        else:
            b_DC = entering(own[1], own, rate, half, t, length, tall, C, GATE, REVERSE, DOT)
            state = warpgroup_mma(b_DC, own[2], state_DE * gl.exp2(2.0 * half), is_async=True)
        if KEEP:
            chunks = (length + C - 1) // C
            tma.async_copy_shared_to_global(states, [(batch * chunks + t // C) * heads + head, 0, 0], state_buffer)
        t_far = start_of(n_first, step + STAGES - 1, steps, C, REVERSE)
        bring(bars, rows, stages, place, heads, t_far, step + STAGES - 1, BD, BE, C, STAGES, GATE)
        sum_C = gl.zeros([C], gl.float32, of_rows)
        if PROBE:
            probe_CE = of_probe[0].index(step % SLOTS)
            mbarrier.wait(of_probe[1].index(step % SLOTS), step // SLOTS % 2)
        if GATE != NO_GATE:
            fall_C = falls(own, rate, t, length, C, GATE, of_rows)
            read_CE, state = warpgroup_mma_wait(1, [read, state])
            read_CE = read_CE * gl.exp2((half - fall_C) if REVERSE else (half + fall_C))[:, None]
            if PROBE == STATE_PROBE:
                sum_C = gl.sum(read_CE * probe_CE.load(narrow).to(gl.float32), 1)
                if REVERSE:
                    sum_C = -sum_C
            read = warpgroup_mma(scores_buffer, own[2], read_CE, is_async=True)
        mbarrier.wait(bars.index((step + 1) % STAGES), (step + 1) // STAGES % 2)
        if CHECK == 1:
            thread_barrier()
        scores = warpgroup_mma(following[0], following[1].permute([1, 0]), none_CC, use_acc=False, is_async=True)
        if GATE == NO_GATE and CHECK != 4:
            if CHECK == 2:
                out_CE, state, scores = warpgroup_mma_wait(0, [read, state, scores])
            else:
                out_CE, state, scores = warpgroup_mma_wait(2, [read, state, scores])
            _leave(out, [batch, t, head, 0], out_buffer, out_CE, DOT)
            state_DE, scores = warpgroup_mma_wait(1, [state, scores])
            if KEEP:
                tma.store_wait(0)
            thread_barrier()  # all warps' products have read the state
            if CHECK == 3:
                fence_async_shared()
            state_buffer.store(state_DE.to(DOT))
            scores_CC = warpgroup_mma_wait(0, [scores])
        elif PROBE == PAIRS_PROBE:
            pairs = warpgroup_mma(own[2], probe_CE.permute([1, 0]), none_CC, use_acc=False, is_async=True)
            state_DE, read, scores, pairs = warpgroup_mma_wait(3, [state, read, scores, pairs])
            if KEEP:
                tma.store_wait(0)
            thread_barrier()  # all warps' products have read the state
            state_buffer.store(state_DE.to(DOT))
            out_CE, scores, pairs = warpgroup_mma_wait(2, [read, scores, pairs])
            _leave(out, [batch, t, head, 0], out_buffer, out_CE, DOT)
            sum_C = gl.sum(out_CE * probe_CE.load(narrow).to(gl.float32), 1)
            scores_CC, pairs_CC = warpgroup_mma_wait(0, [scores, pairs])
            sum_C -= gl.convert_layout(_pairs_of_keys(pairs_CC, scores_buffer, square), of_rows)
            thread_barrier()  # all warps have read the scores
        else:
            state_DE, read, scores = warpgroup_mma_wait(2, [state, read, scores])
            if KEEP:
                tma.store_wait(0)
            thread_barrier()  # all warps' products have read the state
            state_buffer.store(state_DE.to(DOT))
            out_CE, scores = warpgroup_mma_wait(1, [read, scores])
            _leave(out, [batch, t, head, 0], out_buffer, out_CE, DOT)
            scores_CC = warpgroup_mma_wait(0, [scores])
        scores_buffer.store(seen(scores_CC, following, rate, next_half, t_next, length, square, C, GATE, REVERSE, FACTORS).to(DOT))
        fence_async_shared()
        if PROBE:
            i = gl.arange(0, C, of_rows)
            gl.store(rowsum + t + i, sum_C, mask=t + i < length)
            thread_barrier()  # all warps have read the probe
            bring_probe(
                probe, of_probe, batch, head, start_of(n_first, step + SLOTS, steps, C, REVERSE), step + SLOTS, BE, C, SLOTS
            )
        half, t = next_half, t_next
    for rest in gl.static_range(STAGES - 2):
        mbarrier.wait(bars.index((steps + 1 + rest) % STAGES), (steps + 1 + rest) // STAGES % 2)
    for rest in gl.static_range(SLOTS if PROBE else 0):
        mbarrier.wait(of_probe[1].index((steps + rest) % SLOTS), (steps + rest) // SLOTS % 2)
    tma.store_wait(0)
    if LAST:
        ending = (piece == 0) if REVERSE else (piece == segments - 1)
        gl.store(last + (batch * heads + head).to(gl.int64) * D * E + offsets, state_DE, mask=inside & ending)


@entry(do_not_specialize=SIZES, gluon=True)
def forward_kernel(
    q, k, v, o, states, falls_of, lines, gate, first, last, entered, sums, decays,
    length: tl.int32, batches: tl.int32, heads: tl.int32, group: tl.int32, gate_every: tl.int32,
    segments: tl.int32, span: tl.int32,
    K: gl.constexpr, V: gl.constexpr, BK: gl.constexpr, BV: gl.constexpr, GROUPS: gl.constexpr, C: gl.constexpr, STAGES: gl.constexpr,
    GATE: gl.constexpr, START: gl.constexpr, CUT: gl.constexpr, ENTER: gl.constexpr, KEEP: gl.constexpr, LAST: gl.constexpr, FACTORS: gl.constexpr, CHECK: gl.constexpr,
    DOT: gl.constexpr,
):  # fmt: skip
    """Outputs, on descriptors of blocks of a chunk, of GROUPS warp groups. Grid: (B * P * H,).

    A segment is `span` chunks. With CUT `sums` and `decays` are those of `kernels.walk_forward_triton.segment_kernel`. ENTER
    writes the state that enters each segment, KEEP that before each chunk in 16 bit, [B * N * H, K, V].
    """
    _, head, piece, batch = program(heads, segments, 1)
    rate = rate_of(gate, batch, head, heads, gate_every, GATE == CONSTANT_GATE)
    walk(
        (q, k, v, falls_of) if GATE == SCALAR_GATE else (q, k, v), v, o, states, lines, rate, first, last, entered, sums, decays,
        last, (batch, head, piece, head // group), buffers_of(BK, BV, C, STAGES, 0, GATE, DOT), length, heads, segments, span,
        K, V, BK, BV, GROUPS, C, STAGES, 0, GATE, False, False, START, CUT, ENTER, KEEP, LAST, NO_PROBE, FACTORS, CHECK, DOT,
    )  # fmt: skip


@gluon.jit
def walk_pair(  # noqa: PLR0915 - one turn of a pipeline, whose order is the point
    rows, outs, lines, rate, given, last, sums, decays, rowsum, rowsum_pairs, place, buffers, length, heads, segments, span,
    K: gl.constexpr, V: gl.constexpr, W: gl.constexpr, GROUPS: gl.constexpr, C: gl.constexpr, STAGES: gl.constexpr,
    GATE: gl.constexpr, START: gl.constexpr, CUT: gl.constexpr, LAST: gl.constexpr, PROBE: gl.constexpr, DOT: gl.constexpr,
):  # fmt: skip
    """One head's reverse walk for all of dk and dv, which read the same gradient of the state."""
    batch, head, piece, _ = place
    stages, work, bars = buffers
    state_buffer, dk_buffer, dv_buffer, kq_buffer, vo_buffer = work
    dk, dv = outs
    square: gl.constexpr = sums_layout(C, GROUPS)
    narrow: gl.constexpr = sums_layout(W, GROUPS)
    tall: gl.constexpr = state_layout(W, W, GROUPS) if GATE != NO_GATE else narrow
    of_rows: gl.constexpr = gl.SliceLayout(1, narrow)
    n_first, steps = piece * span, gl.minimum(span, (length + C - 1) // C - piece * span)
    none_CW, none_CC = gl.zeros([C, W], gl.float32, narrow), gl.zeros([C, C], gl.float32, square)
    for early in gl.static_range(STAGES - 1):
        bring_pair(bars, rows, stages, place, heads, start_of(n_first, early, steps, C, True), early, W, C, STAGES, GATE)
    d, e = gl.arange(0, W, gl.SliceLayout(1, tall)), gl.arange(0, W, gl.SliceLayout(0, tall))
    offsets, inside = d[:, None] * V + e[None, :], (d < K)[:, None] & (e < V)[None, :]
    state_KV = state_of(given, sums, decays, place, heads, segments, offsets, inside, tall, K * V, W, W, START, CUT, True)
    t = start_of(n_first, 0, steps, C, True)
    half = half_of(lines, rate, batch, head, heads, t, length, C, GATE)
    mbarrier.wait(bars.index(0), 0)
    first = at_stage(stages, 0)
    early_kq = warpgroup_mma(first[1], first[0].permute([1, 0]), none_CC, use_acc=False, is_async=True)
    early_vo = warpgroup_mma(first[2], first[3].permute([1, 0]), none_CC, use_acc=False, is_async=True)
    kq_CC, vo_CC = warpgroup_mma_wait(0, [early_kq, early_vo])
    kq_CC, vo_CC, of_keys, of_queries = pairs_seen(kq_CC, vo_CC, first, rate, t, length, square, C, GATE, PROBE)
    kq_buffer.store(kq_CC.to(DOT))
    vo_buffer.store(vo_CC.to(DOT))
    state_buffer.store(state_KV.to(DOT))
    fence_async_shared()
    i, j = gl.arange(0, C, gl.SliceLayout(0, square)), gl.arange(0, C, of_rows)
    if PROBE:
        gl.store(rowsum_pairs + t + i, of_queries, mask=t + i < length)
    for step in range(steps):
        own, following = at_stage(stages, step % STAGES), at_stage(stages, (step + 1) % STAGES)
        t_next = start_of(n_first, step + 1, steps, C, True)
        next_half = half_of(lines, rate, batch, head, heads, t_next, length, C, GATE)
        dv_read = warpgroup_mma(own[1], state_buffer, none_CW, use_acc=False, is_async=True)
        dk_read = warpgroup_mma(own[2], state_buffer.permute([1, 0]), none_CW, use_acc=False, is_async=True)
        if GATE == NO_GATE:
            state = warpgroup_mma(own[0].permute([1, 0]), own[3], state_KV, is_async=True)
        else:
            q_KC = entering(own[0], own, rate, half, t, length, tall, C, GATE, True, DOT)
            state = warpgroup_mma(q_KC, own[3], state_KV * gl.exp2(2.0 * half), is_async=True)
        t_far = start_of(n_first, step + STAGES - 1, steps, C, True)
        bring_pair(bars, rows, stages, place, heads, t_far, step + STAGES - 1, W, C, STAGES, GATE)
        if GATE != NO_GATE:
            read_C = gl.exp2(half - falls(own, rate, t, length, C, GATE, of_rows))
            dv_CW, dk_CW, state = warpgroup_mma_wait(1, [dv_read, dk_read, state])
            dv_CW = dv_CW * read_C[:, None]
            dk_CW = dk_CW * read_C[:, None]
            if PROBE:
                sum_C = gl.sum(dv_CW * own[2].load(narrow).to(gl.float32), 1)
                sum_C = -sum_C - gl.convert_layout(of_keys, of_rows)
                gl.store(rowsum + t + j, sum_C, mask=t + j < length)
            dv_read, dk_read = dv_CW, dk_CW
        dv_sums = warpgroup_mma(kq_buffer, own[3], dv_read, is_async=True)
        dk_sums = warpgroup_mma(vo_buffer, own[0], dk_read, is_async=True)
        mbarrier.wait(bars.index((step + 1) % STAGES), (step + 1) // STAGES % 2)
        kq = warpgroup_mma(following[1], following[0].permute([1, 0]), none_CC, use_acc=False, is_async=True)
        vo = warpgroup_mma(following[2], following[3].permute([1, 0]), none_CC, use_acc=False, is_async=True)
        state_KV, dv_sums, dk_sums, kq, vo = warpgroup_mma_wait(4, [state, dv_sums, dk_sums, kq, vo])
        tma.store_wait(0)
        thread_barrier()  # all warps' products have read the state
        state_buffer.store(state_KV.to(DOT))
        dv_CW, dk_CW, kq, vo = warpgroup_mma_wait(2, [dv_sums, dk_sums, kq, vo])
        dv_buffer.store(dv_CW.to(DOT))
        dk_buffer.store(dk_CW.to(DOT))
        fence_async_shared()
        tma.async_copy_shared_to_global(dv, [batch, t, head, 0], dv_buffer)
        tma.async_copy_shared_to_global(dk, [batch, t, head, 0], dk_buffer)
        thread_barrier()  # all warps' products have read the scores
        kq_CC, vo_CC = warpgroup_mma_wait(0, [kq, vo])
        kq_CC, vo_CC, of_keys, of_queries = pairs_seen(kq_CC, vo_CC, following, rate, t_next, length, square, C, GATE, PROBE)
        kq_buffer.store(kq_CC.to(DOT))
        vo_buffer.store(vo_CC.to(DOT))
        fence_async_shared()
        if PROBE:
            gl.store(rowsum_pairs + t_next + i, of_queries, mask=t_next + i < length)
        half, t = next_half, t_next
    for rest in gl.static_range(STAGES - 2):
        mbarrier.wait(bars.index((steps + 1 + rest) % STAGES), (steps + 1 + rest) // STAGES % 2)
    tma.store_wait(0)
    if LAST:
        gl.store(last + (batch * heads + head).to(gl.int64) * K * V + offsets, state_KV, mask=inside & (piece == 0))


@entry(do_not_specialize=SIZES, gluon=True)
def pair_kernel(
    q, k, v, do, dq, dk, dv, falls_of, lines, gate, first, dlast, dfirst, sums, decays, rowsums,
    length: tl.int32, batches: tl.int32, heads: tl.int32, gate_every: tl.int32, segments: tl.int32, span: tl.int32,
    K: gl.constexpr, V: gl.constexpr, W: gl.constexpr, GROUPS: gl.constexpr, C: gl.constexpr, STAGES: gl.constexpr,
    PAIR_STAGES: gl.constexpr, SLOTS: gl.constexpr, GATE: gl.constexpr, START: gl.constexpr, CUT: gl.constexpr,
    DLAST: gl.constexpr, LAST: gl.constexpr, GATE_GRAD: gl.constexpr, FACTORS: gl.constexpr, CHECK: gl.constexpr,
    DOT: gl.constexpr,
):  # fmt: skip
    """`backward_kernel` with keys and values in one walk. Grid: (B * P * H * 2,). `rowsums` are [3, B, H, T]."""
    part, head, piece, batch = program(heads, segments, 2)
    rate = rate_of(gate, batch, head, heads, gate_every, GATE == CONSTANT_GATE)
    rowsum = rowsums + (batch.to(gl.int64) * heads + head) * length
    size = batches.to(gl.int64) * heads * length
    LATER: gl.constexpr = STATE_PROBE if GATE_GRAD else NO_PROBE
    if part == 0:
        walk_pair(
            (q, k, v, do, falls_of) if GATE == SCALAR_GATE else (q, k, v, do), (dk, dv), lines, rate, dlast, dfirst, sums, decays,
            rowsum + size, rowsum + 2 * size, (batch, head, piece, head), pair_buffers_of(W, C, PAIR_STAGES, GATE, DOT),
            length, heads, segments, span,
            K, V, W, GROUPS, C, PAIR_STAGES, GATE, DLAST, CUT, LAST, GATE_GRAD, DOT,
        )  # fmt: skip
    else:
        walk(
            (do, v, k, falls_of) if GATE == SCALAR_GATE else (do, v, k), q, dq, q, lines, rate, first, first, first, sums, decays,
            rowsum, (batch, head, piece, head), buffers_of(W, W, C, STAGES, SLOTS if GATE_GRAD else 0, GATE, DOT),
            length, heads, segments, span,
            V, K, W, W, GROUPS, C, STAGES, SLOTS, GATE, False, True, START, False, False, False, False, LATER, FACTORS, CHECK, DOT,
        )  # fmt: skip


@entry(do_not_specialize=SIZES, gluon=True)
def backward_kernel(
    q, k, v, do, dq, dk, dv, falls_of, lines, gate, first, dlast, dfirst, sums, decays, rowsums,
    length: tl.int32, batches: tl.int32, heads: tl.int32, gate_every: tl.int32, segments: tl.int32, span: tl.int32,
    K: gl.constexpr, V: gl.constexpr, W: gl.constexpr, GROUPS: gl.constexpr, C: gl.constexpr, STAGES: gl.constexpr,
    SLOTS: gl.constexpr, GATE: gl.constexpr, START: gl.constexpr, CUT: gl.constexpr, DLAST: gl.constexpr, LAST: gl.constexpr,
    GATE_GRAD: gl.constexpr, FACTORS: gl.constexpr, CHECK: gl.constexpr, DOT: gl.constexpr,
):  # fmt: skip
    """Gradients of queries, keys and values, each by a walk. Grid: (B * P * H * 3,), neighbours share a head and the L2 cache.

    `first` starts the walk of queries (START), `dlast` (DLAST) with `sums` and `decays` (CUT) those of keys and values; `dfirst`
    is written with LAST. `rowsums` [2, B, H, T] sum to the gradient of the cumulated decays.
    """
    part, head, piece, batch = program(heads, segments, 3)
    rate = rate_of(gate, batch, head, heads, gate_every, GATE == CONSTANT_GATE)
    rowsum = rowsums + (batch.to(gl.int64) * heads + head) * length
    rowsum_later = rowsum + batches.to(gl.int64) * heads * length
    PAIRS: gl.constexpr = PAIRS_PROBE if GATE_GRAD else NO_PROBE
    LATER: gl.constexpr = STATE_PROBE if GATE_GRAD else NO_PROBE
    buffers = buffers_of(W, W, C, STAGES, SLOTS if GATE_GRAD else 0, GATE, DOT)
    if part == 0:
        walk(
            (do, v, k, falls_of) if GATE == SCALAR_GATE else (do, v, k), q, dq, q, lines, rate, first, first, first, sums, decays,
            rowsum, (batch, head, piece, head), buffers, length, heads, segments, span,
            V, K, W, W, GROUPS, C, STAGES, SLOTS, GATE, False, True, START, False, False, False, False, PAIRS, FACTORS, CHECK, DOT,
        )  # fmt: skip
    elif part == 1:
        walk(
            (v, do, q, falls_of) if GATE == SCALAR_GATE else (v, do, q), q, dk, q, lines, rate, dlast, first, first, sums, decays,
            rowsum, (batch, head, piece, head), buffers, length, heads, segments, span,
            V, K, W, W, GROUPS, C, STAGES, SLOTS, GATE, True, True, DLAST, CUT, False, False, False, NO_PROBE, FACTORS, CHECK, DOT,
        )  # fmt: skip
    else:
        walk(
            (k, q, do, falls_of) if GATE == SCALAR_GATE else (k, q, do), v, dv, q, lines, rate, dlast, dfirst, first, sums, decays,
            rowsum_later, (batch, head, piece, head), buffers, length, heads, segments, span,
            K, V, W, W, GROUPS, C, STAGES, SLOTS, GATE, True, False, DLAST, CUT, False, False, LAST, LATER, FACTORS, CHECK, DOT,
        )  # fmt: skip
