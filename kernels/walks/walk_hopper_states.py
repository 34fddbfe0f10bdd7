"""States of the walks for Hopper, in Gluon, without outputs: what segments add to a state, and the states between chunks.

A turn is one product. The operand of the next one is decayed while it runs, and rows come by copies further ahead.

Shape legend: B batch, T time, H heads, P segments, N chunks of C = 64 tokens, K key, V value width, BK and BV the same on chip.
"""

from __future__ import annotations

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from kernels._entry import entry
from kernels.delta_rule.delta_hopper import at_stage, barriers, columns_of, shared_layout, thread_barrier
from kernels.delta_rule.delta_hopper_reach import reaching_at, reaching_chunks
from kernels.walks.walk_hopper_parts import (
    SIZES,
    await_rest,
    await_stage,
    bring,
    chunks_of,
    entering,
    half_of,
    let_launch,
    line_layout,
    program,
    rate_of,
    state_layout,
    state_of,
)
from kernels.walks.walk_triton import CONSTANT_GATE, NO_GATE, SCALAR_GATE


@gluon.jit
def _start(n_first, step, steps, C: gl.constexpr, BACK: gl.constexpr):
    """First token of a step's chunk; steps beyond the last stay at it."""
    order = gl.minimum(step, steps - 1)
    return (n_first + (steps - 1 - order if BACK else order)) * C


@gluon.jit
def _buffers(
    BK: gl.constexpr, BV: gl.constexpr, C: gl.constexpr, STAGES: gl.constexpr, GATE: gl.constexpr, KEEP: gl.constexpr,
    DOT: gl.constexpr,
):  # fmt: skip
    """Shared memory: rows and a line of decays of each stage; states on their way out (KEEP); barriers."""
    b_buffers = gl.allocate_shared_memory(DOT, [STAGES, C, BK], shared_layout(BK))
    stages = (b_buffers, gl.allocate_shared_memory(DOT, [STAGES, C, BV], shared_layout(BV)))
    if GATE == SCALAR_GATE:
        stages = stages + (gl.allocate_shared_memory(gl.float32, [STAGES, 1, C], line_layout()),)
    bars = barriers(STAGES)
    state_buffers = gl.allocate_shared_memory(DOT, [2, BK, BV], shared_layout(BV)) if KEEP else b_buffers
    return stages, state_buffers, bars


@gluon.jit
def _bring(
    bars, sources, stages, place, group, heads, t, step,
    BYTES: gl.constexpr, C: gl.constexpr, STAGES: gl.constexpr, GATE: gl.constexpr,
):  # fmt: skip
    """Starts to copy a step's chunk of b and c, and its decays."""
    batch, head, column = place
    rows = ([batch, t, head // group, 0], [batch, t, head, column])
    bring(bars, sources, stages, rows, [batch * heads + head, t], step, BYTES, C, STAGES, GATE)


@gluon.jit
def _reaching(
    lines, rate, head_index, n_first, steps, length, C: gl.constexpr, GATE: gl.constexpr, REVERSE: gl.constexpr,
    WARPS: gl.constexpr,
):  # fmt: skip
    """First chunk and number of those of a segment that reach its end, or in reverse its beginning."""
    reaching = steps
    if GATE == SCALAR_GATE:
        own = lines + head_index.to(gl.int64) * ((length + C - 1) // C * C)
        reaching = reaching_chunks(own, n_first, n_first + steps - 1, C, REVERSE, WARPS, True)
    elif GATE != NO_GATE:
        reaching = reaching_at(rate, steps, C)
    if not REVERSE:
        n_first += steps - reaching
    return n_first, reaching


@gluon.jit
def _keep(states, place, heads, t, length, buffer, state_KV, C: gl.constexpr, DOT: gl.constexpr):
    """Starts to copy the state before a chunk to memory."""
    buffer.store(state_KV.to(DOT))
    fence_async_shared()
    thread_barrier()
    batch, head, column = place
    chunk = batch * ((length + C - 1) // C) + t // C
    tma.async_copy_shared_to_global(states, [chunk * heads + head, 0, column], buffer)


@gluon.jit
def _store_sums(sums, decays, index, offsets, inside, state_KV, decay, tile, SIZE: gl.constexpr):
    """What a segment adds to a state, and its log2 decay."""
    gl.store(sums + index.to(gl.int64) * SIZE + offsets, state_KV, mask=inside)
    gl.store(decays + index, decay, mask=tile == 0)


@entry(do_not_specialize=SIZES, gluon=True)
def states_kernel(  # noqa: PLR0912, PLR0915 - one turn of a pipeline, whose order is the point
    b, c, states, line_rows, lines, gate, given, last, sums, decays,
    length: tl.int32, heads: tl.int32, group: tl.int32, gate_every: tl.int32, segments: tl.int32, span: tl.int32,
    K: gl.constexpr, V: gl.constexpr, BK: gl.constexpr, BV: gl.constexpr, GROUPS: gl.constexpr, C: gl.constexpr,
    STAGES: gl.constexpr, GATE: gl.constexpr, GIVEN: gl.constexpr, KEEP: gl.constexpr, LAST: gl.constexpr,
    REVERSE: gl.constexpr, DOT: gl.constexpr,
):  # fmt: skip
    """Sums over the rows of segments, or with KEEP states between chunks; b and c are k and v, or in reverse q and do.

    Sums: what each segment but the last (in reverse the first) adds to the state, and its log2 decay, as in
    `kernels.walks.walk_forward_triton.segment_kernel`. They go through a segment against the order of the walk, which then starts
    with rows that the L2 cache still has; what follows a chunk decays its operand, not the sum, and where nothing of a chunk is
    left by that, they stop.
    KEEP: the state before each chunk, in reverse the gradient of that behind it, [B * N * H, K, V] in 16 bit, from `given`
    (GIVEN) and the sums; LAST writes the one at the end.

    Grid: (B * P * H * value tiles,), without KEEP P - 1.
    """
    let_launch()
    tiles: gl.constexpr = (V + BV - 1) // BV
    tile = gl.program_id(0) % tiles
    head, piece, batch = program(gl.program_id(0) // tiles, heads, segments if KEEP else segments - 1)
    if REVERSE and not KEEP:
        piece += 1
    place = (batch, head, tile * BV)
    BACK: gl.constexpr = REVERSE == KEEP
    tall: gl.constexpr = state_layout(BK, BV, GROUPS)
    BYTES: gl.constexpr = 2 * C * (BK + BV)
    sources = (b, c, line_rows) if GATE == SCALAR_GATE else (b, c)
    stages, state_buffers, bars = _buffers(BK, BV, C, STAGES, GATE, KEEP, DOT)
    rate = rate_of(gate, batch, head, heads, gate_every, GATE == CONSTANT_GATE)
    n_first, steps = chunks_of(piece, span, length, C)
    if not KEEP:
        n_first, steps = _reaching(lines, rate, batch * heads + head, n_first, steps, length, C, GATE, REVERSE, 4 * GROUPS)
    for early in gl.static_range(STAGES):
        t_far = _start(n_first, early, steps, C, BACK)
        _bring(bars, sources, stages, place, group, heads, t_far, early, BYTES, C, STAGES, GATE)
    offsets, inside = columns_of(tall, place[2], V, K, BK, BV)
    state_KV = gl.zeros([BK, BV], gl.float32, tall)
    if KEEP:
        own_place = (batch, head, piece)
        state_KV = state_of(given, sums, decays, own_place, heads, segments, offsets, inside, tall, K * V, BK, BV, GIVEN, REVERSE)
    t, others = _start(n_first, 0, steps, C, BACK), 0.0
    half = half_of(lines, rate, batch, head, heads, t, length, C, GATE)
    await_stage(bars, 0, STAGES)
    first = at_stage(stages, 0)
    if GATE != NO_GATE:
        b_KC = entering(first[0], first, rate, half, t, length, tall, C, GATE, REVERSE, DOT)
    for step in range(steps):
        own, following = at_stage(stages, step % STAGES), at_stage(stages, (step + 1) % STAGES)
        t_next, t_far = _start(n_first, step + 1, steps, C, BACK), _start(n_first, step + STAGES, steps, C, BACK)
        next_half = half_of(lines, rate, batch, head, heads, t_next, length, C, GATE)
        if KEEP:
            _keep(states, place, heads, t, length, state_buffers.index(step % 2), state_KV, C, DOT)
        if GATE == NO_GATE:
            state = warpgroup_mma(own[0].permute([1, 0]), own[1], state_KV, is_async=True)
        elif KEEP:
            state = warpgroup_mma(b_KC, own[1], state_KV * gl.exp2(2.0 * half), is_async=True)
        else:
            others += 2.0 * half
            state = warpgroup_mma(b_KC, own[1], state_KV, is_async=True)
        await_stage(bars, step + 1, STAGES)
        if GATE != NO_GATE:
            next_KC = entering(following[0], following, rate, next_half + others, t_next, length, tall, C, GATE, REVERSE, DOT)
        state_KV = warpgroup_mma_wait(0, [state])
        if KEEP:
            tma.store_wait(1)  # the state before this one has left
        thread_barrier()  # all warps have read the rows
        _bring(bars, sources, stages, place, group, heads, t_far, step + STAGES, BYTES, C, STAGES, GATE)
        if GATE != NO_GATE:
            b_KC = next_KC
        half, t = next_half, t_next
    await_rest(bars, steps + 1, STAGES - 1, STAGES)
    if KEEP:
        tma.store_wait(0)
    if not KEEP:
        _store_sums(sums, decays, (batch * segments + piece) * heads + head, offsets, inside, state_KV, others, tile, K * V)
    elif LAST:
        ending = piece == (0 if REVERSE else segments - 1)
        gl.store(last + (batch * heads + head).to(gl.int64) * K * V + offsets, state_KV, mask=inside & ending)
