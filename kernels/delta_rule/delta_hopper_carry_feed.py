"""The partition that brings rows and makes factors of tokens for the walks of `delta_hopper_carry`, and their shared memory.

Shape legend: T time, H heads, N chunks, C = 64 tokens of a chunk, K key, V value width.
"""

from __future__ import annotations

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from kernels.delta_rule.delta_hopper import barriers, factors_of, fetch, shared_layout, thread_barrier, turned_layout
from kernels.delta_rule.delta_hopper_beside import decays_seen, line_layout

UNITS = tl.constexpr(2)


@gluon.jit
def carry_buffers(
    BK: gl.constexpr, C: gl.constexpr, STAGES: gl.constexpr, TILES: gl.constexpr, REVERSE: gl.constexpr, DOT: gl.constexpr
):
    """Shared memory: keys, values, H and queries of each stage with barriers; scores and factors of two chunks; barriers."""
    line: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    k_buffers = gl.allocate_shared_memory(DOT, [STAGES, C, BK], shared_layout(BK))
    v_buffers = gl.allocate_shared_memory(DOT, [STAGES * TILES, C, 64], shared_layout(64))
    h_buffers = gl.allocate_shared_memory(DOT, [STAGES, C, C], shared_layout(C))
    q_buffers, p_buffers = k_buffers, h_buffers
    if REVERSE:
        q_buffers = gl.allocate_shared_memory(DOT, [STAGES, C, BK], shared_layout(BK))
        p_buffers = gl.allocate_shared_memory(DOT, [2, C, C], shared_layout(C))
    beta_buffers = gl.allocate_shared_memory(gl.float32, [2, C], line)
    since_buffers = gl.allocate_shared_memory(gl.float32, [2, C], line)
    until_buffers = gl.allocate_shared_memory(gl.float32, [2, C], line)
    whole_buffers = gl.allocate_shared_memory(gl.float32, [2, C], line)
    g_buffer = gl.allocate_shared_memory(gl.float32, [C], line)
    made = (h_buffers, p_buffers, beta_buffers, since_buffers, until_buffers, whole_buffers, g_buffer)
    return (k_buffers, v_buffers, q_buffers), made, (barriers(STAGES), barriers(2), barriers(2, UNITS))


@gluon.jit
def _chunk_of(bounds, step, REVERSE: gl.constexpr):
    """The chunk of a step of the walk."""
    n = bounds[0] + step
    if REVERSE:
        n = bounds[1] - step
    return n


@gluon.jit
def _bring(
    sources, rows, made, bars, where, n, step,
    BK: gl.constexpr, C: gl.constexpr, STAGES: gl.constexpr, TILES: gl.constexpr, REVERSE: gl.constexpr,
):  # fmt: skip
    """Starts to copy what a chunk needs: keys and H, and for C values, or queries and gradients of outputs."""
    k, h, v, q = sources
    batch, head, shared_head, chunk_0, writes = where
    stage, at_k = step % STAGES, [batch, n * C, shared_head, 0]
    places = (at_k, [chunk_0 + n, 0, 0])
    views = (rows[0].index(stage), made[0].index(stage))
    if writes:
        names = (k, h)
        of_values = ()
        at_values = ()
        for tile in gl.static_range(TILES):
            names = names + (v,)
            at_values = at_values + ([batch, n * C, head, tile * 64],)
            of_values = of_values + (rows[1].index(stage * TILES + tile),)
        BYTES: gl.constexpr = 2 * C * (BK + C + 64 * TILES)
        if REVERSE:
            names = names + (q,)
            at_values = at_values + (at_k,)
            of_values = of_values + (rows[2].index(stage),)
        fetch(bars[0].index(stage), BYTES + 2 * C * BK * REVERSE, names, places + at_values, views + of_values)
    else:
        fetch(bars[0].index(stage), 2 * C * (BK + C), (k, h), places, views)


@gluon.jit
def feed(
    sources, pointers, where, bounds, rows, made, bars, length, heads,
    BK: gl.constexpr, C: gl.constexpr, STAGES: gl.constexpr, TILES: gl.constexpr, REVERSE: gl.constexpr, GATED: gl.constexpr,
    DOT: gl.constexpr,
):  # fmt: skip
    """The partition that brings rows and makes factors of tokens; for gradients, scores of queries and keys too."""
    square: gl.constexpr = turned_layout(C)
    line = gl.arange(0, C, line_layout())
    none_CC = gl.zeros([C, C], gl.float32, square)
    steps = bounds[1] - bounds[0] + 1
    for early in gl.static_range(STAGES):
        if early < steps:
            _bring(sources, rows, made, bars, where, _chunk_of(bounds, early, REVERSE), early, BK, C, STAGES, TILES, REVERSE)
    beta_C, g_C, g_all = factors_of(pointers[0], pointers[1], _chunk_of(bounds, 0, REVERSE), line, length, heads, C, GATED)
    for step in range(steps):
        part, then = step % 2, step - 2 + STAGES
        mbarrier.wait(bars[2].index(part), (step // 2 + 1) % 2)
        if (step >= 2) & (then < steps):
            _bring(sources, rows, made, bars, where, _chunk_of(bounds, then, REVERSE), then, BK, C, STAGES, TILES, REVERSE)
        made[2].index(part).store(beta_C)
        if GATED:
            made[3].index(part).store(gl.exp2(g_C))
            until_C = gl.exp2(g_all - g_C)
            if not REVERSE:
                until_C = until_C * beta_C
            made[4].index(part).store(until_C)
            made[5].index(part).store(gl.zeros([C], gl.float32, line_layout()) + gl.exp2(g_all))
        if REVERSE:  # noqa: SIM102
            if where[4]:
                mbarrier.wait(bars[0].index(step % STAGES), step // STAGES % 2)
                k_CK = rows[0].index(step % STAGES)
                scores = warpgroup_mma(rows[2].index(step % STAGES), k_CK.permute([1, 0]), none_CC, use_acc=False, is_async=True)
                if GATED:
                    made[6].store(g_C)
                fall = decays_seen(made[6], C, GATED)
                scores_CC = warpgroup_mma_wait(0, [scores])
                made[1].index(part).store((scores_CC * fall).to(DOT))
                fence_async_shared()
        following = _chunk_of(bounds, gl.minimum(step + 1, steps - 1), REVERSE)
        beta_C, g_C, g_all = factors_of(pointers[0], pointers[1], following, line, length, heads, C, GATED)
        thread_barrier()
        mbarrier.arrive(bars[1].index(part), count=1)
