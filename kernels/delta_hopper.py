"""The walks of `kernels.delta_triton` for Hopper, in Gluon: the same sums, with the order of the work spelled out.

A walk is a chain of products that wait for each other. Plain Triton waits for each of them and for every load; here the tensor
memory accelerator brings a chunk's rows while the one before is computed, and products that nobody waits for run behind those
of the chain.

A program is one warp group. Barriers are put in by the compiler, which does not know how long an asynchronous product reads:
a buffer is written again only after a barrier that follows the wait for its last reader.

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

SIZES = ["length", "heads", "group", "segments", "span"]


@gluon.constexpr_function
def _sums(width):
    """Registers of sums that are `width` columns wide."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, width, 16])


@gluon.constexpr_function
def shared_layout(width, rank=2):
    """16-bit rows in shared memory as tensor cores read them."""
    return gl.NVMMASharedLayout(min(2 * width, 128), 16, rank=rank)


@gluon.jit
def _strengths(beta, t_C, length, heads):
    """Beta of a chunk, zero beyond the end."""
    return gl.load(beta + t_C.to(gl.int64) * heads, mask=t_C < length, other=0.0).to(gl.float32)


@gluon.jit
def _barriers(COUNT: gl.constexpr):
    """Barriers on which copies report their bytes."""
    bars = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for index in gl.static_range(COUNT):
        mbarrier.init(bars.index(index), count=1)
    fence_async_shared()
    return bars


@gluon.jit(do_not_specialize=SIZES)
def forward_kernel(
    q, k, v, h, o, errors, states, beta, g, first, last,
    length: tl.int32, heads: tl.int32, group: tl.int32, segments: tl.int32, span: tl.int32,
    K: gl.constexpr, V: gl.constexpr, BK: gl.constexpr, BV: gl.constexpr, C: gl.constexpr,
    GATED: gl.constexpr, FIRST: gl.constexpr, LAST: gl.constexpr, KEEP: gl.constexpr, DOT: gl.constexpr,
):  # fmt: skip
    """As `kernels.delta_triton.forward_kernel`, on descriptors of blocks of a chunk.

    Grid: (B * H * segments * value tiles,). A segment is `span` chunks; `first` holds the state that enters each of them.
    """
    TILES: gl.constexpr = (V + BV - 1) // BV
    program = gl.program_id(0)
    part, e_start = program // TILES, (program % TILES) * BV
    head_index, segment = part // segments, part % segments
    batch, head = head_index // heads, head_index % heads
    n_chunks = (length + C - 1) // C
    n_first, n_last = segment * span, gl.minimum(segment * span + span, n_chunks) - 1
    chunk_0 = head_index * n_chunks
    beta += batch.to(gl.int64) * length * heads + head
    g += chunk_0.to(gl.int64) * C

    narrow: gl.constexpr = _sums(BV)
    square: gl.constexpr = _sums(C)
    left: gl.constexpr = gl.DotOperandLayout(0, square, 2)
    i = gl.arange(0, C, gl.SliceLayout(1, narrow))
    seen = gl.arange(0, C, gl.SliceLayout(1, square))[:, None] >= gl.arange(0, C, gl.SliceLayout(0, square))[None, :]
    d, e = gl.arange(0, BK, gl.SliceLayout(1, narrow)), e_start + gl.arange(0, BV, gl.SliceLayout(0, narrow))
    state_offsets, in_state = d[:, None] * V + e[None, :], (d < K)[:, None] & (e < V)[None, :]

    q_buffers = gl.allocate_shared_memory(DOT, [2, C, BK], shared_layout(BK))
    k_buffers = gl.allocate_shared_memory(DOT, [2, C, BK], shared_layout(BK))
    v_buffer = gl.allocate_shared_memory(DOT, [C, BV], shared_layout(BV))
    h_buffer = gl.allocate_shared_memory(DOT, [C, C], shared_layout(C))
    state_buffer = gl.allocate_shared_memory(DOT, [BK, BV], shared_layout(BV))
    error_buffer = gl.allocate_shared_memory(DOT, [C, BV], shared_layout(BV))
    write_buffer = gl.allocate_shared_memory(DOT, [C, BV], shared_layout(BV))
    g_buffer = gl.allocate_shared_memory(gl.float32, [C], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    qk_bars, vh_bar = _barriers(2), _barriers(1).index(0)

    state_KV = gl.zeros([BK, BV], gl.float32, narrow)
    if FIRST:
        state_KV = gl.load(first + part.to(gl.int64) * K * V + state_offsets, mask=in_state, other=0.0)
    mbarrier.expect(qk_bars.index(0), 4 * C * BK)
    tma.async_copy_global_to_shared(q, [batch, n_first * C, head // group, 0], qk_bars.index(0), q_buffers.index(0))
    tma.async_copy_global_to_shared(k, [batch, n_first * C, head // group, 0], qk_bars.index(0), k_buffers.index(0))
    mbarrier.expect(vh_bar, 2 * C * (BV + C))
    tma.async_copy_global_to_shared(v, [batch, n_first * C, head, e_start], vh_bar, v_buffer)
    tma.async_copy_global_to_shared(h, [chunk_0 + n_first, 0, 0], vh_bar, h_buffer)
    beta_C = _strengths(beta, n_first * C + i, length, heads)
    g_C, g_all = beta_C, 0.0
    if GATED:
        g_C, g_all = gl.load(g + n_first * C + i), gl.load(g + n_first * C + C - 1)
    for step in range(n_last - n_first + 1):
        n = n_first + step
        q_CK, k_CK = q_buffers.index(step % 2), k_buffers.index(step % 2)
        start, following = n * C, gl.minimum(n + 1, n_last)
        tma.store_wait(0)
        state_buffer.store(state_KV.to(DOT))
        if GATED:
            g_buffer.store(g_C)
        fence_async_shared()
        mbarrier.wait(qk_bars.index(step % 2), (step // 2) % 2)
        scores = gl.zeros([C, C], gl.float32, square)
        scores = warpgroup_mma(q_CK, k_CK.permute([1, 0]), scores, use_acc=False, is_async=True)
        none_CV = gl.zeros([C, BV], gl.float32, narrow)
        read = warpgroup_mma(k_CK, state_buffer, none_CV, use_acc=False, is_async=True)
        qk_bar = qk_bars.index((step + 1) % 2)
        mbarrier.expect(qk_bar, 4 * C * BK)
        tma.async_copy_global_to_shared(q, [batch, following * C, head // group, 0], qk_bar, q_buffers.index((step + 1) % 2))
        tma.async_copy_global_to_shared(k, [batch, following * C, head // group, 0], qk_bar, k_buffers.index((step + 1) % 2))
        if KEEP:
            tma.async_copy_shared_to_global(states, [chunk_0 + n, 0, e_start], state_buffer)
        scores_CC, read = warpgroup_mma_wait(1, [scores, read])
        if GATED:
            g_row = gl.convert_layout(g_C, gl.SliceLayout(1, square))
            g_col = g_buffer.load(gl.SliceLayout(0, square))
            scores_CC = scores_CC * gl.exp2(gl.where(seen, g_row[:, None] - g_col[None, :], float("-inf")))
        else:
            scores_CC = gl.where(seen, scores_CC, 0.0)
        scores_CC = gl.convert_layout(scores_CC.to(DOT), left)
        read_CV = warpgroup_mma_wait(0, [read])
        if GATED:
            read_CV = read_CV * gl.exp2(g_C)[:, None]
        mbarrier.wait(vh_bar, step % 2)
        error_CV = v_buffer.load(narrow).to(gl.float32) - read_CV
        error_buffer.store((error_CV * beta_C[:, None]).to(DOT))
        fence_async_shared()
        spread = warpgroup_mma(h_buffer, error_buffer, none_CV, use_acc=False, is_async=True)
        asked = warpgroup_mma(q_CK, state_buffer, none_CV, use_acc=False, is_async=True)
        spread_CV, asked = warpgroup_mma_wait(1, [spread, asked])
        error_CV -= spread_CV
        write_CV = error_CV * beta_C[:, None]
        write_buffer.store(write_CV.to(DOT))
        fade_buffer, out_buffer = write_buffer, error_buffer
        if KEEP:
            error_buffer.store(error_CV.to(DOT))
            fence_async_shared()
            tma.async_copy_shared_to_global(errors, [batch, start, head, e_start], error_buffer)
        if GATED:
            state_KV = state_KV * gl.exp2(g_all)
            fade_buffer, out_buffer = error_buffer, write_buffer
            if KEEP:
                tma.store_wait(0)
            error_buffer.store((write_CV * gl.exp2(g_all - g_C)[:, None]).to(DOT))
        fence_async_shared()
        state = warpgroup_mma(k_CK.permute([1, 0]), fade_buffer, state_KV, is_async=True)
        mbarrier.expect(vh_bar, 2 * C * (BV + C))
        tma.async_copy_global_to_shared(v, [batch, following * C, head, e_start], vh_bar, v_buffer)
        tma.async_copy_global_to_shared(h, [chunk_0 + following, 0, 0], vh_bar, h_buffer)
        o_CV = asked
        if GATED:
            o_CV = warpgroup_mma_wait(1, [asked]) * gl.exp2(g_C)[:, None]
            g_C, g_all = gl.load(g + following * C + i), gl.load(g + following * C + C - 1)
        beta_C = _strengths(beta, following * C + i, length, heads)
        written = warpgroup_mma(scores_CC, write_buffer, o_CV, is_async=True)
        state_KV, o_CV = warpgroup_mma_wait(0, [state, written])
        if KEEP:
            tma.store_wait(0)
        out_buffer.store(o_CV.to(DOT))
        fence_async_shared()
        tma.async_copy_shared_to_global(o, [batch, start, head, e_start], out_buffer)
    steps = n_last - n_first + 1
    mbarrier.wait(qk_bars.index(steps % 2), (steps // 2) % 2)
    mbarrier.wait(vh_bar, steps % 2)
    tma.store_wait(0)
    if LAST:
        in_state = in_state & (segment == segments - 1)
        gl.store(last + head_index.to(gl.int64) * K * V + state_offsets, state_KV, mask=in_state)
