"""The forward walk with a decay per key channel and the delta rule for Hopper, in Gluon: `walk_kernel` of `kernels.vector_gate_walk`.

Rows of the next chunk are on their way while one is computed. The chain of a chunk's products is K' S_m, H beta R, the next
state; Q' S_m runs while R is subtracted and stored, P U while the next state is. See `kernels.delta_hopper` for the barriers.

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

from kernels.delta_hopper import barriers, columns_of, fetch, given_state, shared_layout, sums_layout, thread_barrier
from kernels.delta_hopper_walk import at_stage
from kernels.vector_gate_rows import SIZES


@gluon.jit
def buffers(KP: gl.constexpr, BV: gl.constexpr, C: gl.constexpr, STAGES: gl.constexpr, DELTA: gl.constexpr, DOT: gl.constexpr):
    """Shared memory of a walk: Q', W, P and values, and K' and H, of each stage; the state, and matrices like values."""
    reads = gl.allocate_shared_memory(DOT, [STAGES, C, KP], shared_layout(KP))
    writes = gl.allocate_shared_memory(DOT, [STAGES, C, KP], shared_layout(KP))
    scores = gl.allocate_shared_memory(DOT, [STAGES, C, C], shared_layout(C))
    values = gl.allocate_shared_memory(DOT, [STAGES, C, BV], shared_layout(BV))
    state_buffer = gl.allocate_shared_memory(DOT, [KP, BV], shared_layout(BV))
    out_buffer = gl.allocate_shared_memory(DOT, [C, BV], shared_layout(BV))
    stages, work = (reads, writes, scores, values), (state_buffer, out_buffer)
    if DELTA:
        erases = gl.allocate_shared_memory(DOT, [STAGES, C, KP], shared_layout(KP))
        couplings = gl.allocate_shared_memory(DOT, [STAGES, C, C], shared_layout(C))
        error_buffer = gl.allocate_shared_memory(DOT, [C, BV], shared_layout(BV))
        stages, work = (reads, writes, scores, values, erases, couplings), (state_buffer, out_buffer, error_buffer)
    return stages, work


@gluon.jit
def _bring(
    bars, sources, stages, place, n, step,
    KP: gl.constexpr, BV: gl.constexpr, C: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Starts to copy what a chunk needs into its stage."""
    BYTES: gl.constexpr = 2 * C * ((len(stages) // 2) * KP + (len(stages) // 2 - 1) * C + BV)
    batch, head, chunk_0, e_start = place
    block = [chunk_0 + n, 0, 0]
    places = (block, block, block, [batch, n * C, head, e_start], block, block)
    fetch(bars.index(step % STAGES), BYTES, sources, places, at_stage(stages, step % STAGES))


@gluon.jit
def _factors(factors, block, d, KP: gl.constexpr):
    """Enter, carry and leave; see `kernels.vector_gate_middle.load_factors`."""
    first_K, second_K = gl.load(factors + block * 2 * KP + d), gl.load(factors + block * 2 * KP + KP + d)
    is_rough = first_K < 0
    return gl.where(is_rough, 1.0, first_K), gl.where(is_rough, second_K, 1.0), gl.where(is_rough, 1.0, second_K)


@gluon.jit
def _beta(beta, n, i, length, heads, C: gl.constexpr):
    t_C = n * C + i
    return gl.load(beta + t_C.to(gl.int64) * heads, mask=t_C < length, other=0.0).to(gl.float32)


@gluon.jit(do_not_specialize=SIZES)
def walk_kernel(
    reads, writes, erases, scores, couplings, v, o, errors, states, factors, beta, first, last,
    length: tl.int32, heads: tl.int32,
    K: gl.constexpr, V: gl.constexpr, KP: gl.constexpr, BV: gl.constexpr, GROUPS: gl.constexpr, C: gl.constexpr,
    STAGES: gl.constexpr, DELTA: gl.constexpr, FIRST: gl.constexpr, LAST: gl.constexpr, KEEP: gl.constexpr, DOT: gl.constexpr,
):  # fmt: skip
    """As `kernels.vector_gate_walk.walk_kernel`, on descriptors of blocks of a chunk.

    Grid: (B * H * value tiles,), of GROUPS warp groups.
    """
    TILES: gl.constexpr = (V + BV - 1) // BV
    head_index, e_start, chunks = gl.program_id(0) // TILES, gl.program_id(0) % TILES * BV, (length + C - 1) // C
    batch, head, chunk_0 = head_index // heads, head_index % heads, head_index * chunks
    sources, at = (reads, writes, scores, v), (batch, head, chunk_0, e_start)
    if DELTA:
        sources = (reads, writes, scores, v, erases, couplings)
    beta += batch.to(gl.int64) * length * heads + head
    factors += chunk_0.to(gl.int64) * 2 * KP
    stages, work = buffers(KP, BV, C, STAGES, DELTA, DOT)
    state_buffer, out_buffer = work[0], work[1]
    bars = barriers(STAGES)
    layout: gl.constexpr = sums_layout(BV, GROUPS)
    i, d = gl.arange(0, C, gl.SliceLayout(1, layout)), gl.arange(0, KP, gl.SliceLayout(1, layout))
    none_CV = gl.zeros([C, BV], gl.float32, layout)
    for early in gl.static_range(STAGES - 1):
        _bring(bars, sources, stages, at, gl.minimum(early, chunks - 1), early, KP, BV, C, STAGES)
    enter_K, carry_K, leave_K = _factors(factors, 0, d, KP)
    state_KV = given_state(first, head_index, layout, e_start, V, K, KP, BV, FIRST) * enter_K[:, None]
    state_buffer.store(state_KV.to(DOT))
    fence_async_shared()
    for n in range(0, chunks):
        following, at_o = gl.minimum(n + 1, chunks - 1), [batch, n * C, head, e_start]
        rows = at_stage(stages, n % STAGES)
        read_CK, write_CK, score_CC, v_CV = rows[0], rows[1], rows[2], rows[3]
        mbarrier.wait(bars.index(n % STAGES), n // STAGES % 2)
        if DELTA:
            erased = warpgroup_mma(rows[4], state_buffer, none_CV, use_acc=False, is_async=True)
        asked = warpgroup_mma(read_CK, state_buffer, none_CV, use_acc=False, is_async=True)
        if KEEP:
            if DELTA:
                tma.store_wait(1)  # the errors of the chunk before, which left by way of its values
            tma.async_copy_shared_to_global(states, [chunk_0 + n, 0, e_start], state_buffer)
        _bring(bars, sources, stages, at, gl.minimum(n + STAGES - 1, chunks - 1), n + STAGES - 1, KP, BV, C, STAGES)
        next_enter_K, next_carry_K, next_leave_K = _factors(factors, following, d, KP)
        if DELTA:
            error_buffer = work[2]
            beta_C = _beta(beta, n, i, length, heads, C)
            value_CV = v_CV.load(layout).to(gl.float32)
            erased_CV, asked = warpgroup_mma_wait(1, [erased, asked])
            error_CV = value_CV - erased_CV
            tma.store_wait(0)
            error_buffer.store((error_CV * -beta_C[:, None]).to(DOT))
            fence_async_shared()
            error = warpgroup_mma(rows[5], error_buffer, error_CV, is_async=True)
            state_KV = state_KV * carry_K[:, None]
            error_CV, asked = warpgroup_mma_wait(0, [error, asked])
            out_buffer.store((error_CV * beta_C[:, None]).to(DOT))
            if KEEP:
                v_CV.store(error_CV.to(DOT))
            fence_async_shared()
            state = warpgroup_mma(write_CK.permute([1, 0]), out_buffer, state_KV, is_async=True)
            written = warpgroup_mma(score_CC, out_buffer, asked, is_async=True)
            if KEEP:
                tma.async_copy_shared_to_global(errors, at_o, v_CV)
        else:
            state = warpgroup_mma(write_CK.permute([1, 0]), v_CV, state_KV * carry_K[:, None], is_async=True)
            written = warpgroup_mma(score_CC, v_CV, asked, is_async=True)
        fade_K = leave_K * gl.where(n + 1 < chunks, next_enter_K, 1.0)
        state_KV, written = warpgroup_mma_wait(1, [state, written])
        state_KV = state_KV * fade_K[:, None]
        if not DELTA:
            tma.store_wait(0)
        thread_barrier()  # all warps must have read the old state
        state_buffer.store(state_KV.to(DOT))
        o_CV = warpgroup_mma_wait(0, [written])
        leaving = work[len(work) - 1]
        leaving.store(o_CV.to(DOT))
        fence_async_shared()
        tma.async_copy_shared_to_global(o, at_o, leaving)
        carry_K, leave_K = next_carry_K, next_leave_K
    for late in gl.static_range(STAGES - 1):
        mbarrier.wait(bars.index((chunks + late) % STAGES), (chunks + late) // STAGES % 2)
    tma.store_wait(0)
    if LAST:
        offsets, inside = columns_of(layout, e_start, V, K, KP, BV)
        gl.store(last + head_index.to(gl.int64) * K * V + offsets, state_KV, mask=inside)


@gluon.jit(do_not_specialize=SIZES)
def reverse_kernel(
    reads, writes, erases, scores, couplings, do, dv, dstates, errors, factors, beta, dlast, dbeta, dfirst,
    length: tl.int32, batches: tl.int32, heads: tl.int32,
    K: gl.constexpr, V: gl.constexpr, KP: gl.constexpr, BV: gl.constexpr, GROUPS: gl.constexpr, C: gl.constexpr,
    STAGES: gl.constexpr, DELTA: gl.constexpr, FIRST: gl.constexpr, DLAST: gl.constexpr, DOT: gl.constexpr,
):  # fmt: skip
    """As `kernels.vector_gate_walk.reverse_kernel`, on descriptors of blocks of a chunk.

    Grid: (B * H * value tiles,), of GROUPS warp groups.
    """
    TILES: gl.constexpr = (V + BV - 1) // BV
    head_index, tile, chunks = gl.program_id(0) // TILES, gl.program_id(0) % TILES, (length + C - 1) // C
    e_start = tile * BV
    batch, head, chunk_0 = head_index // heads, head_index % heads, head_index * chunks
    sources, at = (reads, writes, scores, do), (batch, head, chunk_0, e_start)
    if DELTA:
        sources = (reads, writes, scores, do, erases, couplings)
    row = batch.to(gl.int64) * length * heads + head
    beta += row
    dbeta += tile.to(gl.int64) * batches * length * heads + row
    errors += row * V
    factors += chunk_0.to(gl.int64) * 2 * KP
    stages, work = buffers(KP, BV, C, STAGES, DELTA, DOT)
    grad_buffer, out_buffer = work[0], work[1]
    bars = barriers(STAGES)
    layout: gl.constexpr = sums_layout(BV, GROUPS)
    i, d = gl.arange(0, C, gl.SliceLayout(1, layout)), gl.arange(0, KP, gl.SliceLayout(1, layout))
    e = e_start + gl.arange(0, BV, gl.SliceLayout(0, layout))
    none_CV = gl.zeros([C, BV], gl.float32, layout)
    for early in gl.static_range(STAGES - 1):
        _bring(bars, sources, stages, at, gl.maximum(chunks - 1 - early, 0), early, KP, BV, C, STAGES)
    enter_K, carry_K, leave_K = _factors(factors, chunks - 1, d, KP)
    grad_KV = given_state(dlast, head_index, layout, e_start, V, K, KP, BV, DLAST) * leave_K[:, None]
    grad_buffer.store(grad_KV.to(DOT))
    fence_async_shared()
    for step in range(0, chunks):
        n = chunks - 1 - step
        following = gl.maximum(n - 1, 0)
        rows = at_stage(stages, step % STAGES)
        read_CK, write_CK, score_CC, do_CV = rows[0], rows[1], rows[2], rows[3]
        mbarrier.wait(bars.index(step % STAGES), step // STAGES % 2)
        du = warpgroup_mma(score_CC.permute([1, 0]), do_CV, none_CV, use_acc=False, is_async=True)
        du = warpgroup_mma(write_CK, grad_buffer, du, is_async=True)
        grad = warpgroup_mma(read_CK.permute([1, 0]), do_CV, grad_KV * carry_K[:, None], is_async=True)
        tma.async_copy_shared_to_global(dstates, [chunk_0 + n, 0, e_start], grad_buffer)
        _bring(bars, sources, stages, at, gl.maximum(n - STAGES + 1, 0), step + STAGES - 1, KP, BV, C, STAGES)
        next_enter_K, next_carry_K, next_leave_K = _factors(factors, following, d, KP)
        if DELTA:
            error_buffer = work[2]
            beta_C = _beta(beta, n, i, length, heads, C)
            t_C = n * C + i
            inside = (t_C < length)[:, None] & (e < V)[None, :]
            error_CV = gl.load(errors + t_C.to(gl.int64)[:, None] * heads * V + e[None, :], mask=inside, other=0.0)
            du_CV, grad = warpgroup_mma_wait(1, [du, grad])
            tma.store_wait(1)  # the gradients of the chunk before's values
            error_buffer.store((du_CV * -beta_C[:, None]).to(DOT))
            fence_async_shared()
            z = warpgroup_mma(rows[5].permute([1, 0]), error_buffer, du_CV, is_async=True)
            z_CV, grad = warpgroup_mma_wait(0, [z, grad])
            dv_CV = z_CV * beta_C[:, None]
            thread_barrier()  # all warps must have read what is written again
            error_buffer.store((-dv_CV).to(DOT))
            out_buffer.store(dv_CV.to(DOT))
            fence_async_shared()
            grad = warpgroup_mma(rows[4].permute([1, 0]), error_buffer, grad, is_async=True)
            tma.async_copy_shared_to_global(dv, [batch, n * C, head, e_start], out_buffer)
            gl.store(dbeta + t_C.to(gl.int64) * heads, gl.sum(z_CV * error_CV.to(gl.float32), 1), mask=t_C < length)
        else:
            dv_CV, grad = warpgroup_mma_wait(1, [du, grad])
            tma.store_wait(1)
            out_buffer.store(dv_CV.to(DOT))
            fence_async_shared()
            tma.async_copy_shared_to_global(dv, [batch, n * C, head, e_start], out_buffer)
        fade_K = enter_K * gl.where(n > 0, next_leave_K, 1.0)
        tma.store_wait(1)  # the gradient of the state
        grad_KV = warpgroup_mma_wait(0, [grad]) * fade_K[:, None]
        thread_barrier()
        grad_buffer.store(grad_KV.to(DOT))
        fence_async_shared()
        enter_K, carry_K = next_enter_K, next_carry_K
    for late in gl.static_range(STAGES - 1):
        mbarrier.wait(bars.index((chunks + late) % STAGES), (chunks + late) // STAGES % 2)
    tma.store_wait(0)
    if FIRST:
        offsets, inside = columns_of(layout, e_start, V, K, KP, BV)
        gl.store(dfirst + head_index.to(gl.int64) * K * V + offsets, grad_KV, mask=inside)
