"""The forward walk of the delta rule for Hopper where heads are few, in Gluon: with some columns of the values, or a segment.

Rows of the next chunks are on their way while one is computed. A chunk's chain of products is K S, H beta R, the next state;
Q K^T runs while the errors before the chunk's own writes are prepared, Q S while the writes are, and the outputs' last product
while the next state is stored. What is subtracted is negated before, so that products add to what they correct.

Shape legend: B batch, T time, H heads, N chunks, C = 64 tokens of a chunk, K key, V value width.
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
from kernels.delta_hopper import (
    SIZES,
    barriers,
    columns_of,
    factors_of,
    fetch,
    given_state,
    place,
    scaled,
    shared_layout,
    sums_layout,
    thread_barrier,
)


@gluon.jit
def at_stage(buffers, index):
    """Of buffers with a place for each stage, those of one stage."""
    views = ()
    for buffer in gl.static_range(len(buffers)):
        views = views + (buffers[buffer].index(index),)  # noqa: RUF005
    return views


@gluon.jit
def walk_buffers(BK: gl.constexpr, BV: gl.constexpr, C: gl.constexpr, STAGES: gl.constexpr, DOT: gl.constexpr):
    """Shared memory of a walk: queries, keys and values of each stage; the state, two matrices like values, scores, decays."""
    q_buffers = gl.allocate_shared_memory(DOT, [STAGES, C, BK], shared_layout(BK))
    k_buffers = gl.allocate_shared_memory(DOT, [STAGES, C, BK], shared_layout(BK))
    v_buffers = gl.allocate_shared_memory(DOT, [STAGES, C, BV], shared_layout(BV))
    state_buffer = gl.allocate_shared_memory(DOT, [BK, BV], shared_layout(BV))
    error_buffer = gl.allocate_shared_memory(DOT, [C, BV], shared_layout(BV))
    write_buffer = gl.allocate_shared_memory(DOT, [C, BV], shared_layout(BV))
    scores_buffer = gl.allocate_shared_memory(DOT, [C, C], shared_layout(C))
    g_buffer = gl.allocate_shared_memory(gl.float32, [C], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    return (q_buffers, k_buffers, v_buffers), (state_buffer, error_buffer, write_buffer, scores_buffer, g_buffer)


@gluon.jit
def _bring(
    bars, sources, stages, place, n, step,
    BK: gl.constexpr, BV: gl.constexpr, C: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Starts to copy what a chunk needs into its stage: queries, keys, values and H."""
    batch, head, shared_head, chunk_0, e_start = place
    BYTES: gl.constexpr = 2 * C * (2 * BK + BV + C)
    key_row = [batch, n * C, shared_head, 0]
    places = (key_row, key_row, [batch, n * C, head, e_start], [chunk_0 + n, 0, 0])
    fetch(bars.index(step % STAGES), BYTES, sources, places, at_stage(stages, step % STAGES))


@gluon.jit
def _seen(scores_CC, g_C, g_buffer, C: gl.constexpr, GROUPS: gl.constexpr, GATED: gl.constexpr):
    """Scores of tokens and earlier ones, decayed."""
    square: gl.constexpr = sums_layout(C, GROUPS)
    rows, cols = gl.arange(0, C, gl.SliceLayout(1, square)), gl.arange(0, C, gl.SliceLayout(0, square))
    seen = rows[:, None] >= cols[None, :]
    if GATED:
        fall_CC = gl.convert_layout(g_C, gl.SliceLayout(1, square))[:, None] - g_buffer.load(gl.SliceLayout(0, square))[None, :]
        # Only exponents that are <= 0 are used; the others would overflow and are masked before.
        scores_CC = scores_CC * gl.exp2(gl.where(seen, fall_CC, float("-inf")))
    else:
        scores_CC = gl.where(seen, scores_CC, 0.0)
    return scores_CC


@gluon.jit
def _errors(
    read, scores, q_CK, v_CV, h_CC, work, beta_C, g_C,
    C: gl.constexpr, BV: gl.constexpr, GROUPS: gl.constexpr, GATED: gl.constexpr, DOT: gl.constexpr,
):  # fmt: skip
    """The errors E of a chunk, in registers, and the product Q S, which runs on; from K S and Q K^T, which run."""
    state_buffer, error_buffer, _, scores_buffer, g_buffer = work
    narrow: gl.constexpr = sums_layout(BV, GROUPS)
    value_CV = v_CV.load(narrow).to(gl.float32)
    read_CV, scores = warpgroup_mma_wait(1, [read, scores])
    error_CV = value_CV - scaled(read_CV, g_C, GATED)
    tma.store_wait(0)
    error_buffer.store((error_CV * -beta_C[:, None]).to(DOT))
    scores_CC = warpgroup_mma_wait(0, [scores])
    scores_buffer.store(_seen(scores_CC, g_C, g_buffer, C, GROUPS, GATED).to(DOT))
    fence_async_shared()
    error = warpgroup_mma(h_CC, error_buffer, error_CV, is_async=True)
    none_CV = gl.zeros([C, BV], gl.float32, narrow)
    asked = warpgroup_mma(q_CK, state_buffer, none_CV, use_acc=False, is_async=True)
    return warpgroup_mma_wait(1, [error, asked])


@gluon.jit
def _write(
    errors, at_o, k_CK, v_CV, work, state_KV, error_CV, asked, beta_C, g_C, g_all,
    GATED: gl.constexpr, KEEP: gl.constexpr, DOT: gl.constexpr,
):  # fmt: skip
    """Starts the products that a chunk ends with, of the next state and of the outputs; keeps the errors, by way of the values."""
    _, error_buffer, write_buffer, scores_buffer, _ = work
    write_CV = error_CV * beta_C[:, None]
    write_buffer.store(write_CV.to(DOT))
    fade_buffer = write_buffer
    if KEEP:
        v_CV.store(error_CV.to(DOT))
    if GATED:
        state_KV, fade_buffer = state_KV * gl.exp2(g_all), error_buffer
        error_buffer.store((write_CV * gl.exp2(g_all - g_C)[:, None]).to(DOT))
    fence_async_shared()
    state = warpgroup_mma(k_CK.permute([1, 0]), fade_buffer, state_KV, is_async=True)
    if GATED:
        asked = scaled(warpgroup_mma_wait(1, [asked]), g_C, GATED)
    written = warpgroup_mma(scores_buffer, write_buffer, asked, is_async=True)
    if KEEP:
        tma.async_copy_shared_to_global(errors, at_o, v_CV)
    return state, written


@gluon.jit
def _leave(o, at_o, work, state, written, g_C, GATED: gl.constexpr, DOT: gl.constexpr):
    """Stores the next state and its chunk's decays for the products to come, and starts to store outputs; the state."""
    state_buffer, error_buffer, _, _, g_buffer = work
    # The last product still runs; but all warps must have read the old state.
    state_KV, written = warpgroup_mma_wait(1, [state, written])
    thread_barrier()
    state_buffer.store(state_KV.to(DOT))
    o_CV = warpgroup_mma_wait(0, [written])
    if GATED:
        g_buffer.store(g_C)
    error_buffer.store(o_CV.to(DOT))
    fence_async_shared()
    tma.async_copy_shared_to_global(o, at_o, error_buffer)
    return state_KV


@gluon.jit
def walk(
    sources, results, pointers, place, bounds, stages, work, bars, state_KV, length, heads,
    BK: gl.constexpr, BV: gl.constexpr, GROUPS: gl.constexpr, C: gl.constexpr, STAGES: gl.constexpr,
    GATED: gl.constexpr, KEEP: gl.constexpr, DOT: gl.constexpr,
):  # fmt: skip
    """Walks over the chunks of a segment; returns the state that leaves it."""
    o, errors, states = results
    beta, g = pointers
    n_first, n_last = bounds
    batch, head, _, chunk_0, e_start = place
    state_buffer, _, _, _, g_buffer = work
    i = gl.arange(0, C, gl.SliceLayout(1, sums_layout(BV, GROUPS)))
    none_CV = gl.zeros([C, BV], gl.float32, sums_layout(BV, GROUPS))
    none_CC = gl.zeros([C, C], gl.float32, sums_layout(C, GROUPS))
    for early in gl.static_range(STAGES - 1):
        _bring(bars, sources, stages, place, gl.minimum(n_first + early, n_last), early, BK, BV, C, STAGES)
    beta_C, g_C, g_all = factors_of(beta, g, n_first, i, length, heads, C, GATED)
    state_buffer.store(state_KV.to(DOT))
    if GATED:
        g_buffer.store(g_C)
    fence_async_shared()
    for n in range(n_first, n_last + 1):
        step, following, at_o = n - n_first, gl.minimum(n + 1, n_last), [batch, n * C, head, e_start]
        rows = at_stage(stages, step % STAGES)
        q_CK, k_CK, v_CV, h_CC = rows
        mbarrier.wait(bars.index(step % STAGES), step // STAGES % 2)
        read = warpgroup_mma(k_CK, state_buffer, none_CV, use_acc=False, is_async=True)
        scores = warpgroup_mma(q_CK, k_CK.permute([1, 0]), none_CC, use_acc=False, is_async=True)
        if KEEP:
            tma.store_wait(1)  # the errors of the chunk before, which left by way of its values
            tma.async_copy_shared_to_global(states, [chunk_0 + n, 0, e_start], state_buffer)
        _bring(
            bars, sources, stages, place, gl.minimum(n + STAGES - 1, n_last), step + STAGES - 1, BK, BV, C, STAGES
        )  # fmt: skip
        next_beta_C, next_g_C, next_g_all = factors_of(beta, g, following, i, length, heads, C, GATED)
        error_CV, asked = _errors(read, scores, q_CK, v_CV, h_CC, work, beta_C, g_C, C, BV, GROUPS, GATED, DOT)
        state, written = _write(
            errors, at_o, k_CK, v_CV, work, state_KV, error_CV, asked, beta_C, g_C, g_all, GATED, KEEP, DOT
        )  # fmt: skip
        beta_C, g_C, g_all = next_beta_C, next_g_C, next_g_all
        state_KV = _leave(o, at_o, work, state, written, g_C, GATED, DOT)
    steps = n_last - n_first + 1
    for late in gl.static_range(STAGES - 1):
        mbarrier.wait(bars.index((steps + late) % STAGES), (steps + late) // STAGES % 2)
    tma.store_wait(0)
    return state_KV


@entry(do_not_specialize=SIZES, gluon=True)
def forward_kernel(
    q, k, v, h, o, errors, states, beta, g, first, last,
    length: tl.int32, heads: tl.int32, group: tl.int32, segments: tl.int32, span: tl.int32,
    K: gl.constexpr, V: gl.constexpr, BK: gl.constexpr, BV: gl.constexpr, GROUPS: gl.constexpr, C: gl.constexpr,
    STAGES: gl.constexpr, GATED: gl.constexpr, FIRST: gl.constexpr, LAST: gl.constexpr, KEEP: gl.constexpr, DOT: gl.constexpr,
):  # fmt: skip
    """As `kernels.delta_triton.forward_kernel`, on descriptors of blocks of a chunk.

    Grid: (B * H * segments * value tiles,), of GROUPS warp groups. A segment is `span` chunks; `first` holds the states that
    enter them.
    """
    TILES: gl.constexpr = (V + BV - 1) // BV
    part, e_start, n_chunks = gl.program_id(0) // TILES, gl.program_id(0) % TILES * BV, (length + C - 1) // C
    head_index, order, n_first, n_last = place(part, segments, segments, span, n_chunks, False)
    batch, head, chunk_0 = head_index // heads, head_index % heads, head_index * n_chunks
    beta, g = beta + batch.to(gl.int64) * length * heads + head, g + chunk_0.to(gl.int64) * C
    rows, work = walk_buffers(BK, BV, C, STAGES, DOT)
    h_buffers = gl.allocate_shared_memory(DOT, [STAGES, C, C], shared_layout(C))
    layout: gl.constexpr = sums_layout(BV, GROUPS)
    state_KV = walk(
        (q, k, v, h), (o, errors, states), (beta, g), (batch, head, head // group, chunk_0, e_start), (n_first, n_last),
        (rows[0], rows[1], rows[2], h_buffers), work, barriers(STAGES),
        given_state(first, part, layout, e_start, V, K, BK, BV, FIRST), length, heads,
        BK, BV, GROUPS, C, STAGES, GATED, KEEP, DOT,
    )  # fmt: skip
    if LAST:
        offsets, inside = columns_of(layout, e_start, V, K, BK, BV)
        gl.store(last + head_index.to(gl.int64) * K * V + offsets, state_KV, mask=inside & (order == segments - 1))
