"""The forward walk of `kernels.walk_triton` for Hopper, in Gluon: rows come by themselves, and products run on their own.

A walk is a chain: the next chunk waits for the state. Plain Triton waits for every product of a chunk, in order. Here the scores
of the next chunk are made while the sums of this one are, and nothing of the chain waits for outputs, which leave on their own.

Shape legend: B batch, T time, H heads, C = 64 tokens of a chunk, K key, V value width, W both on chip.
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
from kernels.walk_hopper_parts import bring, buffers_of, decays_of, enter, gate_of, mended, seen, start_of, steps_of
from kernels.walk_triton import NO_GATE

# What differs from call to call is not specialised, so that a new batch, length or head count compiles nothing.
SIZES = ["length", "heads", "gate_every"]


@gluon.jit
def _leave(o, at, out_buffer, o_CV, leave_C, GATE: gl.constexpr, DOT: gl.constexpr):
    """Starts to store outputs."""
    if GATE != NO_GATE:
        o_CV = o_CV * gl.exp2(leave_C)[:, None]
    tma.store_wait(0)
    thread_barrier()
    out_buffer.store(o_CV.to(DOT))
    fence_async_shared()
    tma.async_copy_shared_to_global(o, at, out_buffer)


@gluon.jit
def _late(state_KV, own, out_buffer, decays, narrow: gl.constexpr, DOT: gl.constexpr):
    """The state behind a chunk, with what the cut scalings of a rough one left out."""
    state_KV = state_KV * gl.exp2(decays[2])
    if decays[4]:
        tma.store_wait(0)
        thread_barrier()
        late_C = gl.convert_layout(gl.exp2(decays[2] - decays[1]) - gl.exp2(decays[2]), gl.SliceLayout(1, narrow))
        out_buffer.store((own[2].load(narrow).to(gl.float32) * late_C[:, None]).to(DOT))
        fence_async_shared()
        more = warpgroup_mma(own[1].permute([1, 0]), out_buffer, state_KV, is_async=True)
        state_KV = warpgroup_mma_wait(0, [more])
        thread_barrier()
    return state_KV


@entry(do_not_specialize=SIZES, gluon=True)
def forward_kernel(  # noqa: PLR0915 - one turn of a pipeline, whose order is the point
    q, k, v, o, gate, first, last, length: tl.int32, heads: tl.int32, gate_every: tl.int32,
    K: gl.constexpr, V: gl.constexpr, W: gl.constexpr, GROUPS: gl.constexpr, C: gl.constexpr, STAGES: gl.constexpr,
    GATE: gl.constexpr, FIRST: gl.constexpr, LAST: gl.constexpr, DOT: gl.constexpr,
):  # fmt: skip
    """Outputs, on descriptors of blocks [C, W] of a chunk, of GROUPS warp groups. Grid: (B * H,)."""
    head, batch = gl.program_id(0) % heads, gl.program_id(0) // heads
    gate = gate_of(gate, batch, head, length, heads, gate_every, GATE)
    stages, work, bars = buffers_of(W, C, STAGES, DOT)
    state_buffer, out_buffer, scores_buffer, line_buffer = work
    square: gl.constexpr = sums_layout(C, GROUPS)
    narrow: gl.constexpr = sums_layout(W, GROUPS)
    of_rows: gl.constexpr = gl.SliceLayout(1, narrow)
    sources, steps = (q, k, v), (length + C - 1) // C
    rows, cols = gl.arange(0, C, gl.SliceLayout(1, square)), gl.arange(0, C, gl.SliceLayout(0, square))
    none_CV, none_CC = gl.zeros([C, W], gl.float32, narrow), gl.zeros([C, C], gl.float32, square)
    for early in gl.static_range(STAGES - 1):
        bring(bars, sources, stages, batch, head, start_of(early, steps, C), early, W, C, STAGES)
    d, e = gl.arange(0, W, of_rows), gl.arange(0, W, gl.SliceLayout(0, narrow))
    offsets, inside = d[:, None] * V + e[None, :], (d < K)[:, None] & (e < V)[None, :]
    at_state, state_KV = (batch * heads + head).to(gl.int64) * K * V + offsets, gl.zeros([W, W], gl.float32, narrow)
    if FIRST:
        state_KV += gl.load(first + at_state, mask=inside, other=0.0)
    decays, next_step_C = (rows.to(gl.float32), rows.to(gl.float32), 0.0, 0.0, False), cols.to(gl.float32)
    t = start_of(0, steps, C)
    if GATE != NO_GATE:
        decays = decays_of(steps_of(gate, t, length, heads, cols, GATE), rows, cols)
        next_step_C = steps_of(gate, start_of(1, steps, C), length, heads, cols, GATE)
    mbarrier.wait(bars.index(0), 0)
    early_scores = warpgroup_mma(stages[0].index(0), stages[1].index(0).permute([1, 0]), none_CC, use_acc=False, is_async=True)
    if GATE != NO_GATE:
        enter(stages[2].index(0), decays[0], narrow, DOT)
        state_KV = state_KV * gl.exp2(decays[3])
    early_CC = warpgroup_mma_wait(0, [early_scores])
    scores_buffer.store(seen(early_CC, decays, rows, cols, line_buffer, square, GATE).to(DOT))
    state_buffer.store(state_KV.to(DOT))
    fence_async_shared()
    for step in range(steps):
        own, following = at_stage(stages, step % STAGES), at_stage(stages, (step + 1) % STAGES)
        if GATE != NO_GATE:
            state_KV = state_KV * gl.exp2(decays[2] - decays[3])
        read = warpgroup_mma(own[0], state_buffer, none_CV, use_acc=False, is_async=True)
        read = warpgroup_mma(scores_buffer, own[2], read, is_async=True)
        state = warpgroup_mma(own[1].permute([1, 0]), own[2], state_KV, is_async=True)
        t_far = start_of(step + STAGES - 1, steps, C)
        bring(bars, sources, stages, batch, head, t_far, step + STAGES - 1, W, C, STAGES)
        mbarrier.wait(bars.index((step + 1) % STAGES), (step + 1) // STAGES % 2)
        scores = warpgroup_mma(following[0], following[1].permute([1, 0]), none_CC, use_acc=False, is_async=True)
        next_decays = decays
        if GATE != NO_GATE:
            next_decays = decays_of(next_step_C, rows, cols)
            next_step_C = steps_of(gate, start_of(step + 2, steps, C), length, heads, cols, GATE)
            enter(following[2], next_decays[0], narrow, DOT)
        o_CV, state, scores = warpgroup_mma_wait(2, [read, state, scores])
        o_CV = mended(o_CV, own[0], state_buffer, none_CV, decays, of_rows, GATE)
        _leave(o, [batch, t, head, 0], out_buffer, o_CV, gl.convert_layout(decays[0], of_rows), GATE, DOT)
        state_KV, scores = warpgroup_mma_wait(1, [state, scores])
        if GATE != NO_GATE:
            state_KV = _late(state_KV, own, out_buffer, decays, narrow, DOT)
            state_KV = state_KV * gl.exp2(gl.where(step == steps - 1, 0.0, next_decays[3]))
        thread_barrier()  # all warps' products have read the state
        state_buffer.store(state_KV.to(DOT))
        scores_CC = warpgroup_mma_wait(0, [scores])
        scores_buffer.store(seen(scores_CC, next_decays, rows, cols, line_buffer, square, GATE).to(DOT))
        fence_async_shared()
        decays = next_decays
        t = start_of(step + 1, steps, C)
    for rest in gl.static_range(STAGES - 2):
        mbarrier.wait(bars.index((steps + 1 + rest) % STAGES), (steps + 1 + rest) // STAGES % 2)
    tma.store_wait(0)
    if LAST:
        gl.store(last + at_state, state_KV, mask=inside)
