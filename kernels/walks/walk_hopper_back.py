"""Gradients of the walk for Hopper, in Gluon: queries by the walk of `kernels.walks.walk_hopper`, keys and values by one back.

Both dk and dv read the gradient of the state that leaves a chunk, and both need q, k, v and do, which are then read once. What
pairs of a chunk give to the gradient of its decays is at hand there too: their scores and the gradients of these.

Shape legend: B batch, T time, H heads, P segments, C = 64 tokens of a chunk, K key, V value width, W both on chip.
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
from kernels.delta_rule.delta_hopper import at_stage, barriers, columns_of, shared_layout, sums_layout, thread_barrier
from kernels.walks.walk_hopper import buffers_of, walk
from kernels.walks.walk_hopper_parts import (
    SIZES,
    add_rows,
    await_rest,
    await_stage,
    bring,
    chunks_of,
    column_sums,
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
def _back_buffers(W: gl.constexpr, C: gl.constexpr, STAGES: gl.constexpr, GATE: gl.constexpr, DOT: gl.constexpr):
    """Shared memory: q, k, v and do and a line of decays of each stage; the state, both outputs, both scores; barriers."""
    q_buffers = gl.allocate_shared_memory(DOT, [STAGES, C, W], shared_layout(W))
    k_buffers = gl.allocate_shared_memory(DOT, [STAGES, C, W], shared_layout(W))
    v_buffers = gl.allocate_shared_memory(DOT, [STAGES, C, W], shared_layout(W))
    stages = (q_buffers, k_buffers, v_buffers, gl.allocate_shared_memory(DOT, [STAGES, C, W], shared_layout(W)))
    if GATE == SCALAR_GATE:
        stages = stages + (gl.allocate_shared_memory(gl.float32, [STAGES, 1, C], line_layout()),)
    state_buffer = gl.allocate_shared_memory(DOT, [W, W], shared_layout(W))
    dk_buffer = gl.allocate_shared_memory(DOT, [C, W], shared_layout(W))
    dv_buffer = gl.allocate_shared_memory(DOT, [C, W], shared_layout(W))
    kq_buffer = gl.allocate_shared_memory(DOT, [C, C], shared_layout(C))
    vo_buffer = gl.allocate_shared_memory(DOT, [C, C], shared_layout(C))
    return stages, (state_buffer, dk_buffer, dv_buffer, kq_buffer, vo_buffer), barriers(STAGES)


@gluon.jit
def _start(n_first, step, steps, C: gl.constexpr):
    """First token of a step's chunk, from the last one on; steps beyond the first stay at it."""
    return (n_first + gl.maximum(steps - 1 - step, 0)) * C


@gluon.jit
def _seen(
    kq_CC, vo_CC, stage, rate, t, length, square: gl.constexpr,
    C: gl.constexpr, GATE: gl.constexpr, GROUPS: gl.constexpr, PROBE: gl.constexpr,
):  # fmt: skip
    """Scores of keys and later queries, and their gradients, decayed; and what pairs give to the gradient of the decays.

    The latter is the sum of their products for each key and for each query, the same numbers, which cancel exactly in sums over
    the chunk. A token's own pair has no decay and is left out.
    """
    rows, cols = gl.arange(0, C, gl.SliceLayout(1, square)), gl.arange(0, C, gl.SliceLayout(0, square))
    is_seen = rows[:, None] <= cols[None, :]
    of_keys, of_queries = rows, cols
    if GATE == NO_GATE:
        kq_CC, vo_CC = gl.where(is_seen, kq_CC, 0.0), gl.where(is_seen, vo_CC, 0.0)
    else:
        fall_rows = falls(stage, rate, t, length, C, GATE, gl.SliceLayout(1, square))
        fall_cols = falls(stage, rate, t, length, C, GATE, gl.SliceLayout(0, square))
        decay_CC = gl.exp2(gl.where(is_seen, fall_cols[None, :] - fall_rows[:, None], float("-inf")))
        kq_CC = kq_CC * decay_CC
        if PROBE:
            pairs_CC = gl.where(rows[:, None] == cols[None, :], 0.0, kq_CC * vo_CC)
            of_keys, of_queries = row_sums(pairs_CC, C, C, GROUPS), column_sums(pairs_CC, C, C, GROUPS)
        vo_CC = vo_CC * decay_CC
    return kq_CC, vo_CC, of_keys, of_queries


@gluon.jit
def _scores(stage, none_CC):
    """Starts the products of a chunk's k and q, and of its v and do."""
    kq = warpgroup_mma(stage[1], stage[0].permute([1, 0]), none_CC, use_acc=False, is_async=True)
    vo = warpgroup_mma(stage[2], stage[3].permute([1, 0]), none_CC, use_acc=False, is_async=True)
    return kq, vo


@gluon.jit
def _decayed(
    dv_read, dk_read, state, of_keys, stage, rowsum, part_size, rate, half, t, length, narrow: gl.constexpr, W: gl.constexpr,
    GROUPS: gl.constexpr, C: gl.constexpr, GATE: gl.constexpr, PROBE: gl.constexpr,
):  # fmt: skip
    """What dv and dk read from the state, decayed, and the state's product that still runs; PROBE writes sums for keys."""
    if GATE != NO_GATE:
        read_C = gl.exp2(half - falls(stage, rate, t, length, C, GATE, gl.SliceLayout(1, narrow)))
        dv_CW, dk_CW, state = warpgroup_mma_wait(1, [dv_read, dk_read, state])
        dv_read, dk_read = dv_CW * read_C[:, None], dk_CW * read_C[:, None]
        if PROBE:
            of_keys += row_sums(dv_read * stage[2].load(narrow).to(gl.float32), C, W, GROUPS)
            store_sums(rowsum + t, -of_keys, part_size, True, C, GROUPS)
    return dv_read, dk_read, state


@gluon.jit
def _write(results, row, dk_buffer, dv_buffer, dk_sums, dv_sums, kq, vo, DOT: gl.constexpr):
    """Starts to copy a chunk's dk and dv to memory; the products of the scores still run."""
    dv_CW, dk_CW, kq, vo = warpgroup_mma_wait(2, [dv_sums, dk_sums, kq, vo])
    dv_buffer.store(dv_CW.to(DOT))
    dk_buffer.store(dk_CW.to(DOT))
    fence_async_shared()
    tma.async_copy_shared_to_global(results[1], row, dv_buffer)
    tma.async_copy_shared_to_global(results[0], row, dk_buffer)
    return kq, vo


@gluon.jit
def _store_scores(
    kq_buffer, vo_buffer, kq, vo, stage, rate, t, length, square: gl.constexpr,
    C: gl.constexpr, GATE: gl.constexpr, GROUPS: gl.constexpr, PROBE: gl.constexpr, DOT: gl.constexpr,
):  # fmt: skip
    """Waits for a chunk's scores and their gradients, and stores them decayed; what `_seen` sums for keys and for queries."""
    kq_CC, vo_CC = warpgroup_mma_wait(0, [kq, vo])
    kq_CC, vo_CC, of_keys, of_queries = _seen(kq_CC, vo_CC, stage, rate, t, length, square, C, GATE, GROUPS, PROBE)
    kq_buffer.store(kq_CC.to(DOT))
    vo_buffer.store(vo_CC.to(DOT))
    return of_keys, of_queries


@gluon.jit
def _walk_back(  # noqa: PLR0915 - one turn of a pipeline, whose order is the point
    sources, results, pointers, rate, place, sizes, buffers,
    K: gl.constexpr, V: gl.constexpr, W: gl.constexpr, GROUPS: gl.constexpr, C: gl.constexpr, STAGES: gl.constexpr,
    GATE: gl.constexpr, DLAST: gl.constexpr, LAST: gl.constexpr, PROBE: gl.constexpr, DOT: gl.constexpr,
):  # fmt: skip
    """One head's reverse walk over a segment for all of dk and dv.

    Args:
        sources: descriptors of q, k, v, do, and of the lines of scalar decays.
        results: descriptors of dk and dv.
        pointers: lines of decays, gradient of the last state, that of the first, which is written (LAST), what segments add to
            a state and their decays; with PROBE sums of this head for keys, then for queries, and how far apart their parts are.
        rate, place, sizes: see `kernels.walks.walk_hopper.walk`.
        buffers: of `_back_buffers`.
    """
    lines, given, last, sums, decays, rowsum, part_size = pointers
    batch, head, piece = place
    length, heads, segments, span = sizes
    stages, work, bars = buffers
    state_buffer, dk_buffer, dv_buffer, kq_buffer, vo_buffer = work
    square: gl.constexpr = sums_layout(C, GROUPS)
    narrow: gl.constexpr = sums_layout(W, GROUPS)
    tall: gl.constexpr = narrow if GATE == NO_GATE else state_layout(W, W, GROUPS)
    BYTES: gl.constexpr = 2 * C * 4 * W
    n_first, steps = chunks_of(piece, span, length, C)
    none_CW, none_CC = gl.zeros([C, W], gl.float32, narrow), gl.zeros([C, C], gl.float32, square)
    for early in gl.static_range(STAGES - 1):
        row = [batch, _start(n_first, early, steps, C), head, 0]
        bring(bars, sources, stages, (row, row, row, row), [batch * heads + head, row[1]], early, BYTES, C, STAGES, GATE)
    offsets, inside = columns_of(tall, 0, V, K, W, W)
    state_KV = state_of(given, sums, decays, place, heads, segments, offsets, inside, tall, K * V, W, W, DLAST, True)
    t = _start(n_first, 0, steps, C)
    half = half_of(lines, rate, batch, head, heads, t, length, C, GATE)
    await_stage(bars, 0, STAGES)
    first = at_stage(stages, 0)
    early_kq, early_vo = _scores(first, none_CC)
    of_keys, of_queries = _store_scores(
        kq_buffer, vo_buffer, early_kq, early_vo, first, rate, t, length, square, C, GATE, GROUPS, PROBE, DOT
    )
    state_buffer.store(state_KV.to(DOT))
    fence_async_shared()
    if PROBE:
        store_sums(rowsum + GROUPS * part_size + t, of_queries, part_size, False, C, GROUPS)
    for step in range(steps):
        own, following = at_stage(stages, step % STAGES), at_stage(stages, (step + 1) % STAGES)
        t_next = _start(n_first, step + 1, steps, C)
        next_half = half_of(lines, rate, batch, head, heads, t_next, length, C, GATE)
        dv_read = warpgroup_mma(own[1], state_buffer, none_CW, use_acc=False, is_async=True)
        dk_read = warpgroup_mma(own[2], state_buffer.permute([1, 0]), none_CW, use_acc=False, is_async=True)
        state = add_rows(state_KV, own[0], own[3], own, rate, half, t, length, tall, C, GATE, True, DOT)
        row = [batch, _start(n_first, step + STAGES - 1, steps, C), head, 0]
        line = [batch * heads + head, row[1]]
        bring(bars, sources, stages, (row, row, row, row), line, step + STAGES - 1, BYTES, C, STAGES, GATE)
        dv_read, dk_read, state = _decayed(
            dv_read, dk_read, state, of_keys, own, rowsum, part_size, rate, half, t, length, narrow, W, GROUPS, C, GATE, PROBE
        )
        dv_sums = warpgroup_mma(kq_buffer, own[3], dv_read, is_async=True)
        dk_sums = warpgroup_mma(vo_buffer, own[0], dk_read, is_async=True)
        await_stage(bars, step + 1, STAGES)
        kq, vo = _scores(following, none_CC)
        state_KV, dv_sums, dk_sums, kq, vo = warpgroup_mma_wait(4, [state, dv_sums, dk_sums, kq, vo])
        tma.store_wait(0)
        thread_barrier()  # all warps' products have read the state, and copies the outputs of the chunk before
        state_buffer.store(state_KV.to(DOT))
        kq, vo = _write(results, [batch, t, head, 0], dk_buffer, dv_buffer, dk_sums, dv_sums, kq, vo, DOT)
        thread_barrier()  # all warps' products have read the scores
        of_keys, of_queries = _store_scores(
            kq_buffer, vo_buffer, kq, vo, following, rate, t_next, length, square, C, GATE, GROUPS, PROBE, DOT
        )
        fence_async_shared()
        thread_barrier()  # see `kernels.walks.walk_hopper.walk`
        if PROBE:
            store_sums(rowsum + GROUPS * part_size + t_next, of_queries, part_size, False, C, GROUPS)
        half, t = next_half, t_next
    await_rest(bars, steps + 1, STAGES - 2, STAGES)
    tma.store_wait(0)
    if LAST:
        gl.store(last + (batch * heads + head).to(gl.int64) * K * V + offsets, state_KV, mask=inside & (piece == 0))


@entry(do_not_specialize=SIZES, gluon=True)
def backward_kernel(
    q, k, v, do, dq, dk, dv, line_rows, lines, gate, first, dlast, dfirst, before, decays_before, behind, decays_behind, rowsums,
    length: tl.int32, heads: tl.int32, gate_every: tl.int32, segments: tl.int32, span: tl.int32,
    K: gl.constexpr, V: gl.constexpr, W: gl.constexpr, GROUPS: gl.constexpr, C: gl.constexpr, STAGES: gl.constexpr,
    BACK_STAGES: gl.constexpr, SLOTS: gl.constexpr, GATE: gl.constexpr, FIRST: gl.constexpr,
    DLAST: gl.constexpr, GATE_GRAD: gl.constexpr, DOT: gl.constexpr,
):  # fmt: skip
    """All gradients. Grid: (2 * B * P * H,): keys and values of all heads, then, as their walks are shorter, the queries.

    `first` starts the walk of queries (FIRST) and has the gradient `dfirst`; `dlast` (DLAST) starts that of keys and values;
    segments before, or behind, have sums and decays. `rowsums` [B, H, parts, N * C] sum to the gradient of the cumulated
    decays: GROUPS parts of what queries read from earlier chunks, as many of what keys give, and four of what queries get inside
    of their chunk.
    """
    of_keys = gl.num_programs(0) // 2
    head, piece, batch = program(gl.program_id(0) % of_keys, heads, segments)
    rate = rate_of(gate, batch, head, heads, gate_every, GATE == CONSTANT_GATE)
    sizes = (length, heads, segments, span)
    part_size = (length + C - 1) // C * C
    rowsum = rowsums + (batch.to(gl.int64) * heads + head) * part_size * (2 * GROUPS + 4)
    if gl.program_id(0) < of_keys:
        _walk_back(
            (q, k, v, do, line_rows) if GATE == SCALAR_GATE else (q, k, v, do), (dk, dv),
            (lines, dlast, dfirst, behind, decays_behind, rowsum + GROUPS * part_size, part_size), rate,
            (batch, head, piece), sizes, _back_buffers(W, C, BACK_STAGES, GATE, DOT),
            K, V, W, GROUPS, C, BACK_STAGES, GATE, DLAST, FIRST, GATE_GRAD, DOT,
        )  # fmt: skip
    else:
        walk(
            (do, v, k, line_rows) if GATE == SCALAR_GATE else (do, v, k), q, dq, q,
            (lines, first, first, before, decays_before, rowsum, part_size), rate, (batch, head, piece, head), sizes,
            buffers_of(W, W, C, STAGES, SLOTS if GATE_GRAD else 0, GATE, DOT),
            V, K, W, W, GROUPS, C, STAGES, SLOTS, GATE, True, FIRST, False, False, GATE_GRAD, False, DOT,
        )  # fmt: skip
