"""The walk of `kernels.walk_triton` for Hopper, in Gluon: rows come by the tensor memory accelerator, products run on their own.

A walk is a chain: the next chunk waits for the state. Plain Triton waits for every product of a chunk, in order. Here the scores
of the next chunk are made while the sums of this one are, and nothing of the chain waits for outputs, which leave on their own.

Decays are scalings of what enters the sums and of what leaves them (`_split`): rows of c are scaled where they lie in shared
memory, before any product reads them, and rows of sums when they are done. No pair of tokens is decayed on its own, unless a
chunk decays by more than 16-bit scalings can hold, which is mended after the fact.

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

from kernels.delta_hopper import barriers, fetch, shared_layout, sums_layout, thread_barrier
from kernels.delta_hopper_walk import at_stage
from kernels.walk_triton import LOG2_E, NO_GATE, SCALAR_GATE

LIMIT, LIMIT_FP16 = tl.constexpr(60.0), tl.constexpr(6.0)
"""Largest exponents of the scalings that stand for a decay."""
FROM_ZERO, GIVEN, EACH_GIVEN = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
QUERIES, KEYS, VALUES = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
NO_PROBE, STATE_PROBE, PAIRS_PROBE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
# What differs from call to call is not specialised, so that a new batch, length or head count compiles nothing.
SIZES = ["length", "batches", "heads", "group", "gate_every", "segments", "span"]


@gluon.jit
def _bring(bars, sources, stages, place, t, step, BD: gl.constexpr, BE: gl.constexpr, C: gl.constexpr, STAGES: gl.constexpr):
    """Starts to copy a chunk's rows of a, b and c into their stage."""
    batch, ab_head, c_head, e_start = place
    places = ([batch, t, ab_head, 0], [batch, t, ab_head, 0], [batch, t, c_head, e_start])
    fetch(bars.index(step % STAGES), 2 * C * (2 * BD + BE), sources, places, at_stage(stages, step % STAGES))


@gluon.jit
def _bring_probe(bars, probe, slots, place, t, step, BE: gl.constexpr, C: gl.constexpr, SLOTS: gl.constexpr):
    """Starts to copy a chunk's rows of the probe, which are read late in the chunk's turn, into their slot."""
    batch, _, c_head, e_start = place
    slot = step % SLOTS
    fetch(bars.index(slot), 2 * C * BE, (probe,), ([batch, t, c_head, e_start],), (slots.index(slot),))


@gluon.jit
def _buffers(
    BD: gl.constexpr, BE: gl.constexpr, C: gl.constexpr, STAGES: gl.constexpr, SLOTS: gl.constexpr, DOT: gl.constexpr
):  # fmt: skip
    """Shared memory of a walk: a, b and c of each stage; the state, outputs, scores, a line; slots of the probe; barriers."""
    a_buffers = gl.allocate_shared_memory(DOT, [STAGES, C, BD], shared_layout(BD))
    b_buffers = gl.allocate_shared_memory(DOT, [STAGES, C, BD], shared_layout(BD))
    c_buffers = gl.allocate_shared_memory(DOT, [STAGES, C, BE], shared_layout(BE))
    state_buffer = gl.allocate_shared_memory(DOT, [BD, BE], shared_layout(BE))
    out_buffer = gl.allocate_shared_memory(DOT, [C, BE], shared_layout(BE))
    scores_buffer = gl.allocate_shared_memory(DOT, [C, C], shared_layout(C))
    line_buffer = gl.allocate_shared_memory(gl.float32, [C], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    slots, slot_bars = out_buffer, line_buffer
    if SLOTS > 0:
        slots, slot_bars = gl.allocate_shared_memory(DOT, [SLOTS, C, BE], shared_layout(BE)), barriers(SLOTS)
    work = (state_buffer, out_buffer, scores_buffer, line_buffer)
    return (a_buffers, b_buffers, c_buffers), work, (slots, slot_bars), barriers(STAGES)


@gluon.jit
def _steps(gate, t, length, heads, cols, GATE: gl.constexpr):
    """Log2 decays of a chunk's tokens, as columns; padding does not decay."""
    if GATE == SCALAR_GATE:
        return gl.load(gate + (t + cols).to(gl.int64) * heads, mask=t + cols < length, other=0.0) * LOG2_E
    return gl.load(gate + 0 * cols, mask=t + cols < length, other=0.0) * LOG2_E


@gluon.jit
def _split(step_C, rows, cols, REVERSE: gl.constexpr, DOT: gl.constexpr):
    """A chunk's decays as scalings of what enters the sums and of what leaves them, all in log2, for rows of scores.

    Row j gives exp(G_i - G_j) c_j to row i, and that is leave_i enter_j with leave = exp(G - middle) and enter = 1 / leave. Both
    are cut at 2^limit, which the products' dtype can hold; a chunk that decays by more is rough, and `rest` is what is missing.

    Returns:
        The exponent of leave (that of enter is its negative), `rest`, half of the chunk's exponent, the part of that half by
        which the state is scaled for its reader, and whether the chunk is rough.
    """
    limit: gl.constexpr = LIMIT_FP16 if DOT == tl.float16 else LIMIT
    g_C = gl.sum(gl.where(rows[:, None] >= cols[None, :], step_C[None, :], 0.0), 1)
    half = 0.5 * gl.sum(step_C, 0)
    whole_C = (half - g_C) if REVERSE else (g_C - half)
    leave_C = gl.minimum(gl.maximum(whole_C, -limit), limit)
    return leave_C, whole_C - leave_C, half, gl.maximum(half, -limit), half < -limit


@gluon.jit
def _start(n_first, step, steps, C: gl.constexpr, REVERSE: gl.constexpr):
    """First token of a step's chunk; steps beyond the last stay at it."""
    step = gl.minimum(step, steps - 1)
    return (n_first + ((steps - 1 - step) if REVERSE else step)) * C


@gluon.jit
def _enter(c_CE, leave_C, narrow: gl.constexpr, DOT: gl.constexpr):
    """Scales rows of c where they lie, for the sums that they enter."""
    factor_C = gl.exp2(-gl.convert_layout(leave_C, gl.SliceLayout(1, narrow)))
    c_CE.store((c_CE.load(narrow).to(gl.float32) * factor_C[:, None]).to(DOT))


@gluon.jit
def _mended(
    out_CE, a_CD, state_buffer, none_CE, rest_C, half, carried, rough, of_rows: gl.constexpr, GATE: gl.constexpr,
    ADDED: gl.constexpr,
):  # fmt: skip
    """Sums of a chunk with what earlier chunks give decayed as it should be, where a rough chunk's scalings were cut."""
    if GATE != NO_GATE:
        if rough:
            factor_C = gl.exp2(gl.convert_layout(half + rest_C - carried, of_rows))
            if ADDED:
                again = warpgroup_mma(a_CD, state_buffer, none_CE, use_acc=False, is_async=True)
                out_CE += warpgroup_mma_wait(0, [again]) * (factor_C - 1.0)[:, None]
            else:
                out_CE = out_CE * factor_C[:, None]
    return out_CE


@gluon.jit
def _seen(scores_CC, rest_C, rough, rows, cols, line_buffer, square: gl.constexpr, GATE: gl.constexpr, REVERSE: gl.constexpr):
    """Scores of pairs that see each other, with what the cut scalings lack of their decay."""
    seen = (rows[:, None] <= cols[None, :]) if REVERSE else (rows[:, None] >= cols[None, :])
    scores_CC = gl.where(seen, scores_CC, 0.0)
    if GATE != NO_GATE:
        if rough:
            line_buffer.store(rest_C)
            fall_CC = rest_C[:, None] - line_buffer.load(gl.SliceLayout(0, square))[None, :]
            scores_CC = scores_CC * gl.exp2(gl.where(seen, fall_CC, 0.0))
    return scores_CC


@gluon.jit
def _pairs(kq_CC, scores_buffer, leave_C, line_buffer, square: gl.constexpr):
    """For each key what its pairs with queries of the chunk add up to, from K' Q^T and the gradients of the scores."""
    line_buffer.store(leave_C)
    ds_CC = scores_buffer.permute([1, 0]).load(square).to(gl.float32)
    return gl.sum(kq_CC * ds_CC * gl.exp2(line_buffer.load(gl.SliceLayout(0, square)))[None, :], 1)


@gluon.jit
def _entering(
    given, sums, decays, owner, piece, heads, head, segments, offsets, inside, narrow: gl.constexpr,
    SIZE: gl.constexpr, BD: gl.constexpr, BE: gl.constexpr, START: gl.constexpr, REVERSE: gl.constexpr,
):  # fmt: skip
    """The state that a segment starts from: given to each, or what segments before it make of that of the sequence."""
    state_DE = gl.zeros([BD, BE], gl.float32, narrow)
    if START == EACH_GIVEN:
        index = (owner * segments + piece) * heads + head
        state_DE += gl.load(given + index.to(gl.int64) * SIZE + offsets, mask=inside, other=0.0)
    else:
        if START == GIVEN:
            state_DE += gl.load(given + (owner * heads + head).to(gl.int64) * SIZE + offsets, mask=inside, other=0.0)
        for n in range((segments - 1 - piece) if REVERSE else piece):
            index = (owner * segments + ((segments - 1 - n) if REVERSE else n)) * heads + head
            added = gl.load(sums + index.to(gl.int64) * SIZE + offsets, mask=inside, other=0.0)
            state_DE = state_DE * gl.exp2(gl.load(decays + index)) + added
    return state_DE


@gluon.jit
def _walk(
    a, b, c, probe, out, gate, given, last, entering, sums, decays, rowsum, place, buffers,
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
    slots, slot_bars = of_probe
    batch, e_start, sources = place[0], place[3], (a, b, c)
    n_chunks = (length + C - 1) // C
    n_first, steps = piece * span, gl.minimum(span, n_chunks - piece * span)
    rows, cols = gl.arange(0, C, gl.SliceLayout(1, square)), gl.arange(0, C, gl.SliceLayout(0, square))
    none_CE, none_CC = gl.zeros([C, BE], gl.float32, narrow), gl.zeros([C, C], gl.float32, square)
    if PROBE:
        for early in gl.static_range(SLOTS):
            _bring_probe(slot_bars, probe, slots, place, _start(n_first, early, steps, C, REVERSE), early, BE, C, SLOTS)
    for early in gl.static_range(STAGES - 1):
        _bring(bars, sources, stages, place, _start(n_first, early, steps, C, REVERSE), early, BD, BE, C, STAGES)
    d, e = gl.arange(0, BD, of_rows), e_start + gl.arange(0, BE, gl.SliceLayout(0, narrow))
    offsets = (d[:, None] + e[None, :] * D) if TURNED else (d[:, None] * E + e[None, :])
    inside = (d < D)[:, None] & (e < E)[None, :]
    state_DE = _entering(
        given, sums, decays, batch, piece, heads, head, segments, offsets, inside, narrow, D * E, BD, BE, START, REVERSE
    )
    if ENTER:
        index = (batch * segments + piece) * heads + head
        gl.store(entering + index.to(gl.int64) * D * E + offsets, state_DE, mask=inside)
    leave_C, rest_C, half, carried, rough = rows.to(gl.float32), rows.to(gl.float32), 0.0, 0.0, False
    next_step_C = cols.to(gl.float32)
    t = _start(n_first, 0, steps, C, REVERSE)
    if GATE != NO_GATE:
        step_C = _steps(gate, t, length, heads, cols, GATE)
        leave_C, rest_C, half, carried, rough = _split(step_C, rows, cols, REVERSE, DOT)
        next_step_C = _steps(gate, _start(n_first, 1, steps, C, REVERSE), length, heads, cols, GATE)
    mbarrier.wait(bars.index(0), 0)
    early_scores = warpgroup_mma(stages[0].index(0), stages[1].index(0).permute([1, 0]), none_CC, use_acc=False, is_async=True)
    if GATE != NO_GATE:
        _enter(stages[2].index(0), leave_C, narrow, DOT)
        state_DE = state_DE * gl.exp2(carried)
    early_CC = warpgroup_mma_wait(0, [early_scores])
    scores_buffer.store(_seen(early_CC, rest_C, rough, rows, cols, line_buffer, square, GATE, REVERSE).to(DOT))
    state_buffer.store(state_DE.to(DOT))
    fence_async_shared()
    for step in range(steps):
        following = (step + 1) % STAGES
        own = at_stage(stages, step % STAGES)
        if GATE != NO_GATE:
            state_DE = state_DE * gl.exp2(half - carried)
        read = warpgroup_mma(own[0], state_buffer, none_CE, use_acc=False, is_async=True)
        if PROBE != STATE_PROBE:
            read = warpgroup_mma(scores_buffer, own[2], read, is_async=True)
        state = warpgroup_mma(own[1].permute([1, 0]), own[2], state_DE, is_async=True)
        t_far = _start(n_first, step + STAGES - 1, steps, C, REVERSE)
        _bring(bars, sources, stages, place, t_far, step + STAGES - 1, BD, BE, C, STAGES)
        mbarrier.wait(bars.index(following), (step + 1) // STAGES % 2)
        scores = warpgroup_mma(
            stages[0].index(following), stages[1].index(following).permute([1, 0]), none_CC, use_acc=False, is_async=True
        )
        next_leave_C, next_rest_C, next_half, next_carried, next_rough = leave_C, rest_C, half, carried, rough
        if GATE != NO_GATE:
            next_leave_C, next_rest_C, next_half, next_carried, next_rough = _split(next_step_C, rows, cols, REVERSE, DOT)
            next_step_C = _steps(gate, _start(n_first, step + 2, steps, C, REVERSE), length, heads, cols, GATE)
            _enter(stages[2].index(following), next_leave_C, narrow, DOT)
        sum_C, pairs, own_probe = rows.to(gl.float32), none_CC, own[2]
        if PROBE:
            own_probe = slots.index(step % SLOTS)
            mbarrier.wait(slot_bars.index(step % SLOTS), step // SLOTS % 2)
        if PROBE == STATE_PROBE:
            read_CE, state, scores = warpgroup_mma_wait(2, [read, state, scores])
            read_CE = _mended(read_CE, own[0], state_buffer, none_CE, rest_C, half, carried, rough, of_rows, GATE, False)
            sum_C = -gl.sum(read_CE * own_probe.load(narrow).to(gl.float32), 1)
            fence_async_shared()
            added = warpgroup_mma(scores_buffer, own[2], read_CE, is_async=True)
            out_CE, state, scores = warpgroup_mma_wait(0, [added, state, scores])
        elif PROBE == PAIRS_PROBE:
            fence_async_shared()
            pairs = warpgroup_mma(own[2], own_probe.permute([1, 0]), none_CC, use_acc=False, is_async=True)
            out_CE, state, scores, pairs = warpgroup_mma_wait(3, [read, state, scores, pairs])
            out_CE = _mended(out_CE, own[0], state_buffer, none_CE, rest_C, half, carried, rough, of_rows, GATE, True)
            sum_C = gl.sum(out_CE * own_probe.load(narrow).to(gl.float32), 1)
        else:
            out_CE, state, scores = warpgroup_mma_wait(2, [read, state, scores])
            out_CE = _mended(out_CE, own[0], state_buffer, none_CE, rest_C, half, carried, rough, of_rows, GATE, True)
        leave_rows_C = gl.convert_layout(leave_C, of_rows)
        if GATE != NO_GATE:
            out_CE = out_CE * gl.exp2(leave_rows_C)[:, None]
        tma.store_wait(0)
        thread_barrier()
        out_buffer.store(out_CE.to(DOT))
        fence_async_shared()
        tma.async_copy_shared_to_global(out, [batch, t, head, e_start], out_buffer)
        if PROBE == PAIRS_PROBE:
            state_DE, scores, pairs_CC = warpgroup_mma_wait(0, [state, scores, pairs])
            sum_C = gl.convert_layout(sum_C * gl.exp2(leave_rows_C), gl.SliceLayout(1, square))
            sum_C = sum_C - _pairs(pairs_CC, scores_buffer, leave_C, line_buffer, square)
            gl.store(rowsum + t + rows, sum_C, mask=t + rows < length)
        elif PROBE == STATE_PROBE:
            state_DE = state
            wide_rows = gl.arange(0, C, of_rows)
            gl.store(rowsum + t + wide_rows, sum_C * gl.exp2(leave_rows_C), mask=t + wide_rows < length)
        else:
            state_DE, scores = warpgroup_mma_wait(1, [state, scores])
        if GATE != NO_GATE:
            state_DE = state_DE * gl.exp2(half)
            if rough:
                tma.store_wait(0)
                thread_barrier()
                late_C = gl.convert_layout(gl.exp2(half - rest_C) - gl.exp2(half), of_rows)
                out_buffer.store((own[2].load(narrow).to(gl.float32) * late_C[:, None]).to(DOT))
                fence_async_shared()
                more = warpgroup_mma(own[1].permute([1, 0]), out_buffer, state_DE, is_async=True)
                state_DE = warpgroup_mma_wait(0, [more])
                thread_barrier()
            state_DE = state_DE * gl.exp2(gl.where(step == steps - 1, 0.0, next_carried))
        thread_barrier()  # all warps' products have read the state
        if PROBE:
            t_probe = _start(n_first, step + SLOTS, steps, C, REVERSE)
            _bring_probe(slot_bars, probe, slots, place, t_probe, step + SLOTS, BE, C, SLOTS)
        state_buffer.store(state_DE.to(DOT))
        scores_CC = scores if PROBE else warpgroup_mma_wait(0, [scores])
        scores_buffer.store(_seen(scores_CC, next_rest_C, next_rough, rows, cols, line_buffer, square, GATE, REVERSE).to(DOT))
        fence_async_shared()
        leave_C, rest_C, half, carried, rough = next_leave_C, next_rest_C, next_half, next_carried, next_rough
        t = _start(n_first, step + 1, steps, C, REVERSE)
    for late in gl.static_range(STAGES - 2):
        mbarrier.wait(bars.index((steps + 1 + late) % STAGES), (steps + 1 + late) // STAGES % 2)
    if PROBE:
        for late in gl.static_range(SLOTS):
            mbarrier.wait(slot_bars.index((steps + late) % SLOTS), (steps + late) // SLOTS % 2)
    tma.store_wait(0)
    if LAST:
        ending = (piece == 0) if REVERSE else (piece == segments - 1)
        gl.store(last + (batch * heads + head).to(gl.int64) * D * E + offsets, state_DE, mask=inside & ending)


@gluon.jit
def _where(heads, segments, PARTS: gl.constexpr, TILES: gl.constexpr):
    """Part, tile, head, segment and batch of a program; those of a head are neighbours, which share the L2 cache."""
    own, rest = gl.program_id(0) % (PARTS * TILES), gl.program_id(0) // (PARTS * TILES)
    return own // TILES, own % TILES, rest % heads, rest // heads % segments, rest // heads // segments


@gluon.jit
def _gate_of(gate, batch, head, length, heads, gate_every, GATE: gl.constexpr):
    """Where a head's log decays start."""
    return gate + ((batch.to(gl.int64) * length * heads + head) if GATE == SCALAR_GATE else (batch // gate_every * heads + head))


@gluon.jit(do_not_specialize=SIZES)
def forward_kernel(
    q, k, v, o, gate, given, last, entering, sums, decays,
    length: tl.int32, batches: tl.int32, heads: tl.int32, group: tl.int32, gate_every: tl.int32,
    segments: tl.int32, span: tl.int32,
    K: gl.constexpr, V: gl.constexpr, BK: gl.constexpr, TV: gl.constexpr, GROUPS: gl.constexpr, C: gl.constexpr,
    STAGES: gl.constexpr, GATE: gl.constexpr, START: gl.constexpr, LAST: gl.constexpr, ENTER: gl.constexpr,
    DOT: gl.constexpr,
):  # fmt: skip
    """Outputs, on descriptors of blocks of a chunk. Grid: (B * P * H * tiles of V,), of GROUPS warp groups.

    A segment is `span` chunks. `sums` and `decays` are those of `kernels.walk_forward_triton.segment_kernel`; ENTER writes the
    state that enters each segment.
    """
    _, tile, head, piece, batch = _where(heads, segments, 1, (V + TV - 1) // TV)
    _walk(
        q, k, v, v, o, _gate_of(gate, batch, head, length, heads, gate_every, GATE), given, last, entering, sums, decays,
        gate, (batch, head // group, head, tile * TV), _buffers(BK, TV, C, STAGES, 0, DOT), length, heads, head, piece, segments, span,
        K, V, BK, TV, GROUPS, C, STAGES, 0, GATE, False, False, START, LAST, ENTER, NO_PROBE, DOT,
    )  # fmt: skip


@gluon.jit(do_not_specialize=SIZES)
def backward_kernel(
    q, k, v, do, dq, dk, dv, gate, first, entering, dlast, dfirst, sums, decays, rowsums,
    length: tl.int32, batches: tl.int32, heads: tl.int32, group: tl.int32, gate_every: tl.int32,
    segments: tl.int32, span: tl.int32,
    K: gl.constexpr, V: gl.constexpr, BK: gl.constexpr, BV: gl.constexpr, TK: gl.constexpr, TV: gl.constexpr,
    GROUPS: gl.constexpr, C: gl.constexpr, STAGES: gl.constexpr, SLOTS: gl.constexpr, FIRST_PART: gl.constexpr, PARTS: gl.constexpr,
    GATE: gl.constexpr, START: gl.constexpr, DLAST: gl.constexpr, LAST: gl.constexpr, GATE_GRAD: gl.constexpr,
    DOT: gl.constexpr,
):  # fmt: skip
    """Gradients of queries, keys and values, each by a walk. Grid: (B * P * H * parts * tiles,), of GROUPS warp
    groups.

    The parts are PARTS of the three from FIRST_PART on; walks of one launch are equally wide. `first` or `entering` (EACH_GIVEN) start the walk of
    queries, `dlast` (DLAST) with `sums` and `decays` those of keys and values; `dfirst` is written with LAST. `rowsums` [tiles of
    K and of V, B, H, T] sum to the gradient of the cumulated decays.
    """
    TILES: gl.constexpr = (V + TV - 1) // TV if FIRST_PART == VALUES else (K + TK - 1) // TK
    part, tile, head, piece, batch = _where(heads, segments, PARTS, TILES)
    shared = head // group
    gate = _gate_of(gate, batch, head, length, heads, gate_every, GATE)
    PAIRS_TILES: gl.constexpr = (K + TK - 1) // TK
    rowsum = rowsums + ((tile.to(gl.int64) * batches + batch) * heads + head) * length
    rowsum_later = rowsum + batches.to(gl.int64) * heads * length * PAIRS_TILES
    PAIRS: gl.constexpr = PAIRS_PROBE if GATE_GRAD else NO_PROBE
    LATER: gl.constexpr = STATE_PROBE if GATE_GRAD else NO_PROBE
    BD: gl.constexpr = BK if FIRST_PART == VALUES else BV
    BE: gl.constexpr = TV if FIRST_PART == VALUES else TK
    buffers = _buffers(BD, BE, C, STAGES, SLOTS if GATE_GRAD else 0, DOT)
    if FIRST_PART == QUERIES and part == QUERIES:
        _walk(
            do, v, k, q, dq, gate, entering if START == EACH_GIVEN else first, first, first, sums, decays, rowsum,
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
