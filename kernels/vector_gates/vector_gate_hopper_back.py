"""The walk back with a decay per key channel for Hopper, in Gluon: `reverse_kernel` of `kernels.vector_gates.vector_gate_walk`.

The gradient of the state stays in registers. The chain of a chunk's products is W dS_m, with the delta rule H^T beta dU and
K'^T dV; P^T dO runs before it and Q'^T dO beside it.

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
from kernels.delta_rule.delta_hopper import at_stage, barriers, place, sums_layout, thread_barrier
from kernels.vector_gates.vector_gate_hopper import (
    arrived,
    beta_of,
    bring,
    factors_of,
    sources_of,
    stage_buffers,
    start_of,
    store_end,
    work_buffers,
)
from kernels.vector_gates.vector_gate_rows import SIZES


@gluon.jit
def _through_erasure(
    du, grad, error_CV, erase_CK, h_CC, beta_C, error_buffer, out_buffer, dv, at_o, dbeta, t_C, length, heads,
    OUT: gl.constexpr, DOT: gl.constexpr,
):  # fmt: skip
    """Starts to take what the erasure has read from the gradient of the state, which runs, and to store dV; writes dbeta."""
    du_CV, grad = warpgroup_mma_wait(1, [du, grad])
    if OUT:
        tma.store_wait(1)  # the gradients of the values of the chunk before
    error_buffer.store((du_CV * -beta_C[:, None]).to(DOT))
    fence_async_shared()
    z = warpgroup_mma(h_CC.permute([1, 0]), error_buffer, du_CV, is_async=True)
    z_CV, grad = warpgroup_mma_wait(0, [z, grad])
    dv_CV = z_CV * beta_C[:, None]
    thread_barrier()  # all warps must have read what is written again
    error_buffer.store((-dv_CV).to(DOT))
    if OUT:
        out_buffer.store(dv_CV.to(DOT))
    fence_async_shared()
    grad = warpgroup_mma(erase_CK.permute([1, 0]), error_buffer, grad, is_async=True)
    if OUT:
        tma.async_copy_shared_to_global(dv, at_o, out_buffer)
        gl.store(dbeta + t_C.to(gl.int64) * heads, gl.sum(z_CV * error_CV.to(gl.float32), 1), mask=t_C < length)
    return grad


@gluon.jit
def _errors(errors, t_C, e, length, heads, none_CV, V: gl.constexpr, OUT: gl.constexpr):
    """E of a chunk, for the gradients of beta."""
    error_CV = none_CV
    if OUT:
        inside = (t_C < length)[:, None] & (e < V)[None, :]
        error_CV = gl.load(errors + t_C.to(gl.int64)[:, None] * heads * V + e[None, :], mask=inside, other=0.0)
    return error_CV


@gluon.jit
def _store_rows(du, grad, out_buffer, dv, at_o, DOT: gl.constexpr):
    """Without the delta rule: starts to store dV, which runs; the gradient of the state runs on."""
    dv_CV, grad = warpgroup_mma_wait(1, [du, grad])
    tma.store_wait(1)  # the gradients of the values of the chunk before
    out_buffer.store(dv_CV.to(DOT))
    fence_async_shared()
    tma.async_copy_shared_to_global(dv, at_o, out_buffer)
    return grad


@entry(do_not_specialize=SIZES, gluon=True)
def reverse_kernel(
    reads, writes, erases, scores, couplings, do, dv, dstates, errors, factors, beta, dlast, dbeta, dfirst,
    length: tl.int32, batches: tl.int32, heads: tl.int32, segments: tl.int32, per: tl.int32,
    K: gl.constexpr, V: gl.constexpr, KP: gl.constexpr, BV: gl.constexpr, GROUPS: gl.constexpr, C: gl.constexpr,
    STAGES: gl.constexpr, DELTA: gl.constexpr, FIRST: gl.constexpr, DLAST: gl.constexpr, OUT: gl.constexpr, DOT: gl.constexpr,
):  # fmt: skip
    """As `kernels.vector_gates.vector_gate_walk.reverse_kernel`, on descriptors of blocks of a chunk; segments as in `walk_kernel`.

    Grid: (B * H * segments * value tiles,), of GROUPS warp groups. Segments are counted from the end; `dlast` has the gradient of
    the state that leaves each.
    """
    TILES: gl.constexpr = (V + BV - 1) // BV + (0 if OUT else (K + BV - 1) // BV)
    part, tile, chunks = gl.program_id(0) // TILES, gl.program_id(0) % TILES, (length + C - 1) // C
    head_index, order, n_first, n_last = place(part, segments if OUT else segments - 1, segments, per, chunks, True)
    e_start, batch, head, chunk_0 = tile * BV, head_index // heads, head_index % heads, head_index * chunks
    at, row = (batch, head, chunk_0, e_start), batch.to(gl.int64) * length * heads + head
    beta, dbeta, errors = beta + row, dbeta + (tile.to(gl.int64) * batches * length * heads + row), errors + row * V
    factors += chunk_0.to(gl.int64) * 2 * KP
    sources = sources_of(writes, do, reads, scores, erases, couplings, DELTA, True)
    stages = stage_buffers(KP, BV, C, STAGES, DELTA, True, DOT)
    grad_buffer, out_buffer, error_buffer = work_buffers(KP, BV, C, DELTA, DOT)
    bars = barriers(STAGES)
    layout: gl.constexpr = sums_layout(BV, GROUPS)
    i, d = gl.arange(0, C, gl.SliceLayout(1, layout)), gl.arange(0, KP, gl.SliceLayout(1, layout))
    e = e_start + gl.arange(0, BV, gl.SliceLayout(0, layout))
    none_CV = gl.zeros([C, BV], gl.float32, layout)
    for early in gl.static_range(STAGES - 1):
        bring(bars, sources, stages, at, gl.maximum(n_last - early, n_first), early, KP, BV, C, STAGES)
    enter_K, carry_K, leave_K = factors_of(factors, n_last, d, KP)
    grad_KV = start_of(dlast, part, head_index, order, e_start, K, V, KP, BV, GROUPS, DLAST, OUT) * leave_K[:, None]
    grad_buffer.store(grad_KV.to(DOT))
    fence_async_shared()
    steps = n_last - n_first + 1
    for step in range(0, steps):
        n, rows = n_last - step, at_stage(stages, step % STAGES)
        mbarrier.wait(bars.index(step % STAGES), step // STAGES % 2)
        du = warpgroup_mma(rows[3].permute([1, 0]), rows[1], none_CV, use_acc=False, is_async=True)
        du = warpgroup_mma(rows[0], grad_buffer, du, is_async=True)
        grad = warpgroup_mma(rows[2].permute([1, 0]), rows[1], grad_KV * carry_K[:, None], is_async=True)
        if OUT:
            tma.async_copy_shared_to_global(dstates, [chunk_0 + n, 0, e_start], grad_buffer)
        bring(bars, sources, stages, at, gl.maximum(n - STAGES + 1, n_first), step + STAGES - 1, KP, BV, C, STAGES)
        next_enter_K, next_carry_K, next_leave_K = factors_of(factors, gl.maximum(n - 1, n_first), d, KP)
        if DELTA:
            grad = _through_erasure(
                du, grad, _errors(errors, n * C + i, e, length, heads, none_CV, V, OUT), rows[4], rows[5],
                beta_of(beta, n, i, length, heads, C), error_buffer, out_buffer, dv, [batch, n * C, head, e_start],
                dbeta, n * C + i, length, heads, OUT, DOT,
            )  # fmt: skip
        else:
            grad = _store_rows(du, grad, out_buffer, dv, [batch, n * C, head, e_start], DOT)
        if OUT:
            tma.store_wait(1)  # the gradient of the state
        # One factor after the other: their product may be below all numbers.
        grad_KV = warpgroup_mma_wait(0, [grad]) * enter_K[:, None] * gl.where(n > n_first, next_leave_K, 1.0)[:, None]
        thread_barrier()  # all warps must have read the old one
        grad_buffer.store(grad_KV.to(DOT))
        fence_async_shared()
        enter_K, carry_K = next_enter_K, next_carry_K
    arrived(bars, steps, STAGES - 1, STAGES)
    tma.store_wait(0)
    store_end(dfirst, grad_KV, part, head_index, order == segments - 1, e_start, K, V, KP, BV, GROUPS, TILES, FIRST, OUT)
