"""The walk of `kernels.walk_triton` for Hopper, in Gluon: rows come by the tensor memory accelerator, products run on their own.

A walk is a chain: the next chunk waits for the state. Plain Triton waits for every product of a chunk, in order. Here the scores
of the next chunk are made while the sums of this one are, and nothing of the chain waits for outputs, which leave on their own.

Shape legend: B batch, T time, H heads, P segments, C = 64 tokens of a chunk, D width of a and b, E width of c and out.
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
    EACH_GIVEN,
    bring,
    bring_probe,
    buffers_of,
    decays_of,
    enter,
    entering,
    gate_of,
    mended,
    program,
    seen,
    start_of,
    steps_of,
)
from kernels.walk_triton import NO_GATE

QUERIES, KEYS, VALUES = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
NO_PROBE, STATE_PROBE, PAIRS_PROBE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
# What differs from call to call is not specialised, so that a new batch, length or head count compiles nothing.
SIZES = ["length", "batches", "heads", "group", "gate_every", "segments", "span"]


@gluon.jit
def _outputs(
    read, state, scores, own, probe_CE, work, decays, none_CE, none_CC, narrow: gl.constexpr,
    GATE: gl.constexpr, PROBE: gl.constexpr,
):  # fmt: skip
    """The sums of a chunk's outputs, which run, and their rows' products with the probe.

    Returns:
        Sums, products with the probe, and what runs on: the state, the next scores, and the probe's products with c.
    """
    state_buffer, _, scores_buffer, _ = work
    of_rows: gl.constexpr = gl.SliceLayout(1, narrow)
    sum_C, pairs = decays[0], none_CC
    if PROBE == STATE_PROBE:
        read_CE, state, scores = warpgroup_mma_wait(2, [read, state, scores])
        read_CE = mended(read_CE, own[0], state_buffer, none_CE, decays, of_rows, GATE, False)
        sum_C = -gl.sum(read_CE * probe_CE.load(narrow).to(gl.float32), 1)
        fence_async_shared()
        added = warpgroup_mma(scores_buffer, own[2], read_CE, is_async=True)
        out_CE, state, scores = warpgroup_mma_wait(0, [added, state, scores])
    elif PROBE == PAIRS_PROBE:
        fence_async_shared()
        pairs = warpgroup_mma(own[2], probe_CE.permute([1, 0]), none_CC, use_acc=False, is_async=True)
        out_CE, state, scores, pairs = warpgroup_mma_wait(3, [read, state, scores, pairs])
        out_CE = mended(out_CE, own[0], state_buffer, none_CE, decays, of_rows, GATE, True)
        sum_C = gl.sum(out_CE * probe_CE.load(narrow).to(gl.float32), 1)
    else:
        out_CE, state, scores = warpgroup_mma_wait(2, [read, state, scores])
        out_CE = mended(out_CE, own[0], state_buffer, none_CE, decays, of_rows, GATE, True)
    return out_CE, sum_C, state, scores, pairs


@gluon.jit
def _leave(out, at, out_buffer, out_CE, leave_C, GATE: gl.constexpr, DOT: gl.constexpr):
    """Starts to store outputs."""
    if GATE != NO_GATE:
        out_CE = out_CE * gl.exp2(leave_C)[:, None]
    tma.store_wait(0)
    thread_barrier()
    out_buffer.store(out_CE.to(DOT))
    fence_async_shared()
    tma.async_copy_shared_to_global(out, at, out_buffer)


@gluon.jit
def _probed(
    rowsum, t, length, rows, sum_C, pairs_CC, scores_buffer, line_buffer, leave_C, square: gl.constexpr, narrow: gl.constexpr,
    C: gl.constexpr, PROBE: gl.constexpr,
):  # fmt: skip
    """Writes a chunk's part of the gradient of the cumulated decays.

    Of pairs inside of the chunk a query's sum is that of its row, and a key's is made of the same rounded numbers, K' Q^T and the
    gradients of the scores, so that they cancel where they should.
    """
    sum_C = sum_C * gl.exp2(gl.convert_layout(leave_C, gl.SliceLayout(1, narrow)))
    if PROBE == PAIRS_PROBE:
        line_buffer.store(leave_C)
        ds_CC = scores_buffer.permute([1, 0]).load(square).to(gl.float32)
        of_keys_C = gl.sum(pairs_CC * ds_CC * gl.exp2(line_buffer.load(gl.SliceLayout(0, square)))[None, :], 1)
        gl.store(rowsum + t + rows, gl.convert_layout(sum_C, gl.SliceLayout(1, square)) - of_keys_C, mask=t + rows < length)
    else:
        wide_rows = gl.arange(0, C, gl.SliceLayout(1, narrow))
        gl.store(rowsum + t + wide_rows, sum_C, mask=t + wide_rows < length)


@gluon.jit
def _late(state_DE, own, out_buffer, decays, narrow: gl.constexpr, DOT: gl.constexpr):
    """The state behind a chunk, with what the cut scalings of a rough one left out."""
    state_DE = state_DE * gl.exp2(decays[2])
    if decays[4]:
        tma.store_wait(0)
        thread_barrier()
        late_C = gl.convert_layout(gl.exp2(decays[2] - decays[1]) - gl.exp2(decays[2]), gl.SliceLayout(1, narrow))
        out_buffer.store((own[2].load(narrow).to(gl.float32) * late_C[:, None]).to(DOT))
        fence_async_shared()
        more = warpgroup_mma(own[1].permute([1, 0]), out_buffer, state_DE, is_async=True)
        state_DE = warpgroup_mma_wait(0, [more])
        thread_barrier()
    return state_DE


@gluon.jit
def _walk(  # noqa: PLR0912, PLR0915 - one turn of a pipeline, whose order is the point
    a, b, c, probe, out, gate, given, last, entered, sums, decays_of_segments, rowsum, place, buffers,
    length, heads, head, piece, segments, span,
    D: gl.constexpr, E: gl.constexpr, BD: gl.constexpr, BE: gl.constexpr, GROUPS: gl.constexpr, C: gl.constexpr,
    STAGES: gl.constexpr, SLOTS: gl.constexpr, GATE: gl.constexpr, REVERSE: gl.constexpr, TURNED: gl.constexpr,
    START: gl.constexpr, LAST: gl.constexpr, ENTER: gl.constexpr, PROBE: gl.constexpr, DOT: gl.constexpr,
):  # fmt: skip
    """One walk of a segment of one head; see `forward_kernel` and `backward_kernel`."""
    square: gl.constexpr = sums_layout(C, GROUPS)
    narrow: gl.constexpr = sums_layout(BE, GROUPS)
    of_rows: gl.constexpr = gl.SliceLayout(1, narrow)
    stages, work, of_probe, bars = buffers
    state_buffer, out_buffer, scores_buffer, line_buffer = work
    batch, e_start, sources = place[0], place[3], (a, b, c)
    n_first, steps = piece * span, gl.minimum(span, (length + C - 1) // C - piece * span)
    rows, cols = gl.arange(0, C, gl.SliceLayout(1, square)), gl.arange(0, C, gl.SliceLayout(0, square))
    none_CE, none_CC = gl.zeros([C, BE], gl.float32, narrow), gl.zeros([C, C], gl.float32, square)
    for early in gl.static_range(SLOTS if PROBE else 0):
        bring_probe(probe, of_probe, place, start_of(n_first, early, steps, C, REVERSE), early, BE, C, SLOTS)
    for early in gl.static_range(STAGES - 1):
        bring(bars, sources, stages, place, start_of(n_first, early, steps, C, REVERSE), early, BD, BE, C, STAGES)
    d, e = gl.arange(0, BD, of_rows), e_start + gl.arange(0, BE, gl.SliceLayout(0, narrow))
    offsets = (d[:, None] + e[None, :] * D) if TURNED else (d[:, None] * E + e[None, :])
    inside = (d < D)[:, None] & (e < E)[None, :]
    state_DE = entering(
        given, sums, decays_of_segments, batch, piece, heads, head, segments, offsets, inside, narrow, D * E, BD, BE, START, REVERSE
    )  # fmt: skip
    if ENTER:
        index = (batch * segments + piece) * heads + head
        gl.store(entered + index.to(gl.int64) * D * E + offsets, state_DE, mask=inside)
    decays, next_step_C = (rows.to(gl.float32), rows.to(gl.float32), 0.0, 0.0, False), cols.to(gl.float32)
    t = start_of(n_first, 0, steps, C, REVERSE)
    if GATE != NO_GATE:
        decays = decays_of(steps_of(gate, t, length, heads, cols, GATE), rows, cols, REVERSE, DOT)
        next_step_C = steps_of(gate, start_of(n_first, 1, steps, C, REVERSE), length, heads, cols, GATE)
    mbarrier.wait(bars.index(0), 0)
    early_scores = warpgroup_mma(stages[0].index(0), stages[1].index(0).permute([1, 0]), none_CC, use_acc=False, is_async=True)
    if GATE != NO_GATE:
        enter(stages[2].index(0), decays[0], narrow, DOT)
        state_DE = state_DE * gl.exp2(decays[3])
    early_CC = warpgroup_mma_wait(0, [early_scores])
    scores_buffer.store(seen(early_CC, decays, rows, cols, line_buffer, square, GATE, REVERSE).to(DOT))
    state_buffer.store(state_DE.to(DOT))
    fence_async_shared()
    for step in range(steps):
        own, following = at_stage(stages, step % STAGES), at_stage(stages, (step + 1) % STAGES)
        if GATE != NO_GATE:
            state_DE = state_DE * gl.exp2(decays[2] - decays[3])
        read = warpgroup_mma(own[0], state_buffer, none_CE, use_acc=False, is_async=True)
        if PROBE != STATE_PROBE:
            read = warpgroup_mma(scores_buffer, own[2], read, is_async=True)
        state = warpgroup_mma(own[1].permute([1, 0]), own[2], state_DE, is_async=True)
        t_far = start_of(n_first, step + STAGES - 1, steps, C, REVERSE)
        bring(bars, sources, stages, place, t_far, step + STAGES - 1, BD, BE, C, STAGES)
        mbarrier.wait(bars.index((step + 1) % STAGES), (step + 1) // STAGES % 2)
        scores = warpgroup_mma(following[0], following[1].permute([1, 0]), none_CC, use_acc=False, is_async=True)
        next_decays = decays
        if GATE != NO_GATE:
            next_decays = decays_of(next_step_C, rows, cols, REVERSE, DOT)
            next_step_C = steps_of(gate, start_of(n_first, step + 2, steps, C, REVERSE), length, heads, cols, GATE)
            enter(following[2], next_decays[0], narrow, DOT)
        probe_CE = own[2]
        if PROBE:
            probe_CE = of_probe[0].index(step % SLOTS)
            mbarrier.wait(of_probe[1].index(step % SLOTS), step // SLOTS % 2)
        out_CE, sum_C, state, scores, pairs = _outputs(
            read, state, scores, own, probe_CE, work, decays, none_CE, none_CC, narrow, GATE, PROBE
        )
        _leave(out, [batch, t, head, e_start], out_buffer, out_CE, gl.convert_layout(decays[0], of_rows), GATE, DOT)
        if PROBE == NO_PROBE:
            state_DE, scores = warpgroup_mma_wait(1, [state, scores])
        else:
            state_DE, scores_CC, pairs_CC = state, scores, pairs
            if PROBE == PAIRS_PROBE:
                state_DE, scores_CC, pairs_CC = warpgroup_mma_wait(0, [state, scores, pairs])
            _probed(rowsum, t, length, rows, sum_C, pairs_CC, scores_buffer, line_buffer, decays[0], square, narrow, C, PROBE)
        if GATE != NO_GATE:
            state_DE = _late(state_DE, own, out_buffer, decays, narrow, DOT)
            state_DE = state_DE * gl.exp2(gl.where(step == steps - 1, 0.0, next_decays[3]))
        thread_barrier()  # all warps' products have read the state
        if PROBE:
            bring_probe(probe, of_probe, place, start_of(n_first, step + SLOTS, steps, C, REVERSE), step + SLOTS, BE, C, SLOTS)
        state_buffer.store(state_DE.to(DOT))
        if PROBE == NO_PROBE:
            scores_CC = warpgroup_mma_wait(0, [scores])
        scores_buffer.store(seen(scores_CC, next_decays, rows, cols, line_buffer, square, GATE, REVERSE).to(DOT))
        fence_async_shared()
        decays = next_decays
        t = start_of(n_first, step + 1, steps, C, REVERSE)
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
    q, k, v, o, gate, given, last, entered, sums, decays,
    length: tl.int32, batches: tl.int32, heads: tl.int32, group: tl.int32, gate_every: tl.int32,
    segments: tl.int32, span: tl.int32,
    K: gl.constexpr, V: gl.constexpr, BK: gl.constexpr, TV: gl.constexpr, GROUPS: gl.constexpr, C: gl.constexpr,
    STAGES: gl.constexpr, GATE: gl.constexpr, START: gl.constexpr, LAST: gl.constexpr, ENTER: gl.constexpr, DOT: gl.constexpr,
):  # fmt: skip
    """Outputs, on descriptors of blocks of a chunk. Grid: (B * P * H * tiles of V,), of GROUPS warp groups.

    A segment is `span` chunks. `sums` and `decays` are those of `kernels.walk_forward_triton.segment_kernel`; ENTER writes the
    state that enters each segment.
    """
    _, tile, head, piece, batch = program(heads, segments, 1, (V + TV - 1) // TV)
    gate = gate_of(gate, batch, head, length, heads, gate_every, GATE)
    place = (batch, head // group, head, tile * TV)
    _walk(
        q, k, v, v, o, gate, given, last, entered, sums, decays, gate, place, buffers_of(BK, TV, C, STAGES, 0, DOT),
        length, heads, head, piece, segments, span,
        K, V, BK, TV, GROUPS, C, STAGES, 0, GATE, False, False, START, LAST, ENTER, NO_PROBE, DOT,
    )  # fmt: skip


@entry(do_not_specialize=SIZES, gluon=True)
def backward_kernel(
    q, k, v, do, dq, dk, dv, gate, first, entered, dlast, dfirst, sums, decays, rowsums,
    length: tl.int32, batches: tl.int32, heads: tl.int32, group: tl.int32, gate_every: tl.int32,
    segments: tl.int32, span: tl.int32,
    K: gl.constexpr, V: gl.constexpr, BK: gl.constexpr, BV: gl.constexpr, TK: gl.constexpr, TV: gl.constexpr,
    GROUPS: gl.constexpr, C: gl.constexpr, STAGES: gl.constexpr, SLOTS: gl.constexpr,
    FIRST_PART: gl.constexpr, PARTS: gl.constexpr, GATE: gl.constexpr, START: gl.constexpr, DLAST: gl.constexpr,
    LAST: gl.constexpr, GATE_GRAD: gl.constexpr, DOT: gl.constexpr,
):  # fmt: skip
    """Gradients of queries, keys and values, each by a walk, of GROUPS warp groups. Grid: (B * P * H * parts * tiles,).

    The parts are PARTS of the three from FIRST_PART on; walks of one launch are equally wide. `first`, or `entered` (EACH_GIVEN),
    starts the walk of queries, `dlast` (DLAST) with `sums` and `decays` those of keys and values; `dfirst` is written with LAST.
    `rowsums` [tiles of K and of V, B, H, T] sum to the gradient of the cumulated decays.
    """
    TILES_K: gl.constexpr = (K + TK - 1) // TK
    TILES: gl.constexpr = (V + TV - 1) // TV if FIRST_PART == VALUES else TILES_K
    part, tile, head, piece, batch = program(heads, segments, PARTS, TILES)
    shared = head // group
    gate = gate_of(gate, batch, head, length, heads, gate_every, GATE)
    rowsum = rowsums + ((tile.to(gl.int64) * batches + batch) * heads + head) * length
    rowsum_later = rowsum + batches.to(gl.int64) * heads * length * TILES_K
    PAIRS: gl.constexpr = PAIRS_PROBE if GATE_GRAD else NO_PROBE
    LATER: gl.constexpr = STATE_PROBE if GATE_GRAD else NO_PROBE
    BD: gl.constexpr = BK if FIRST_PART == VALUES else BV
    BE: gl.constexpr = TV if FIRST_PART == VALUES else TK
    buffers = buffers_of(BD, BE, C, STAGES, SLOTS if GATE_GRAD else 0, DOT)
    if FIRST_PART == QUERIES and part == QUERIES:
        _walk(
            do, v, k, q, dq, gate, entered if START == EACH_GIVEN else first, first, first, sums, decays, rowsum,
            (batch, head, shared, tile * TK), buffers, length, heads, head, piece, segments, span,
            V, K, BV, TK, GROUPS, C, STAGES, SLOTS, GATE, False, True, START, False, False, PAIRS, DOT,
        )  # fmt: skip
    elif FIRST_PART == QUERIES and part == KEYS:
        _walk(
            v, do, q, q, dk, gate, dlast, first, first, sums, decays, rowsum,
            (batch, head, shared, tile * TK), buffers, length, heads, head, piece, segments, span,
            V, K, BV, TK, GROUPS, C, STAGES, SLOTS, GATE, True, True, DLAST, False, False, NO_PROBE, DOT,
        )  # fmt: skip
    if FIRST_PART + PARTS == 3 and part == PARTS - 1:
        _walk(
            k, q, do, v, dv, gate, dlast, dfirst, first, sums, decays, rowsum_later,
            (batch, shared, head, tile * TV), buffers, length, heads, head, piece, segments, span,
            K, V, BK, TV, GROUPS, C, STAGES, SLOTS, GATE, True, False, DLAST, LAST, False, LATER, DOT,
        )  # fmt: skip
