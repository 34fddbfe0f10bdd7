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

from kernels.delta_hopper import barriers as _barriers
from kernels.delta_hopper import shared_layout
from kernels.delta_hopper import strengths as _strengths
from kernels.delta_hopper import sums_layout as _sums


@gluon.jit(do_not_specialize=["length", "heads", "group"])
def reverse_kernel(
    q, k, do, h, solved, dstates, beta, g, dlast, dfirst,
    length: tl.int32, heads: tl.int32, group: tl.int32,
    K: gl.constexpr, V: gl.constexpr, BK: gl.constexpr, BV: gl.constexpr, C: gl.constexpr,
    GATED: gl.constexpr, FIRST: gl.constexpr, DLAST: gl.constexpr, DOT: gl.constexpr,
):  # fmt: skip
    """As `kernels.delta_triton.reverse_kernel`, on descriptors of blocks of a chunk. Grid: (B * H * value tiles,)."""
    TILES: gl.constexpr = (V + BV - 1) // BV
    program = gl.program_id(0)
    head_index, e_start = program // TILES, (program % TILES) * BV
    batch, head = head_index // heads, head_index % heads
    n_chunks = (length + C - 1) // C
    chunk_0 = head_index * n_chunks
    beta += batch.to(gl.int64) * length * heads + head
    g += chunk_0.to(gl.int64) * C

    narrow: gl.constexpr = _sums(BV)
    square: gl.constexpr = _sums(C)
    left: gl.constexpr = gl.DotOperandLayout(0, square, 2)
    i = gl.arange(0, C, gl.SliceLayout(1, narrow))
    seen = gl.arange(0, C, gl.SliceLayout(1, square))[:, None] <= gl.arange(0, C, gl.SliceLayout(0, square))[None, :]
    d, e = gl.arange(0, BK, gl.SliceLayout(1, narrow)), e_start + gl.arange(0, BV, gl.SliceLayout(0, narrow))
    state_offsets, in_state = d[:, None] * V + e[None, :], (d < K)[:, None] & (e < V)[None, :]
    state_offsets += head_index.to(gl.int64) * K * V

    q_buffers = gl.allocate_shared_memory(DOT, [2, C, BK], shared_layout(BK))
    k_buffers = gl.allocate_shared_memory(DOT, [2, C, BK], shared_layout(BK))
    do_buffer = gl.allocate_shared_memory(DOT, [C, BV], shared_layout(BV))
    h_buffer = gl.allocate_shared_memory(DOT, [C, C], shared_layout(C))
    state_buffer = gl.allocate_shared_memory(DOT, [BK, BV], shared_layout(BV))
    error_buffer = gl.allocate_shared_memory(DOT, [C, BV], shared_layout(BV))
    out_buffer = gl.allocate_shared_memory(DOT, [C, BV], shared_layout(BV))
    g_buffer = gl.allocate_shared_memory(gl.float32, [C], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    qk_bars, doh_bar = _barriers(2), _barriers(1).index(0)

    dstate_KV = gl.zeros([BK, BV], gl.float32, narrow)
    if DLAST:
        dstate_KV = gl.load(dlast + state_offsets, mask=in_state, other=0.0)
    last = n_chunks - 1
    mbarrier.expect(qk_bars.index(0), 4 * C * BK)
    tma.async_copy_global_to_shared(q, [batch, last * C, head // group, 0], qk_bars.index(0), q_buffers.index(0))
    tma.async_copy_global_to_shared(k, [batch, last * C, head // group, 0], qk_bars.index(0), k_buffers.index(0))
    mbarrier.expect(doh_bar, 2 * C * (BV + C))
    tma.async_copy_global_to_shared(do, [batch, last * C, head, e_start], doh_bar, do_buffer)
    tma.async_copy_global_to_shared(h, [chunk_0 + last, 0, 0], doh_bar, h_buffer)
    beta_C = _strengths(beta, last * C + i, length, heads)
    g_C, g_all = beta_C, 0.0
    if GATED:
        g_C, g_all = gl.load(g + last * C + i), gl.load(g + last * C + C - 1)
    for back in range(n_chunks):
        q_CK, k_CK = q_buffers.index(back % 2), k_buffers.index(back % 2)
        n, following = last - back, gl.maximum(last - back - 1, 0)
        tma.store_wait(0)
        state_buffer.store(dstate_KV.to(DOT))
        if GATED:
            g_buffer.store(g_C)
        fence_async_shared()
        mbarrier.wait(qk_bars.index(back % 2), (back // 2) % 2)
        scores = gl.zeros([C, C], gl.float32, square)
        scores = warpgroup_mma(k_CK, q_CK.permute([1, 0]), scores, use_acc=False, is_async=True)
        none_CV = gl.zeros([C, BV], gl.float32, narrow)
        dwrite = warpgroup_mma(k_CK, state_buffer, none_CV, use_acc=False, is_async=True)
        tma.async_copy_shared_to_global(dstates, [chunk_0 + n, 0, e_start], state_buffer)
        qk_bar = qk_bars.index((back + 1) % 2)
        mbarrier.expect(qk_bar, 4 * C * BK)
        tma.async_copy_global_to_shared(q, [batch, following * C, head // group, 0], qk_bar, q_buffers.index((back + 1) % 2))
        tma.async_copy_global_to_shared(k, [batch, following * C, head // group, 0], qk_bar, k_buffers.index((back + 1) % 2))
        scores_CC, dwrite = warpgroup_mma_wait(1, [scores, dwrite])
        if GATED:
            g_row = gl.convert_layout(g_C, gl.SliceLayout(1, square))
            g_col = g_buffer.load(gl.SliceLayout(0, square))
            scores_CC = scores_CC * gl.exp2(gl.where(seen, g_col[None, :] - g_row[:, None], float("-inf")))
            until_C, fade_C = gl.exp2(g_all - g_C), gl.exp2(g_C)
        else:
            scores_CC = gl.where(seen, scores_CC, 0.0)
        scores_CC = gl.convert_layout(scores_CC.to(DOT), left)
        mbarrier.wait(doh_bar, back % 2)
        if GATED:
            dwrite = warpgroup_mma_wait(0, [dwrite]) * until_C[:, None]
        dwrite_CV = warpgroup_mma_wait(0, [warpgroup_mma(scores_CC, do_buffer, dwrite, is_async=True)])
        error_buffer.store((dwrite_CV * beta_C[:, None]).to(DOT))
        if GATED:
            out_buffer.store((do_buffer.load(narrow).to(gl.float32) * fade_C[:, None]).to(DOT))
            fading = out_buffer
            dstate_KV = dstate_KV * gl.exp2(g_all)
        else:
            fading = do_buffer
        fence_async_shared()
        spread = warpgroup_mma(h_buffer.permute([1, 0]), error_buffer, none_CV, use_acc=False, is_async=True)
        dstate = warpgroup_mma(q_CK.permute([1, 0]), fading, dstate_KV, is_async=True)
        spread_CV, dstate = warpgroup_mma_wait(1, [spread, dstate])
        dwrite_CV -= spread_CV
        erased_CV = dwrite_CV * -beta_C[:, None]
        if GATED:
            erased_CV = erased_CV * fade_C[:, None]
            dstate = warpgroup_mma_wait(0, [dstate])
        error_buffer.store(erased_CV.to(DOT))
        out_buffer.store(dwrite_CV.to(DOT))
        fence_async_shared()
        dstate = warpgroup_mma(k_CK.permute([1, 0]), error_buffer, dstate, is_async=True)
        tma.async_copy_shared_to_global(solved, [batch, n * C, head, e_start], out_buffer)
        beta_C = _strengths(beta, following * C + i, length, heads)
        if GATED:
            g_C, g_all = gl.load(g + following * C + i), gl.load(g + following * C + C - 1)
        dstate_KV = warpgroup_mma_wait(0, [dstate])
        mbarrier.expect(doh_bar, 2 * C * (BV + C))
        tma.async_copy_global_to_shared(do, [batch, following * C, head, e_start], doh_bar, do_buffer)
        tma.async_copy_global_to_shared(h, [chunk_0 + following, 0, 0], doh_bar, h_buffer)
    mbarrier.wait(qk_bars.index(n_chunks % 2), (n_chunks // 2) % 2)
    mbarrier.wait(doh_bar, n_chunks % 2)
    tma.store_wait(0)
    if FIRST:
        gl.store(dfirst + state_offsets, dstate_KV, mask=in_state)
