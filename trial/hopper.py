"""The forward walk of `kernels.delta_triton` for Hopper, in Gluon: the same sums, with the order of the work spelled out.

A walk is a chain of products that wait for each other. Plain Triton waits for each of them and for every load; here the tensor
memory accelerator brings a chunk's rows while the one before is computed, and products that nobody waits for run behind those
of the chain.

Barriers are put in by the compiler, which does not know how long an asynchronous product reads: a buffer is written again only
after a barrier that follows the wait for its last reader.

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

# What differs from call to call is not specialised, so that a new batch, length or head count compiles nothing.
SIZES = ["length", "heads", "group", "segments", "span"]


@gluon.constexpr_function
def sums_layout(width, groups):
    """Registers of sums that are `width` columns wide, of which each of the warp groups has its part."""
    return gl.NVMMADistributedLayout([3, 0], [4, groups], [16, width // groups, 16])


@gluon.constexpr_function
def shared_layout(width, rank=2):
    """16-bit rows in shared memory as tensor cores read them."""
    return gl.NVMMASharedLayout(min(2 * width, 128), 16, rank=rank)


@gluon.jit
def place(part, per_head, segments, span, n_chunks, REVERSE: gl.constexpr):
    """Head of a program and its segment in the order of the walk, of which a head has `per_head`; first and last chunk."""
    head_index, order = part // per_head, part % per_head
    segment = segments - 1 - order if REVERSE else order
    return head_index, order, segment * span, gl.minimum(segment * span + span, n_chunks) - 1


@gluon.jit
def barriers(COUNT: gl.constexpr):
    """Barriers on which copies report their bytes."""
    bars = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for index in gl.static_range(COUNT):
        mbarrier.init(bars.index(index), count=1)
    fence_async_shared()
    return bars


@gluon.jit
def fetch(bars, ELEMENTS, sources, places, targets):
    """Starts to copy blocks of 16-bit elements into shared memory.

    Each has a barrier of its own: between copies that report to the same one, the compiler puts a barrier for all threads.
    """
    for index in gl.static_range(len(sources)):
        mbarrier.expect(bars[index], 2 * ELEMENTS[index])
    for index in gl.static_range(len(sources)):
        tma.async_copy_global_to_shared(sources[index], places[index], bars[index], targets[index])


@gluon.jit
def in_turn(pairs, turn):
    """Those buffers or barriers, of two each, whose turn it is."""
    chosen = ()
    for index in gl.static_range(len(pairs)):
        chosen = chosen + (pairs[index].index(turn % 2),)  # noqa: RUF005
    return chosen


@gluon.jit
def arrived(bars, phase):
    """Waits for copies."""
    for index in gl.static_range(len(bars)):
        mbarrier.wait(bars[index], phase)


@gluon.jit
def scores_beside(
    q_CK, k_CK, state_KV, g_C, g_buffer, C: gl.constexpr, BV: gl.constexpr, GROUPS: gl.constexpr, REVERSE: gl.constexpr,
    GATED: gl.constexpr, DOT: gl.constexpr,
):  # fmt: skip
    """Q K^T of tokens and earlier ones, decayed; and K S. In reverse K Q^T of tokens and later ones."""
    square: gl.constexpr = sums_layout(C, GROUPS)
    rows, cols = gl.arange(0, C, gl.SliceLayout(1, square)), gl.arange(0, C, gl.SliceLayout(0, square))
    seen = rows[:, None] <= cols[None, :] if REVERSE else rows[:, None] >= cols[None, :]
    first, second = (k_CK, q_CK) if REVERSE else (q_CK, k_CK)
    scores = gl.zeros([C, C], gl.float32, square)
    scores = warpgroup_mma(first, second.permute([1, 0]), scores, use_acc=False, is_async=True)
    read = gl.zeros([C, BV], gl.float32, sums_layout(BV, GROUPS))
    read = warpgroup_mma(k_CK, state_KV, read, use_acc=False, is_async=True)
    scores_CC, read = warpgroup_mma_wait(1, [scores, read])
    if GATED:
        fall_CC = gl.convert_layout(g_C, gl.SliceLayout(1, square))[:, None] - g_buffer.load(gl.SliceLayout(0, square))[None, :]
        # Only exponents that are <= 0 are used; the others would overflow and are masked before.
        scores_CC = scores_CC * gl.exp2(gl.where(seen, -fall_CC if REVERSE else fall_CC, float("-inf")))
    else:
        scores_CC = gl.where(seen, scores_CC, 0.0)
    return scores_CC.to(DOT), warpgroup_mma_wait(0, [read])


@gluon.jit
def factors_of(beta, g, n, i, length, heads, C: gl.constexpr, GATED: gl.constexpr):
    """Beta of a chunk, zero beyond the end; its cumulated log2 decays, and the last of them."""
    t_C = n * C + i
    beta_C = gl.load(beta + t_C.to(gl.int64) * heads, mask=t_C < length, other=0.0).to(gl.float32)
    g_C, g_all = beta_C, 0.0
    if GATED:
        g_C, g_all = gl.load(g + t_C), gl.load(g + n * C + C - 1)
    return beta_C, g_C, g_all


@gluon.jit
def scaled(x, g_C, GATED: gl.constexpr):
    """Rows decayed by log2 factors."""
    return x * gl.exp2(g_C)[:, None] if GATED else x


@gluon.jit
def columns_of(rows, e_start, V: gl.constexpr, K: gl.constexpr, BK: gl.constexpr, BV: gl.constexpr):
    """Where a tile of a state's columns is in [K, V], for a layout of rows, and what of it is inside."""
    d, e = gl.arange(0, BK, gl.SliceLayout(1, rows)), e_start + gl.arange(0, BV, gl.SliceLayout(0, rows))
    return d[:, None] * V + e[None, :], (d < K)[:, None] & (e < V)[None, :]


@gluon.jit
def given_state(
    given, index, rows, e_start, V: gl.constexpr, K: gl.constexpr, BK: gl.constexpr, BV: gl.constexpr, GIVEN: gl.constexpr
):  # fmt: skip
    """A tile of a state's columns as a walk starts with it: of the state given, or zero."""
    state_KV = gl.zeros([BK, BV], gl.float32, rows)
    if GIVEN:
        offsets, inside = columns_of(rows, e_start, V, K, BK, BV)
        state_KV = gl.load(given + index.to(gl.int64) * K * V + offsets, mask=inside, other=0.0)
    return state_KV


@gluon.jit
def buffers_of(BK: gl.constexpr, BV: gl.constexpr, C: gl.constexpr, DOT: gl.constexpr):
    """Shared memory of a walk: two chunks' queries and keys, decays; values, H, the state, and two matrices like values."""
    q_buffers = gl.allocate_shared_memory(DOT, [2, C, BK], shared_layout(BK))
    k_buffers = gl.allocate_shared_memory(DOT, [2, C, BK], shared_layout(BK))
    v_buffer = gl.allocate_shared_memory(DOT, [C, BV], shared_layout(BV))
    h_buffer = gl.allocate_shared_memory(DOT, [C, C], shared_layout(C))
    state_buffer = gl.allocate_shared_memory(DOT, [BK, BV], shared_layout(BV))
    error_buffer = gl.allocate_shared_memory(DOT, [C, BV], shared_layout(BV))
    write_buffer = gl.allocate_shared_memory(DOT, [C, BV], shared_layout(BV))
    g_buffer = gl.allocate_shared_memory(gl.float32, [C], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    return (q_buffers, k_buffers), g_buffer, (v_buffer, h_buffer, state_buffer, error_buffer, write_buffer)


@gluon.jit
def _erase(
    q_CK, buffers, read_CV, beta_C, C: gl.constexpr, BV: gl.constexpr, GROUPS: gl.constexpr, DOT: gl.constexpr
):  # fmt: skip
    """The errors of a chunk before its own writes are seen; starts the products H beta E, that corrects them, and Q S."""
    v_buffer, h_buffer, state_buffer, error_buffer, _ = buffers
    narrow: gl.constexpr = sums_layout(BV, GROUPS)
    error_CV = v_buffer.load(narrow).to(gl.float32) - read_CV
    error_buffer.store((error_CV * beta_C[:, None]).to(DOT))
    fence_async_shared()
    none_CV = gl.zeros([C, BV], gl.float32, narrow)
    spread = warpgroup_mma(h_buffer, error_buffer, none_CV, use_acc=False, is_async=True)
    asked = warpgroup_mma(q_CK, state_buffer, none_CV, use_acc=False, is_async=True)
    return error_CV, spread, asked


@gluon.jit
def _write(
    errors, at_o, buffers, state_KV, k_CK, error_CV, beta_C, g_C, g_all,
    GATED: gl.constexpr, KEEP: gl.constexpr, DOT: gl.constexpr,
):  # fmt: skip
    """Starts to add a chunk's writes to the state, and leaves them in shared memory; keeps the errors."""
    _, _, _, error_buffer, write_buffer = buffers
    write_CV = error_CV * beta_C[:, None]
    write_buffer.store(write_CV.to(DOT))
    fade_buffer = write_buffer
    if KEEP:
        error_buffer.store(error_CV.to(DOT))
        fence_async_shared()
        tma.async_copy_shared_to_global(errors, at_o, error_buffer)
    if GATED:
        state_KV, fade_buffer = state_KV * gl.exp2(g_all), error_buffer
        if KEEP:
            tma.store_wait(0)
        error_buffer.store((write_CV * gl.exp2(g_all - g_C)[:, None]).to(DOT))
    fence_async_shared()
    return warpgroup_mma(k_CK.permute([1, 0]), fade_buffer, state_KV, is_async=True)


@gluon.jit
def _put(o, at_o, out_buffer, o_CV, KEEP: gl.constexpr, DOT: gl.constexpr):
    """Starts to store outputs, through a buffer that may hold errors on their way out."""
    if KEEP:
        tma.store_wait(0)
    out_buffer.store(o_CV.to(DOT))
    fence_async_shared()
    tma.async_copy_shared_to_global(o, at_o, out_buffer)


@gluon.jit(do_not_specialize=SIZES)
def forward_kernel(
    q, k, v, h, o, errors, states, beta, g, first, last,
    length: tl.int32, heads: tl.int32, group: tl.int32, segments: tl.int32, span: tl.int32,
    K: gl.constexpr, V: gl.constexpr, BK: gl.constexpr, BV: gl.constexpr, GROUPS: gl.constexpr, C: gl.constexpr,
    GATED: gl.constexpr, FIRST: gl.constexpr, LAST: gl.constexpr, KEEP: gl.constexpr, DOT: gl.constexpr,
):  # fmt: skip
    """As `kernels.delta_triton.forward_kernel`, on descriptors of blocks of a chunk.

    Grid: (B * H * segments * value tiles,), of GROUPS warp groups. A segment is `span` chunks; `first` holds the states that
    enter them.
    """
    TILES: gl.constexpr = (V + BV - 1) // BV
    part, e_start, n_chunks = gl.program_id(0) // TILES, gl.program_id(0) % TILES * BV, (length + C - 1) // C
    head_index, order, n_first, n_last = place(part, segments, segments, span, n_chunks, False)
    batch, head, chunk_0, steps = head_index // heads, head_index % heads, head_index * n_chunks, n_last - n_first + 1
    beta, g, shared_head = beta + batch.to(gl.int64) * length * heads + head, g + chunk_0.to(gl.int64) * C, head // group
    i = gl.arange(0, C, gl.SliceLayout(1, sums_layout(BV, GROUPS)))
    qk_buffers, g_buffer, buffers = buffers_of(BK, BV, C, DOT)
    v_buffer, h_buffer, state_buffer, error_buffer, write_buffer = buffers
    scores_buffer, out_buffer = gl.allocate_shared_memory(DOT, [C, C], shared_layout(C)), write_buffer if GATED else error_buffer
    qk_bars, vh_bars = (barriers(2), barriers(2)), (barriers(1).index(0), barriers(1).index(0))

    state_KV = given_state(first, part, sums_layout(BV, GROUPS), e_start, V, K, BK, BV, FIRST)
    at_qk, at_v = [batch, n_first * C, shared_head, 0], [batch, n_first * C, head, e_start]
    fetch(in_turn(qk_bars, 0), (C * BK, C * BK), (q, k), (at_qk, at_qk), in_turn(qk_buffers, 0))
    fetch(vh_bars, (C * BV, C * C), (v, h), (at_v, [chunk_0 + n_first, 0, 0]), (v_buffer, h_buffer))
    beta_C, g_C, g_all = factors_of(beta, g, n_first, i, length, heads, C, GATED)
    for n in range(n_first, n_last + 1):
        step, following = n - n_first, gl.minimum(n + 1, n_last)
        at_qk, at_v, at_o = (
            [batch, following * C, shared_head, 0],
            [batch, following * C, head, e_start],
            [batch, n * C, head, e_start],
        )
        q_CK, k_CK = in_turn(qk_buffers, step)
        tma.store_wait(0)
        state_buffer.store(state_KV.to(DOT))
        if GATED:
            g_buffer.store(g_C)
        fence_async_shared()
        arrived(in_turn(qk_bars, step), step // 2 % 2)
        scores_CC, read_CV = scores_beside(q_CK, k_CK, state_buffer, g_C, g_buffer, C, BV, GROUPS, False, GATED, DOT)
        scores_buffer.store(scores_CC)  # the fence before the next product is one for this, too
        if KEEP:
            tma.async_copy_shared_to_global(states, [chunk_0 + n, 0, e_start], state_buffer)
        arrived(vh_bars, step % 2)
        error_CV, spread, asked = _erase(q_CK, buffers, scaled(read_CV, g_C, GATED), beta_C, C, BV, GROUPS, DOT)
        fetch(in_turn(qk_bars, step + 1), (C * BK, C * BK), (q, k), (at_qk, at_qk), in_turn(qk_buffers, step + 1))
        spread_CV, asked = warpgroup_mma_wait(1, [spread, asked])
        state = _write(errors, at_o, buffers, state_KV, k_CK, error_CV - spread_CV, beta_C, g_C, g_all, GATED, KEEP, DOT)
        if GATED:
            asked = scaled(warpgroup_mma_wait(1, [asked]), g_C, GATED)
        beta_C, g_C, g_all = factors_of(beta, g, following, i, length, heads, C, GATED)
        written = warpgroup_mma(scores_buffer, write_buffer, asked, is_async=True)
        fetch(vh_bars, (C * BV, C * C), (v, h), (at_v, [chunk_0 + following, 0, 0]), (v_buffer, h_buffer))
        state_KV, o_CV = warpgroup_mma_wait(0, [state, written])
        _put(o, at_o, out_buffer, o_CV, KEEP, DOT)
    arrived(in_turn(qk_bars, steps), steps // 2 % 2)
    arrived(vh_bars, steps % 2)
    tma.store_wait(0)
    if LAST:
        offsets, inside = columns_of(sums_layout(BV, GROUPS), e_start, V, K, BK, BV)
        gl.store(last + head_index.to(gl.int64) * K * V + offsets, state_KV, mask=inside & (order == segments - 1))
