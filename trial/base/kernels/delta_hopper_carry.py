"""What a segment of a long sequence does to a state, for Hopper: where heads are few, segments of a sequence run at once.

A segment takes the state S that enters it to R S + C, and the gradient of the state that leaves it to that of the one that
enters in the same form. A program walks over a segment with some columns of the state: from zero for C, and from columns of
the identity, with values (or gradients of outputs) of zero, for R. Then `combine_kernel` goes through the segments.

Segments are counted in the order of the walk: the first starts with the state given, or zero, and needs no R; what the last
leaves is left to the walk proper. `ends` is [B * H, segments - 1, K, columns of C and then of R] in fp32.

Shape legend: B batch, T time, H heads, N chunks, C = 64 tokens of a chunk, K key, V value width.
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

from kernels._entry import entry
from kernels.delta_hopper import (
    SIZES,
    barriers,
    columns_of,
    factors_of,
    fetch,
    place,
    scaled,
    shared_layout,
    sums_layout,
)


@gluon.jit
def _start(
    first, head_index, order, e_start,
    K: gl.constexpr, V: gl.constexpr, BK: gl.constexpr, BV: gl.constexpr, GIVEN: gl.constexpr,
):  # fmt: skip
    """The columns of a state with which a program starts: of the state given, of zero or of the identity."""
    VALUES: gl.constexpr = (V + BV - 1) // BV * BV
    d, e = gl.arange(0, BK, gl.SliceLayout(1, sums_layout(BV))), e_start + gl.arange(0, BV, gl.SliceLayout(0, sums_layout(BV)))
    state_KV = gl.where(d[:, None] == e[None, :] - VALUES, 1.0, 0.0)
    if GIVEN:
        offsets, inside = columns_of(sums_layout(BV), e_start, V, K, BK, BV)
        state_KV += gl.load(first + head_index.to(gl.int64) * K * V + offsets, mask=inside & (order == 0), other=0.0)
    return state_KV


@entry(do_not_specialize=SIZES, gluon=True)
def forward_carry_kernel(
    k, v, h, beta, g, first, ends,
    length: tl.int32, heads: tl.int32, group: tl.int32, segments: tl.int32, span: tl.int32,
    K: gl.constexpr, V: gl.constexpr, BK: gl.constexpr, BV: gl.constexpr, C: gl.constexpr,
    GATED: gl.constexpr, FIRST: gl.constexpr, DOT: gl.constexpr,
):  # fmt: skip
    """Grid: (B * H * (segments - 1) * tiles of C and of R,)."""
    TILES: gl.constexpr = (V + BV - 1) // BV + (K + BV - 1) // BV
    BYTES: gl.constexpr = 2 * C * (BK + BV + C)
    slot, e_start, n_chunks = gl.program_id(0) // TILES, gl.program_id(0) % TILES * BV, (length + C - 1) // C
    head_index, order, n_first, n_last = place(slot, segments - 1, segments, span, n_chunks, False)
    batch, head, chunk_0 = head_index // heads, head_index % heads, head_index * n_chunks
    beta, g = beta + batch.to(gl.int64) * length * heads + head, g + chunk_0.to(gl.int64) * C
    i = gl.arange(0, C, gl.SliceLayout(1, sums_layout(BV)))
    k_buffers = gl.allocate_shared_memory(DOT, [2, C, BK], shared_layout(BK))
    v_buffers = gl.allocate_shared_memory(DOT, [2, C, BV], shared_layout(BV))
    h_buffers = gl.allocate_shared_memory(DOT, [2, C, C], shared_layout(C))
    state_buffer = gl.allocate_shared_memory(DOT, [BK, BV], shared_layout(BV))
    error_buffer = gl.allocate_shared_memory(DOT, [C, BV], shared_layout(BV))
    write_buffer = gl.allocate_shared_memory(DOT, [C, BV], shared_layout(BV))
    bars = barriers(2)

    state_KV = _start(first, head_index, order, e_start, K, V, BK, BV, FIRST)
    none_CV = gl.zeros([C, BV], gl.float32, sums_layout(BV))
    places = ([batch, n_first * C, head // group, 0], [batch, n_first * C, head, e_start], [chunk_0 + n_first, 0, 0])
    fetch(bars.index(0), BYTES, (k, v, h), places, (k_buffers.index(0), v_buffers.index(0), h_buffers.index(0)))
    for step in range(span):
        n, now, then = n_first + step, step % 2, (step + 1) % 2
        following = gl.minimum(n + 1, n_last)
        beta_C, g_C, g_all = factors_of(beta, g, n, i, length, heads, C, GATED)
        state_buffer.store(state_KV.to(DOT))
        fence_async_shared()
        mbarrier.wait(bars.index(now), step // 2 % 2)
        read = warpgroup_mma(k_buffers.index(now), state_buffer, none_CV, use_acc=False, is_async=True)
        places = ([batch, following * C, head // group, 0], [batch, following * C, head, e_start], [chunk_0 + following, 0, 0])
        fetch(bars.index(then), BYTES, (k, v, h), places, (k_buffers.index(then), v_buffers.index(then), h_buffers.index(then)))
        read_CV = scaled(warpgroup_mma_wait(0, [read]), g_C, GATED)
        error_CV = v_buffers.index(now).load(sums_layout(BV)).to(gl.float32) - read_CV
        error_buffer.store((error_CV * beta_C[:, None]).to(DOT))
        fence_async_shared()
        spread = warpgroup_mma(h_buffers.index(now), error_buffer, none_CV, use_acc=False, is_async=True)
        write_CV = scaled((error_CV - warpgroup_mma_wait(0, [spread])) * beta_C[:, None], g_all - g_C, GATED)
        if GATED:
            state_KV = state_KV * gl.exp2(g_all)
        write_buffer.store(write_CV.to(DOT))
        fence_async_shared()
        state = warpgroup_mma(k_buffers.index(now).permute([1, 0]), write_buffer, state_KV, is_async=True)
        state_KV = warpgroup_mma_wait(0, [state])
    mbarrier.wait(bars.index(span % 2), span // 2 % 2)
    offsets, inside = columns_of(sums_layout(BV), e_start, TILES * BV, K, BK, BV)
    gl.store(ends + slot.to(gl.int64) * K * TILES * BV + offsets, state_KV, mask=inside)


@gluon.jit
def _buffers(BK: gl.constexpr, BV: gl.constexpr, C: gl.constexpr, DOT: gl.constexpr):
    """Shared memory of a walk: two chunks' queries and keys, decays; values, H, the state, and two matrices like values."""
    q_buffers = gl.allocate_shared_memory(DOT, [2, C, BK], shared_layout(BK))
    k_buffers = gl.allocate_shared_memory(DOT, [2, C, BK], shared_layout(BK))
    v_buffer = gl.allocate_shared_memory(DOT, [C, BV], shared_layout(BV))
    h_buffer = gl.allocate_shared_memory(DOT, [C, C], shared_layout(C))
    state_buffer = gl.allocate_shared_memory(DOT, [BK, BV], shared_layout(BV))
    error_buffer = gl.allocate_shared_memory(DOT, [C, BV], shared_layout(BV))
    write_buffer = gl.allocate_shared_memory(DOT, [C, BV], shared_layout(BV))
    g_buffer = gl.allocate_shared_memory(gl.float32, [C], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    return q_buffers, k_buffers, g_buffer, (v_buffer, h_buffer, state_buffer, error_buffer, write_buffer)


@gluon.jit
def _scores_beside(
    q_CK, k_CK, state_KV, g_C, g_buffer,
    C: gl.constexpr, BV: gl.constexpr, GATED: gl.constexpr, DOT: gl.constexpr,
):  # fmt: skip
    """K Q^T of tokens and later ones, decayed, as a left operand; and the product of K and the gradient of the state."""
    square: gl.constexpr = sums_layout(C)
    rows, cols = gl.arange(0, C, gl.SliceLayout(1, square)), gl.arange(0, C, gl.SliceLayout(0, square))
    seen = rows[:, None] <= cols[None, :]
    scores = gl.zeros([C, C], gl.float32, square)
    scores = warpgroup_mma(k_CK, q_CK.permute([1, 0]), scores, use_acc=False, is_async=True)
    read = gl.zeros([C, BV], gl.float32, sums_layout(BV))
    read = warpgroup_mma(k_CK, state_KV, read, use_acc=False, is_async=True)
    scores_CC, read = warpgroup_mma_wait(1, [scores, read])
    if GATED:
        fall_CC = gl.convert_layout(g_C, gl.SliceLayout(1, square))[:, None] - g_buffer.load(gl.SliceLayout(0, square))[None, :]
        # Only exponents that are <= 0 are used; the others would overflow and are masked before.
        scores_CC = scores_CC * gl.exp2(gl.where(seen, -fall_CC, float("-inf")))
    else:
        scores_CC = gl.where(seen, scores_CC, 0.0)
    scores_CC = gl.convert_layout(scores_CC.to(DOT), gl.DotOperandLayout(0, square, 2))
    return scores_CC, warpgroup_mma_wait(0, [read])


@entry(do_not_specialize=SIZES, gluon=True)
def reverse_carry_kernel(
    q, k, do, h, beta, g, dlast, ends,
    length: tl.int32, heads: tl.int32, group: tl.int32, segments: tl.int32, span: tl.int32,
    K: gl.constexpr, V: gl.constexpr, BK: gl.constexpr, BV: gl.constexpr, C: gl.constexpr,
    GATED: gl.constexpr, DLAST: gl.constexpr, DOT: gl.constexpr,
):  # fmt: skip
    """Grid: (B * H * (segments - 1) * tiles of C and of R,)."""
    TILES: gl.constexpr = (V + BV - 1) // BV + (K + BV - 1) // BV
    slot, e_start, n_chunks = gl.program_id(0) // TILES, gl.program_id(0) % TILES * BV, (length + C - 1) // C
    head_index, order, n_first, n_last = place(slot, segments - 1, segments, span, n_chunks, True)
    batch, head, chunk_0 = head_index // heads, head_index % heads, head_index * n_chunks
    shared_head, steps = head // group, n_last - n_first + 1
    beta, g = beta + batch.to(gl.int64) * length * heads + head, g + chunk_0.to(gl.int64) * C
    i = gl.arange(0, C, gl.SliceLayout(1, sums_layout(BV)))
    q_buffers, k_buffers, g_buffer, buffers = _buffers(BK, BV, C, DOT)
    do_buffer, h_buffer, state_buffer, error_buffer, fade_buffer = buffers
    qk_bars, doh_bar = barriers(2), barriers(1).index(0)

    dstate_KV = _start(dlast, head_index, order, e_start, K, V, BK, BV, DLAST)
    at_qk, at_do = [batch, n_last * C, shared_head, 0], [batch, n_last * C, head, e_start]
    fetch(qk_bars.index(0), 4 * C * BK, (q, k), (at_qk, at_qk), (q_buffers.index(0), k_buffers.index(0)))
    fetch(doh_bar, 2 * C * (BV + C), (do, h), (at_do, [chunk_0 + n_last, 0, 0]), (do_buffer, h_buffer))
    for step in range(steps):
        n, then, following = n_last - step, (step + 1) % 2, gl.maximum(n_last - step - 1, 0)
        at_qk, at_do = [batch, following * C, shared_head, 0], [batch, following * C, head, e_start]
        q_CK, k_CK = q_buffers.index(step % 2), k_buffers.index(step % 2)
        beta_C, g_C, g_all = factors_of(beta, g, n, i, length, heads, C, GATED)
        state_buffer.store(dstate_KV.to(DOT))
        if GATED:
            g_buffer.store(g_C)
        fence_async_shared()
        mbarrier.wait(qk_bars.index(step % 2), step // 2 % 2)
        scores_CC, dwrite = _scores_beside(q_CK, k_CK, state_buffer, g_C, g_buffer, C, BV, GATED, DOT)
        fetch(qk_bars.index(then), 4 * C * BK, (q, k), (at_qk, at_qk), (q_buffers.index(then), k_buffers.index(then)))
        mbarrier.wait(doh_bar, step % 2)
        dwrite = warpgroup_mma(scores_CC, do_buffer, scaled(dwrite, g_all - g_C, GATED), is_async=True)
        dwrite_CV = warpgroup_mma_wait(0, [dwrite])
        error_buffer.store((dwrite_CV * beta_C[:, None]).to(DOT))
        fading = do_buffer
        if GATED:
            fade_buffer.store(scaled(do_buffer.load(sums_layout(BV)).to(gl.float32), g_C, GATED).to(DOT))
            fading, dstate_KV = fade_buffer, dstate_KV * gl.exp2(g_all)
        fence_async_shared()
        spread = gl.zeros([C, BV], gl.float32, sums_layout(BV))
        spread = warpgroup_mma(h_buffer.permute([1, 0]), error_buffer, spread, use_acc=False, is_async=True)
        dstate = warpgroup_mma(q_CK.permute([1, 0]), fading, dstate_KV, is_async=True)
        spread_CV, dstate = warpgroup_mma_wait(0, [spread, dstate])
        error_buffer.store(scaled((spread_CV - dwrite_CV) * beta_C[:, None], g_C, GATED).to(DOT))
        fence_async_shared()
        dstate = warpgroup_mma(k_CK.permute([1, 0]), error_buffer, dstate, is_async=True)
        fetch(doh_bar, 2 * C * (BV + C), (do, h), (at_do, [chunk_0 + following, 0, 0]), (do_buffer, h_buffer))
        dstate_KV = warpgroup_mma_wait(0, [dstate])
    mbarrier.wait(qk_bars.index(steps % 2), steps // 2 % 2)
    mbarrier.wait(doh_bar, steps % 2)
    offsets, inside = columns_of(sums_layout(BV), e_start, TILES * BV, K, BK, BV)
    gl.store(ends + slot.to(gl.int64) * K * TILES * BV + offsets, dstate_KV, mask=inside)


@entry
def combine_kernel(
    ends, first, states, segments: tl.int32,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, TILE: tl.constexpr, FIRST: tl.constexpr,
):  # fmt: skip
    """Grid: (B * H * tiles of TILE columns,). Writes the state that enters each segment [B * H, segments, K, V] in fp32."""
    VALUES: tl.constexpr = (V + BV - 1) // BV * BV
    WIDTH: tl.constexpr = VALUES + (K + BV - 1) // BV * BV
    TILES: tl.constexpr = (V + TILE - 1) // TILE
    head_index = (tl.program_id(0) // TILES).to(tl.int64)
    d, e = tl.arange(0, BK), (tl.program_id(0) % TILES) * TILE + tl.arange(0, TILE)
    inside = (d < K)[:, None] & (e < V)[None, :]
    offsets = d[:, None] * V + e[None, :]
    states += head_index * segments * K * V
    ends += head_index * (segments - 1) * K * WIDTH
    state_KV = tl.zeros([BK, TILE], tl.float32)
    if FIRST:
        state_KV = tl.load(first + head_index * K * V + offsets, mask=inside, other=0.0)
    tl.store(states + offsets, state_KV, mask=inside)
    state_KV = tl.load(ends + d[:, None] * WIDTH + e[None, :], mask=inside, other=0.0)
    tl.store(states + K * V + offsets, state_KV, mask=inside)
    for part in range(1, segments - 1):
        step = ends + tl.cast(part, tl.int64) * K * WIDTH
        among = (d < K)[:, None] & (d < K)[None, :]
        r_KK = tl.load(step + d[:, None] * WIDTH + VALUES + d[None, :], mask=among, other=0.0)
        c_KV = tl.load(step + d[:, None] * WIDTH + e[None, :], mask=inside, other=0.0)
        state_KV = tl.dot(r_KK, state_KV, c_KV, input_precision="tf32x3")
        tl.store(states + (tl.cast(part, tl.int64) + 1) * K * V + offsets, state_KV, mask=inside)
