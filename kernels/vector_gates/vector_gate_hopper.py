"""The forward walk with a decay per key channel for Hopper, in Gluon: `walk_kernel` of `kernels.vector_gates.vector_gate_walk`.

Rows of the next chunks are on their way while one is computed. With the delta rule the chain of a chunk's products is K' S_m,
H beta R and the next state; Q' S_m runs while R is subtracted and stored, P U while the next state is. Without it the values
are what is written, and nothing but the state goes through registers. See `kernels.delta_rule.delta_hopper` for the barriers.

Without OUT a walk finds what a segment does to a state: it takes the state that enters to R S + C, see
`kernels.delta_rule.delta_hopper_carry`; `kernels.delta_rule.delta_combine_triton` goes through the segments.

Shape legend: B batch, T time, H heads, N chunks, C = 64 tokens of a chunk, K key, V value width; KP and VP are padded widths.
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
from kernels.delta_rule.delta_hopper import at_stage, barriers, columns_of, fetch, place, shared_layout, sums_layout, thread_barrier
from kernels.vector_gates.vector_gate_rows import SIZES


@gluon.jit
def stage_buffers(
    KP: gl.constexpr, BV: gl.constexpr, C: gl.constexpr, STAGES: gl.constexpr, DELTA: gl.constexpr, OUT: gl.constexpr,
    DOT: gl.constexpr,
):  # fmt: skip
    """Shared memory of each stage: W, values; with OUT Q', P; with the delta rule K', H."""
    stages = (
        gl.allocate_shared_memory(DOT, [STAGES, C, KP], shared_layout(KP)),
        gl.allocate_shared_memory(DOT, [STAGES, C, BV], shared_layout(BV)),
    )
    for _ in gl.static_range(OUT + DELTA):
        by_key = gl.allocate_shared_memory(DOT, [STAGES, C, KP], shared_layout(KP))
        by_pair = gl.allocate_shared_memory(DOT, [STAGES, C, C], shared_layout(C))
        stages = stages + (by_key, by_pair)
    return stages


@gluon.jit
def bring(
    bars, sources, stages, at, n, step, KP: gl.constexpr, BV: gl.constexpr, C: gl.constexpr, STAGES: gl.constexpr
):  # fmt: skip
    """Starts to copy what a chunk needs into its stage."""
    PAIRS: gl.constexpr = len(stages) // 2
    batch, head, chunk_0, e_start = at
    block, row = [chunk_0 + n, 0, 0], [batch, n * C, head, e_start]
    places = (block, row, block, block, block, block)
    fetch(bars.index(step % STAGES), 2 * C * (PAIRS * KP + BV + (PAIRS - 1) * C), sources, places, at_stage(stages, step % STAGES))


@gluon.jit
def factors_of(factors, n, d, KP: gl.constexpr):
    """Enter, carry and leave of a chunk; see `kernels.vector_gates.vector_gate_middle.load_factors`."""
    first_K, second_K = gl.load(factors + n * 2 * KP + d), gl.load(factors + n * 2 * KP + KP + d)
    is_rough = first_K < 0
    return gl.where(is_rough, 1.0, first_K), gl.where(is_rough, second_K, 1.0), gl.where(is_rough, 1.0, second_K)


@gluon.jit
def beta_of(beta, n, i, length, heads, C: gl.constexpr):
    """Write strengths of a chunk; padding writes nothing."""
    t_C = n * C + i
    return gl.load(beta + t_C.to(gl.int64) * heads, mask=t_C < length, other=0.0).to(gl.float32)


@gluon.jit
def start_of(
    given, part, head_index, order, e_start,
    K: gl.constexpr, V: gl.constexpr, KP: gl.constexpr, BV: gl.constexpr, GROUPS: gl.constexpr, GIVEN: gl.constexpr,
    OUT: gl.constexpr,
):  # fmt: skip
    """Columns of the state with which a walk starts: of the one given or zero; without OUT of the identity beyond the values."""
    rows: gl.constexpr = sums_layout(BV, GROUPS)
    state_KV = gl.zeros([KP, BV], gl.float32, rows)
    if GIVEN:
        offsets, inside = columns_of(rows, e_start, V, K, KP, BV)
        index = part if OUT else head_index
        wanted = inside & (OUT | (order == 0))
        state_KV = gl.load(given + index.to(gl.int64) * K * V + offsets, mask=wanted, other=0.0)
    if not OUT:
        VALUES: gl.constexpr = (V + BV - 1) // BV * BV
        d, e = gl.arange(0, KP, gl.SliceLayout(1, rows)), e_start + gl.arange(0, BV, gl.SliceLayout(0, rows))
        state_KV += gl.where(d[:, None] == e[None, :] - VALUES, 1.0, 0.0)
    return state_KV


@gluon.jit
def store_end(
    target, state_KV, part, head_index, is_last, e_start,
    K: gl.constexpr, V: gl.constexpr, KP: gl.constexpr, BV: gl.constexpr, GROUPS: gl.constexpr, TILES: gl.constexpr,
    WANTED: gl.constexpr, OUT: gl.constexpr,
):  # fmt: skip
    """Columns of the state with which a walk ends: of the last segment's, if it is wanted; without OUT of every segment's."""
    rows: gl.constexpr = sums_layout(BV, GROUPS)
    if OUT and WANTED:
        offsets, inside = columns_of(rows, e_start, V, K, KP, BV)
        gl.store(target + head_index.to(gl.int64) * K * V + offsets, state_KV, mask=inside & is_last)
    if not OUT:
        offsets, inside = columns_of(rows, e_start, TILES * BV, K, KP, BV)
        gl.store(target + part.to(gl.int64) * K * TILES * BV + offsets, state_KV, mask=inside)


@gluon.jit
def sources_of(writes, rows, reads, scores, erases, couplings, DELTA: gl.constexpr, OUT: gl.constexpr):
    """What `stage_buffers` has room for."""
    sources = (writes, rows)
    if OUT:
        sources = sources + (reads, scores)
    if DELTA:
        sources = sources + (erases, couplings)
    return sources


@gluon.jit
def work_buffers(KP: gl.constexpr, BV: gl.constexpr, C: gl.constexpr, DELTA: gl.constexpr, DOT: gl.constexpr):
    """Shared memory for the state, for rows that leave, and with the delta rule for one more matrix like values."""
    state_buffer = gl.allocate_shared_memory(DOT, [KP, BV], shared_layout(BV))
    out_buffer = gl.allocate_shared_memory(DOT, [C, BV], shared_layout(BV))
    more_buffer = out_buffer
    if DELTA:
        more_buffer = gl.allocate_shared_memory(DOT, [C, BV], shared_layout(BV))
    return state_buffer, out_buffer, more_buffer


@gluon.jit
def arrived(bars, first, COUNT: gl.constexpr, STAGES: gl.constexpr):
    """Waits for copies that no chunk waits for."""
    for late in gl.static_range(COUNT):
        mbarrier.wait(bars.index((first + late) % STAGES), (first + late) // STAGES % 2)


@gluon.jit
def _ask(rows, states, at_state, work, none_CV, DELTA: gl.constexpr, KEEP: gl.constexpr, OUT: gl.constexpr):
    """Starts K' S_m and Q' S_m, and to store the state."""
    state_buffer, erased, asked = work[0], none_CV, none_CV
    if DELTA:
        erased = warpgroup_mma(rows[len(rows) - 2], state_buffer, none_CV, use_acc=False, is_async=True)
    if OUT:
        asked = warpgroup_mma(rows[2], state_buffer, none_CV, use_acc=False, is_async=True)
    if KEEP:
        if DELTA:
            tma.store_wait(1)  # the errors of the chunk before, which left by way of its values
        tma.async_copy_shared_to_global(states, at_state, state_buffer)
    return erased, asked


@gluon.jit
def _write(
    rows, erased, asked, work, beta_C, errors, at_o, layout: gl.constexpr, KEEP: gl.constexpr, OUT: gl.constexpr, DOT: gl.constexpr
):  # fmt: skip
    """With the delta rule: U of a chunk in shared memory, and Q' S_m; K' S_m and it run before. Starts to store the errors."""
    _, error_buffer, write_buffer = work
    v_CV = rows[1]
    value_CV = v_CV.load(layout).to(gl.float32)
    if OUT:
        erased_CV, asked = warpgroup_mma_wait(1, [erased, asked])
    else:
        erased_CV = warpgroup_mma_wait(0, [erased])
    error_CV = value_CV - erased_CV
    tma.store_wait(0)
    error_buffer.store((error_CV * -beta_C[:, None]).to(DOT))
    fence_async_shared()
    error = warpgroup_mma(rows[len(rows) - 1], error_buffer, error_CV, is_async=True)
    if OUT:
        error_CV, asked = warpgroup_mma_wait(0, [error, asked])
    else:
        error_CV = warpgroup_mma_wait(0, [error])
    write_buffer.store((error_CV * beta_C[:, None]).to(DOT))
    if KEEP:
        v_CV.store(error_CV.to(DOT))
    fence_async_shared()
    if KEEP:
        tma.async_copy_shared_to_global(errors, at_o, v_CV)
    return write_buffer, asked


@gluon.jit
def _leave(
    rows, u_CV, asked, state_KV, leave_K, enter_K, work, o, at_o, DELTA: gl.constexpr, OUT: gl.constexpr, DOT: gl.constexpr
):  # fmt: skip
    """The next state, also in shared memory; starts to store outputs."""
    state_buffer, out_buffer, _ = work
    state = warpgroup_mma(rows[0].permute([1, 0]), u_CV, state_KV, is_async=True)
    if OUT:
        asked = warpgroup_mma(rows[3], u_CV, asked, is_async=True)
        state_KV, asked = warpgroup_mma_wait(1, [state, asked])
    else:
        state_KV = warpgroup_mma_wait(0, [state])
    state_KV = state_KV * leave_K[:, None] * enter_K[:, None]  # one after the other: their product may be below all numbers
    if not DELTA:
        tma.store_wait(0)  # the state that was kept, and the outputs of the chunk before
    thread_barrier()  # all warps must have read the old state, and with the delta rule what outputs take the place of
    state_buffer.store(state_KV.to(DOT))
    if OUT:
        out_buffer.store(warpgroup_mma_wait(0, [asked]).to(DOT))
    fence_async_shared()
    if OUT:
        tma.async_copy_shared_to_global(o, at_o, out_buffer)
    return state_KV


@entry(do_not_specialize=SIZES, gluon=True)
def walk_kernel(
    reads, writes, erases, scores, couplings, v, o, errors, states, factors, beta, first, last,
    length: tl.int32, heads: tl.int32, segments: tl.int32, per: tl.int32,
    K: gl.constexpr, V: gl.constexpr, KP: gl.constexpr, BV: gl.constexpr, GROUPS: gl.constexpr, C: gl.constexpr,
    STAGES: gl.constexpr, DELTA: gl.constexpr, FIRST: gl.constexpr, LAST: gl.constexpr, KEEP: gl.constexpr, OUT: gl.constexpr,
    DOT: gl.constexpr,
):  # fmt: skip
    """As `kernels.vector_gates.vector_gate_walk.walk_kernel`, on descriptors of blocks of a chunk.

    Grid: (B * H * segments * value tiles,), of GROUPS warp groups; `first` has the state that enters each segment of `per` chunks.
    Without OUT, for the delta rule: all segments but the last, tiles of C and of R; `last` gets the columns of both.
    """
    TILES: gl.constexpr = (V + BV - 1) // BV + (0 if OUT else (K + BV - 1) // BV)
    part, e_start, chunks = gl.program_id(0) // TILES, gl.program_id(0) % TILES * BV, (length + C - 1) // C
    head_index, order, n_first, n_last = place(part, segments if OUT else segments - 1, segments, per, chunks, False)
    batch, head, chunk_0 = head_index // heads, head_index % heads, head_index * chunks
    at = (batch, head, chunk_0, e_start)
    beta += batch.to(gl.int64) * length * heads + head
    factors += chunk_0.to(gl.int64) * 2 * KP
    sources = sources_of(writes, v, reads, scores, erases, couplings, DELTA, OUT)
    stages, work = stage_buffers(KP, BV, C, STAGES, DELTA, OUT, DOT), work_buffers(KP, BV, C, DELTA, DOT)
    bars = barriers(STAGES)
    layout: gl.constexpr = sums_layout(BV, GROUPS)
    i, d = gl.arange(0, C, gl.SliceLayout(1, layout)), gl.arange(0, KP, gl.SliceLayout(1, layout))
    none_CV = gl.zeros([C, BV], gl.float32, layout)
    for early in gl.static_range(STAGES - 1):
        bring(bars, sources, stages, at, gl.minimum(n_first + early, n_last), early, KP, BV, C, STAGES)
    enter_K, carry_K, leave_K = factors_of(factors, n_first, d, KP)
    state_KV = start_of(first, part, head_index, order, e_start, K, V, KP, BV, GROUPS, FIRST, OUT) * enter_K[:, None]
    work[0].store(state_KV.to(DOT))
    fence_async_shared()
    for n in range(n_first, n_last + 1):
        step, at_o = n - n_first, [batch, n * C, head, e_start]
        rows = at_stage(stages, step % STAGES)
        mbarrier.wait(bars.index(step % STAGES), step // STAGES % 2)
        erased, asked = _ask(rows, states, [chunk_0 + n, 0, e_start], work, none_CV, DELTA, KEEP, OUT)
        bring(bars, sources, stages, at, gl.minimum(n + STAGES - 1, n_last), step + STAGES - 1, KP, BV, C, STAGES)
        enter_K, next_carry_K, next_leave_K = factors_of(factors, gl.minimum(n + 1, n_last), d, KP)
        u_CV = rows[1]
        if DELTA:
            beta_C = beta_of(beta, n, i, length, heads, C)
            u_CV, asked = _write(rows, erased, asked, work, beta_C, errors, at_o, layout, KEEP, OUT, DOT)
        enter_K = gl.where(n < n_last, enter_K, 1.0)
        state_KV = _leave(rows, u_CV, asked, state_KV * carry_K[:, None], leave_K, enter_K, work, o, at_o, DELTA, OUT, DOT)
        carry_K, leave_K = next_carry_K, next_leave_K
    arrived(bars, n_last - n_first + 1, STAGES - 1, STAGES)
    tma.store_wait(0)
    store_end(last, state_KV, part, head_index, order == segments - 1, e_start, K, V, KP, BV, GROUPS, TILES, LAST, OUT)
