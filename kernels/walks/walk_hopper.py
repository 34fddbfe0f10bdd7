"""The walk of `kernels.walks.walk_triton` for Hopper, in Gluon: rows come by themselves, and products run on their own.

A walk is a chain: the next chunk waits for the state. Plain Triton waits for every product of a chunk, in order. Here the scores
of the next chunk are made while the sums of this one are, and nothing of the chain waits for outputs, which leave on their own.

Shape legend: B batch, T time, H heads, P segments, N chunks of C = 64 tokens, K key, V value width, D rows and E columns of a
state, BD and BE (BK and BV) the same on chip.
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
from kernels.delta_rule.delta_hopper import at_stage, barriers, fetch, shared_layout, sums_layout, thread_barrier
from kernels.walks.walk_hopper_parts import (
    SIZES,
    add_rows,
    await_launch,
    await_rest,
    await_stage,
    bring,
    chunks_of,
    falls,
    half_of,
    line_layout,
    program,
    rate_of,
    row_sums,
    state_layout,
    state_of,
    store_sums,
)
from kernels.walks.walk_triton import CONSTANT_GATE, NO_GATE, SCALAR_GATE


@gluon.jit
def buffers_of(
    BD: gl.constexpr, BE: gl.constexpr, C: gl.constexpr, STAGES: gl.constexpr, SLOTS: gl.constexpr, GATE: gl.constexpr,
    DOT: gl.constexpr,
):  # fmt: skip
    """Shared memory: rows and a line of decays of each stage; the state, outputs, scores; slots of the probe; barriers."""
    a_buffers = gl.allocate_shared_memory(DOT, [STAGES, C, BD], shared_layout(BD))
    b_buffers = gl.allocate_shared_memory(DOT, [STAGES, C, BD], shared_layout(BD))
    stages = (a_buffers, b_buffers, gl.allocate_shared_memory(DOT, [STAGES, C, BE], shared_layout(BE)))
    if GATE == SCALAR_GATE:
        stages = stages + (gl.allocate_shared_memory(gl.float32, [STAGES, 1, C], line_layout()),)
    state_buffer = gl.allocate_shared_memory(DOT, [BD, BE], shared_layout(BE))
    out_buffer = gl.allocate_shared_memory(DOT, [C, BE], shared_layout(BE))
    scores_buffer = gl.allocate_shared_memory(DOT, [C, C], shared_layout(C))
    slots, slot_bars = out_buffer, out_buffer
    if SLOTS > 0:
        slots, slot_bars = gl.allocate_shared_memory(DOT, [SLOTS, C, BE], shared_layout(BE)), barriers(SLOTS)
    return stages, (state_buffer, out_buffer, scores_buffer), (slots, slot_bars), barriers(STAGES)


@gluon.jit
def _start(n_first, step, steps, C: gl.constexpr):
    """First token of a step's chunk; steps beyond the last stay at it."""
    return (n_first + gl.minimum(step, steps - 1)) * C


@gluon.jit
def _seen(scores_CC, stage, rate, t, length, square: gl.constexpr, C: gl.constexpr, GATE: gl.constexpr):
    """Scores of tokens and earlier ones, decayed."""
    rows, cols = gl.arange(0, C, gl.SliceLayout(1, square)), gl.arange(0, C, gl.SliceLayout(0, square))
    is_seen = rows[:, None] >= cols[None, :]
    if GATE == NO_GATE:
        return gl.where(is_seen, scores_CC, 0.0)
    fall_rows = falls(stage, rate, t, length, C, GATE, gl.SliceLayout(1, square))
    fall_cols = falls(stage, rate, t, length, C, GATE, gl.SliceLayout(0, square))
    # Only exponents that are <= 0 are used; the others would overflow and are masked before.
    return scores_CC * gl.exp2(gl.where(is_seen, fall_rows[:, None] - fall_cols[None, :], float("-inf")))


@gluon.jit
def _bring(
    bars, sources, stages, place, heads, t, step, BYTES: gl.constexpr, C: gl.constexpr, STAGES: gl.constexpr, GATE: gl.constexpr
):  # fmt: skip
    """Starts to copy a step's chunk of a, b and c, and its decays."""
    batch, head, _, ab_head = place
    rows = ([batch, t, ab_head, 0], [batch, t, ab_head, 0], [batch, t, head, 0])
    bring(bars, sources, stages, rows, [batch * heads + head, t], step, BYTES, C, STAGES, GATE)


@gluon.jit
def _bring_rows(bars, sources, stages, place, t, step, BYTES: gl.constexpr, C: gl.constexpr):
    """Starts to copy one of the first chunks of a, b and c, whose decays are copied later."""
    batch, head, _, ab_head = place
    bar, row = bars.index(step), [batch, t, ab_head, 0]
    mbarrier.expect(bar, BYTES + 4 * C)
    tma.async_copy_global_to_shared(sources[0], row, bar, stages[0].index(step))
    tma.async_copy_global_to_shared(sources[1], row, bar, stages[1].index(step))
    tma.async_copy_global_to_shared(sources[2], [batch, t, head, 0], bar, stages[2].index(step))


@gluon.jit
def _bring_probe(of_probe, probe, batch, t, head, slot, C: gl.constexpr, BE: gl.constexpr):
    """Starts to copy a chunk of the probe's rows into a slot."""
    fetch(of_probe[1].index(slot), 2 * C * BE, (probe,), ([batch, t, head, 0],), (of_probe[0].index(slot),))


@gluon.jit
def _scores(stage, none_CC):
    """Starts the product of a chunk's a and b."""
    return warpgroup_mma(stage[0], stage[1].permute([1, 0]), none_CC, use_acc=False, is_async=True)


@gluon.jit
def _places(layout: gl.constexpr, D: gl.constexpr, E: gl.constexpr, BD: gl.constexpr, BE: gl.constexpr, TURNED: gl.constexpr):
    """Where a state's numbers are in memory, and which of them are inside."""
    d, e = gl.arange(0, BD, gl.SliceLayout(1, layout)), gl.arange(0, BE, gl.SliceLayout(0, layout))
    offsets = (d[:, None] + e[None, :] * D) if TURNED else (d[:, None] * E + e[None, :])
    return offsets, (d < D)[:, None] & (e < E)[None, :]


@gluon.jit
def _decayed(
    read, state, stage, of_probe, rowsum, part_size, rate, half, t, step, length, narrow: gl.constexpr, BE: gl.constexpr,
    GROUPS: gl.constexpr, C: gl.constexpr, SLOTS: gl.constexpr, GATE: gl.constexpr, PROBE: gl.constexpr,
):  # fmt: skip
    """What is read from the state, decayed, and the state's product that still runs; PROBE writes the sums of the former."""
    if PROBE:
        await_stage(of_probe[1], step, SLOTS)
    if GATE != NO_GATE:
        fall_C = falls(stage, rate, t, length, C, GATE, gl.SliceLayout(1, narrow))
        read_CE, state = warpgroup_mma_wait(1, [read, state])
        read = read_CE * gl.exp2(half + fall_C)[:, None]
        if PROBE:
            probed = read * of_probe[0].index(step % SLOTS).load(narrow).to(gl.float32)
            store_sums(rowsum + t, row_sums(probed, C, BE, GROUPS), part_size, True, C, GROUPS)
    return read, state


@gluon.jit
def _write(out, row, out_buffer, outputs, scores, DOT: gl.constexpr):
    """Starts to copy a chunk's outputs to memory; the product of the scores still runs."""
    out_CE, scores = warpgroup_mma_wait(1, [outputs, scores])
    tma.store_wait(0)
    thread_barrier()  # all warps' products have read the scores, and copies the outputs of the chunk before
    out_buffer.store(out_CE.to(DOT))
    fence_async_shared()
    tma.async_copy_shared_to_global(out, row, out_buffer)
    return scores


@gluon.jit
def _store_scores(
    scores_buffer, scores, stage, rate, t, length, square: gl.constexpr, C: gl.constexpr, GATE: gl.constexpr, DOT: gl.constexpr
):  # fmt: skip
    """Waits for a chunk's scores, and stores them decayed."""
    scores_CC = warpgroup_mma_wait(0, [scores])
    scores_buffer.store(_seen(scores_CC, stage, rate, t, length, square, C, GATE).to(DOT))


@gluon.jit
def walk(  # noqa: PLR0915 - one turn of a pipeline, whose order is the point
    sources, probe, out, states, pointers, rate, place, sizes, buffers,
    D: gl.constexpr, E: gl.constexpr, BD: gl.constexpr, BE: gl.constexpr, GROUPS: gl.constexpr, C: gl.constexpr,
    STAGES: gl.constexpr, SLOTS: gl.constexpr, GATE: gl.constexpr, TURNED: gl.constexpr, FIRST: gl.constexpr,
    KEEP: gl.constexpr, LAST: gl.constexpr, PROBE: gl.constexpr, LATE: gl.constexpr, DOT: gl.constexpr,
):  # fmt: skip
    """One head's walk over a segment; see `kernels.walks.walk_triton`.

    Args:
        sources: descriptors of a, b and c, and of the lines of scalar decays.
        probe: descriptor of rows whose products with what is read from the state are summed (PROBE), or any.
        out: descriptor of the outputs.
        states: descriptor of the 16-bit states before the chunks, which are written (KEEP), or any.
        pointers: lines of decays, the first state (FIRST), the last one, which is written (LAST), what segments add to a state and
            their decays, sums of the probe of this head and how far apart their parts are.
        rate: of constant decays.
        place: batch, head, segment, and the head of a and b.
        sizes: length, heads, segments and chunks of a segment.
        buffers: of `buffers_of`.
        TURNED: whether states in memory are transposed, [E, D].
        LATE: whether lines of decays are those that the kernel before this one makes, which may still run.
    """
    lines, given, last, sums, decays, rowsum, part_size = pointers
    batch, head, piece, _ = place
    length, heads, segments, span = sizes
    stages, work, of_probe, bars = buffers
    state_buffer, out_buffer, scores_buffer = work
    square: gl.constexpr = sums_layout(C, GROUPS)
    narrow: gl.constexpr = sums_layout(BE, GROUPS)
    tall: gl.constexpr = narrow if GATE == NO_GATE else state_layout(BD, BE, GROUPS)
    BYTES: gl.constexpr = 2 * C * (2 * BD + BE)
    n_first, steps = chunks_of(piece, span, length, C)
    none_CE, none_CC = gl.zeros([C, BE], gl.float32, narrow), gl.zeros([C, C], gl.float32, square)
    for early in gl.static_range(SLOTS if PROBE else 0):
        _bring_probe(of_probe, probe, batch, _start(n_first, early, steps, C), head, early, C, BE)
    for early in gl.static_range(STAGES - 1):
        t_early = _start(n_first, early, steps, C)
        if LATE:
            _bring_rows(bars, sources, stages, place, t_early, early, BYTES, C)
        else:
            _bring(bars, sources, stages, place, heads, t_early, early, BYTES, C, STAGES, GATE)
    if LATE:
        await_launch()
        for early in gl.static_range(STAGES - 1):
            line = [batch * heads + head, _start(n_first, early, steps, C)]
            tma.async_copy_global_to_shared(sources[3], line, bars.index(early), stages[3].index(early))
    offsets, inside = _places(tall, D, E, BD, BE, TURNED)
    own_place = (batch, head, piece)
    state_DE = state_of(given, sums, decays, own_place, heads, segments, offsets, inside, tall, D * E, BD, BE, FIRST, False)
    t = _start(n_first, 0, steps, C)
    half = half_of(lines, rate, batch, head, heads, t, length, C, GATE)
    await_stage(bars, 0, STAGES)
    first = at_stage(stages, 0)
    _store_scores(scores_buffer, _scores(first, none_CC), first, rate, t, length, square, C, GATE, DOT)
    state_buffer.store(state_DE.to(DOT))
    fence_async_shared()
    for step in range(steps):
        own, following = at_stage(stages, step % STAGES), at_stage(stages, (step + 1) % STAGES)
        t_next, t_far = _start(n_first, step + 1, steps, C), _start(n_first, step + STAGES - 1, steps, C)
        next_half = half_of(lines, rate, batch, head, heads, t_next, length, C, GATE)
        read = warpgroup_mma(own[0], state_buffer, none_CE, use_acc=False, is_async=True)
        state = add_rows(state_DE, own[1], own[2], own, rate, half, t, length, tall, C, GATE, False, DOT)
        if KEEP:
            chunk = batch * ((length + C - 1) // C) + t // C
            tma.async_copy_shared_to_global(states, [chunk * heads + head, 0, 0], state_buffer)
        _bring(bars, sources, stages, place, heads, t_far, step + STAGES - 1, BYTES, C, STAGES, GATE)
        read, state = _decayed(
            read, state, own, of_probe, rowsum, part_size, rate, half, t, step, length,
            narrow, BE, GROUPS, C, SLOTS, GATE, PROBE,
        )  # fmt: skip
        outputs = warpgroup_mma(scores_buffer, own[2], read, is_async=True)
        await_stage(bars, step + 1, STAGES)
        scores = _scores(following, none_CC)
        state_DE, outputs, scores = warpgroup_mma_wait(2, [state, outputs, scores])
        if KEEP:
            tma.store_wait(0)
        thread_barrier()  # all warps' products have read the state
        state_buffer.store(state_DE.to(DOT))
        scores = _write(out, [batch, t, head, 0], out_buffer, outputs, scores, DOT)
        _store_scores(scores_buffer, scores, following, rate, t_next, length, square, C, GATE, DOT)
        fence_async_shared()
        thread_barrier()  # here, not by the compiler at the top: ptxas forgets on the way back that the fence still runs
        if PROBE:
            _bring_probe(of_probe, probe, batch, _start(n_first, step + SLOTS, steps, C), head, step % SLOTS, C, BE)
        half, t = next_half, t_next
    await_rest(bars, steps + 1, STAGES - 2, STAGES)
    await_rest(of_probe[1], steps, SLOTS if PROBE else 0, SLOTS)
    tma.store_wait(0)
    if LAST:
        gl.store(last + (batch * heads + head).to(gl.int64) * D * E + offsets, state_DE, mask=inside & (piece == segments - 1))


@entry(do_not_specialize=SIZES, gluon=True)
def forward_kernel(
    q, k, v, o, states, line_rows, lines, gate, first, last, sums, decays,
    length: tl.int32, heads: tl.int32, group: tl.int32, gate_every: tl.int32, segments: tl.int32, span: tl.int32,
    K: gl.constexpr, V: gl.constexpr, BK: gl.constexpr, BV: gl.constexpr, GROUPS: gl.constexpr, C: gl.constexpr,
    STAGES: gl.constexpr, GATE: gl.constexpr, FIRST: gl.constexpr, KEEP: gl.constexpr,
    LAST: gl.constexpr, LATE: gl.constexpr, DOT: gl.constexpr,
):  # fmt: skip
    """Outputs, on descriptors of blocks of a chunk, of GROUPS warp groups. Grid: (B * P * H,).

    A segment is `span` chunks. `sums` and `decays` are those of `kernels.walks.walk_hopper_states.states_kernel`. KEEP writes the
    state before each chunk in 16 bit, [B * N * H, K, V]. LATE starts beside the kernel that makes the lines.
    """
    head, piece, batch = program(gl.program_id(0), heads, segments)
    walk(
        (q, k, v, line_rows) if GATE == SCALAR_GATE else (q, k, v), v, o, states,
        (lines, first, last, sums, decays, last, 0), rate_of(gate, batch, head, heads, gate_every, GATE == CONSTANT_GATE),
        (batch, head, piece, head // group), (length, heads, segments, span), buffers_of(BK, BV, C, STAGES, 0, GATE, DOT),
        K, V, BK, BV, GROUPS, C, STAGES, 0, GATE, False, FIRST, KEEP, LAST, False, LATE, DOT,
    )  # fmt: skip
