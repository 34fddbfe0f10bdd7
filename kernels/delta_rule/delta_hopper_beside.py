"""Beside a walk of the delta rule for Hopper, in Gluon: a partition that brings rows, and makes scores and factors of tokens.

What of a chunk does not depend on the state reaches the walks in shared memory, two chunks at most ahead of them, made from the
queries and keys that are there for the walks: here the scores of queries and keys, masked and decayed, betas and decays of
tokens; in `kernels.delta_rule.delta_hopper_solve` the couplings H.

Shape legend: B batch, T time, H heads, N chunks, C = 64 tokens of a chunk, K key, V value width, S = 16 tokens of a block.
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
from triton.language.extra.cuda import gdc_wait

from kernels.delta_rule.delta_hopper import barriers, factors_of, fetch, shared_layout, thread_barrier, turned_layout
from kernels.walks.walk_triton import LOG2_E

S = tl.constexpr(16)


@gluon.constexpr_function
def line_layout():
    """One element of a vector for each thread of the four warps, or for two of them."""
    return gl.BlockedLayout([1], [32], [4], [0])


@gluon.constexpr_function
def scan_layout():
    """A vector of a chunk in each of the four warps."""
    return gl.BlockedLayout([2], [32], [4], [0])


@gluon.jit
def rows_buffers(
    BK: gl.constexpr, C: gl.constexpr, STAGES: gl.constexpr, DEPTH: gl.constexpr, WALKS: gl.constexpr, DOT: gl.constexpr
):  # fmt: skip
    """Shared memory for queries and keys of STAGES chunks and 64 values of DEPTH chunks for each walk; barriers of their copies."""
    q_buffers = gl.allocate_shared_memory(DOT, [STAGES, C, BK], shared_layout(BK))
    k_buffers = gl.allocate_shared_memory(DOT, [STAGES, C, BK], shared_layout(BK))
    v_buffers = gl.allocate_shared_memory(DOT, [DEPTH * WALKS, C, 64], shared_layout(64))
    return (q_buffers, k_buffers), v_buffers, (barriers(STAGES), barriers(DEPTH))


@gluon.jit
def beside_buffers(
    C: gl.constexpr, WALKS: gl.constexpr, SOLVERS: gl.constexpr, MAKERS: gl.constexpr, HELD: gl.constexpr, DOT: gl.constexpr,
    MERGE: gl.constexpr,
):  # fmt: skip
    """Shared memory of what is made, of two chunks each, but of HELD chunks' H; of what only those see who make it; barriers.

    Made are H and scores; beta; decays since the chunk began, until it ends (times beta without SOLVERS), and (for each row of a
    transposed state) of all of it. The barriers say that all of MAKERS partitions are ready, and what is free again. Without
    SOLVERS H comes from memory.
    """
    line: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    h_buffers = gl.allocate_shared_memory(DOT, [HELD, C, C], shared_layout(C))
    p_buffers = gl.allocate_shared_memory(DOT, [2, C, C], shared_layout(C))
    beta_buffers = gl.allocate_shared_memory(gl.float32, [2, C], line)
    since_buffers = gl.allocate_shared_memory(gl.float32, [2, C], line)
    until_buffers = gl.allocate_shared_memory(gl.float32, [2, C], line)
    whole_buffers = gl.allocate_shared_memory(gl.float32, [2, C], line)
    x_buffers, own_buffers = h_buffers, h_buffers
    if SOLVERS > 0:
        x_buffers = gl.allocate_shared_memory(MERGE, [SOLVERS, C, C], gl.SwizzledSharedLayout(8, 1, 8, [1, 0]))
        own_buffers = gl.allocate_shared_memory(MERGE, [SOLVERS, C, S], gl.SwizzledSharedLayout(8, 4, 2, [1, 0]))
    lines = gl.allocate_shared_memory(gl.float32, [2 * SOLVERS + 1, C], line)
    made = (h_buffers, p_buffers, beta_buffers, since_buffers, until_buffers, whole_buffers)
    return made, (x_buffers, own_buffers, lines), (barriers(2, MAKERS), barriers(2, WALKS))


@gluon.jit
def _bring_keys(sources, rows, place, n, step, BK: gl.constexpr, C: gl.constexpr, STAGES: gl.constexpr):
    """Starts to copy queries and keys of a chunk."""
    batch, _, shared_head, _ = place
    at, stage = [batch, n * C, shared_head, 0], step % STAGES
    views = (rows[0][0].index(stage), rows[0][1].index(stage))
    fetch(rows[2][0].index(stage), 4 * C * BK, (sources[0], sources[1]), (at, at), views)


@gluon.jit
def _bring_values(
    sources, h, rows, place, chunk_0, h_buffers, n, step,
    C: gl.constexpr, DEPTH: gl.constexpr, WALKS: gl.constexpr, SOLVERS: gl.constexpr,
):  # fmt: skip
    """Starts to copy the values of a chunk, and H if nobody makes it."""
    batch, head, _, e_start = place
    values = ()
    places = ()
    views = ()
    for walk in gl.static_range(WALKS):
        values = values + (sources[2],)
        places = places + ([batch, n * C, head, e_start + walk * 64],)
        views = views + (rows[1].index(step % DEPTH * WALKS + walk),)
    if SOLVERS == 0:
        values = values + (h,)
        places = places + ([chunk_0 + n, 0, 0],)
        views = views + (h_buffers.index(step % DEPTH),)
        fetch(rows[2][1].index(step % DEPTH), 2 * C * (64 * WALKS + C), values, places, views)
    else:
        fetch(rows[2][1].index(step % DEPTH), 2 * C * 64 * WALKS, values, places, views)


@gluon.jit
def vectors(beta, gate, gate_t, n, length, heads, C: gl.constexpr, GATED: gl.constexpr):
    """Betas and log2 decays of a chunk's tokens, zero beyond the end."""
    t_C = n * C + gl.arange(0, C, line_layout())
    beta_C = gl.load(beta + t_C.to(gl.int64) * heads, mask=t_C < length, other=0.0).to(gl.float32)
    step_C = beta_C
    if GATED:
        t_C = n * C + gl.arange(0, C, scan_layout())
        step_C = gl.load(gate + t_C.to(gl.int64) * gate_t, mask=t_C < length, other=0.0).to(gl.float32) * LOG2_E
    return beta_C, step_C


@gluon.jit
def add(a, b):
    """Their sum, for scans."""
    return a + b


@gluon.jit
def seen_by(C: gl.constexpr):
    """Which tokens (columns) a token sees, in words whose compile-time bits leave a thread eleven different ones of 32."""
    square: gl.constexpr = turned_layout(C)
    i, j = gl.arange(0, C, gl.SliceLayout(1, square))[:, None], gl.arange(0, C, gl.SliceLayout(0, square))[None, :]
    half_i, half_j = i // 8 % 2, j // 8 % 2
    inside = (half_j < half_i) | ((half_j == half_i) & (j % 8 <= i % 8))
    return (j // S < i // S) | ((j // S == i // S) & inside)


@gluon.jit
def falls(g_buffer, C: gl.constexpr):
    """The log2 decays from one token to another, with the other sign from later to earlier."""
    square: gl.constexpr = turned_layout(C)
    return g_buffer.load(gl.SliceLayout(1, square))[:, None] - g_buffer.load(gl.SliceLayout(0, square))[None, :]


@gluon.jit
def cumulated(step_C, g_buffer):
    """Log2 decays cumulated from the start of the chunk, also in shared memory."""
    g_C = gl.associative_scan(step_C, 0, add)
    g_buffer.store(g_C)
    return g_C


@gluon.jit
def bring_first(
    sources, h, rows, place, bounds, chunk_0, h_buffers,
    BK: gl.constexpr, C: gl.constexpr, STAGES: gl.constexpr, DEPTH: gl.constexpr, WALKS: gl.constexpr, SOLVERS: gl.constexpr,
):  # fmt: skip
    """Starts to copy as many chunks as there is room for."""
    for early in gl.static_range(STAGES):
        if bounds[0] + early <= bounds[1]:
            _bring_keys(sources, rows, place, bounds[0] + early, early, BK, C, STAGES)
    if SOLVERS == 0:
        gdc_wait()
    for early in gl.static_range(DEPTH):
        if bounds[0] + early <= bounds[1]:
            _bring_values(sources, h, rows, place, chunk_0, h_buffers, bounds[0] + early, early, C, DEPTH, WALKS, SOLVERS)


@gluon.jit
def bring_next(
    sources, h, rows, place, bounds, chunk_0, h_buffers, step,
    BK: gl.constexpr, C: gl.constexpr, STAGES: gl.constexpr, DEPTH: gl.constexpr, WALKS: gl.constexpr, SOLVERS: gl.constexpr,
):  # fmt: skip
    """Starts to copy the next chunks into the place of the last but one, with which the walks are done."""
    if step >= 2:
        value_step, key_step = step - 2 + DEPTH, step - 2 + STAGES
        if bounds[0] + value_step <= bounds[1]:
            n = bounds[0] + value_step
            _bring_values(sources, h, rows, place, chunk_0, h_buffers, n, value_step, C, DEPTH, WALKS, SOLVERS)
        if bounds[0] + key_step <= bounds[1]:
            _bring_keys(sources, rows, place, bounds[0] + key_step, key_step, BK, C, STAGES)


@gluon.jit
def token_decays(step_C, g_at, g_buffer, made, part, C: gl.constexpr):
    """Decays of tokens for the walks; cumulated ones are stored."""
    i = gl.arange(0, C, scan_layout())
    g_C = cumulated(step_C, g_buffer)
    g_all = g_buffer.slice(C - 1, 1).load(scan_layout())
    made[3].index(part).store(gl.exp2(g_C))
    made[4].index(part).store(gl.exp2(g_all - g_C))
    made[5].index(part).store(gl.zeros([C], gl.float32, scan_layout()) + gl.exp2(g_all))
    gl.store(g_at + i, g_C)


@gluon.jit
def decays_seen(g_buffer, C: gl.constexpr, GATED: gl.constexpr):
    """The decays from one token to another, zero from later to earlier, of cumulated log2 decays."""
    if GATED:
        return gl.exp2(falls(g_buffer, C) + gl.where(seen_by(C), 0.0, float("-inf")))
    else:
        return gl.where(seen_by(C), 1.0, 0.0)


@gluon.jit
def read_decays(beta_C, g_C, g_all, g_buffer, made, part, C: gl.constexpr):
    """The same of cumulated decays that were read."""
    g_buffer.store(g_C)
    made[3].index(part).store(gl.exp2(g_C))
    made[4].index(part).store(gl.exp2(g_all - g_C) * beta_C)
    made[5].index(part).store(gl.zeros([C], gl.float32, line_layout()) + gl.exp2(g_all))


@gluon.jit
def score(
    given,
    BK: gl.constexpr, C: gl.constexpr, STAGES: gl.constexpr, DEPTH: gl.constexpr, WALKS: gl.constexpr, SOLVERS: gl.constexpr,
    GATED: gl.constexpr, DOT: gl.constexpr,
):  # fmt: skip
    """The partition that brings rows, makes scores and factors of each chunk, and stores cumulated decays, or reads them with H."""
    square: gl.constexpr = turned_layout(C)
    sources, h, pointers, gate_t, place, bounds, chunk_0, rows, made, inner, handed, length, heads = given
    beta, gate, g = pointers
    line = gl.arange(0, C, line_layout())
    none_CC = gl.zeros([C, C], gl.float32, square)
    steps = bounds[1] - bounds[0] + 1
    bring_first(sources, h, rows, place, bounds, chunk_0, made[0], BK, C, STAGES, DEPTH, WALKS, SOLVERS)
    g_all = 0.0
    if SOLVERS == 0:
        beta_C, step_C, g_all = factors_of(beta, g, bounds[0], line, length, heads, C, GATED)
    else:
        beta_C, step_C = vectors(beta, gate, gate_t, bounds[0], length, heads, C, GATED)
    for step in range(steps):
        part, q_CK, k_CK = step % 2, rows[0][0].index(step % STAGES), rows[0][1].index(step % STAGES)
        mbarrier.wait(handed[1].index(part), (step // 2 + 1) % 2)
        bring_next(sources, h, rows, place, bounds, chunk_0, made[0], step, BK, C, STAGES, DEPTH, WALKS, SOLVERS)
        mbarrier.wait(rows[2][0].index(step % STAGES), step // STAGES % 2)
        scores = warpgroup_mma(q_CK, k_CK.permute([1, 0]), none_CC, use_acc=False, is_async=True)
        made[2].index(part).store(beta_C)
        following = bounds[0] + gl.minimum(step + 1, steps - 1)
        if SOLVERS == 0:
            if GATED:
                read_decays(beta_C, step_C, g_all, inner[2].index(0), made, part, C)
            beta_C, step_C, g_all = factors_of(beta, g, following, line, length, heads, C, GATED)
        else:
            if GATED:
                token_decays(step_C, g + (bounds[0] + step) * C, inner[2].index(0), made, part, C)
            beta_C, step_C = vectors(beta, gate, gate_t, following, length, heads, C, GATED)
        fall = decays_seen(inner[2].index(0), C, GATED)
        scores_CC = warpgroup_mma_wait(0, [scores])
        made[1].index(part).store((scores_CC * fall).to(DOT))
        fence_async_shared()
        thread_barrier()
        mbarrier.arrive(handed[0].index(part), count=1)
