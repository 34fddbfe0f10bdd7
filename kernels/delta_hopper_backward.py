"""The backward pass of the delta rule for Hopper, in Gluon: one walk back over the chunks makes every gradient.

What `kernels.delta_triton.reverse_kernel` and `kernels.delta_gradients_triton.gradients_kernel` do in two passes: neither the
solved gradients Y nor the gradients of the states reach memory, and queries, keys and gradients of outputs are read once. A
program holds the gradient of a head's whole state in the registers of two warp groups, each of which takes half of the
columns of every product.

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

from kernels.delta_hopper import SIZES, _barriers, _strengths, shared_layout


@gluon.constexpr_function
def _sums(width):
    """Registers of sums that are `width` columns wide, half of them in each warp group."""
    return gl.NVMMADistributedLayout([3, 0], [4, 2], [16, width // 2, 16])


@gluon.jit
def _product(a, b, ROWS: gl.constexpr, COLS: gl.constexpr):
    """Starts a product of two matrices in shared memory."""
    none = gl.zeros([ROWS, COLS], gl.float32, _sums(COLS))
    return warpgroup_mma(a, b, none, use_acc=False, is_async=True)


@gluon.jit
def _later(dg_C, C: gl.constexpr):
    """Sums of each token's and all later tokens' elements."""
    square: gl.constexpr = _sums(C)
    rows, cols = gl.arange(0, C, gl.SliceLayout(1, square)), gl.arange(0, C, gl.SliceLayout(0, square))
    dg_cols = gl.convert_layout(dg_C, gl.SliceLayout(0, square))
    return gl.sum(gl.where(cols[None, :] >= rows[:, None], dg_cols[None, :], 0.0), 1)


@gluon.jit(do_not_specialize=SIZES)
def backward_kernel(
    q, k, do, errors, states, h, dq, dk, dv, beta, g, dlast, dbeta, dgate, dfirst,
    length: tl.int32, heads: tl.int32, group: tl.int32, segments: tl.int32, span: tl.int32,
    K: gl.constexpr, V: gl.constexpr, D: gl.constexpr, C: gl.constexpr,
    GATED: gl.constexpr, GATE_GRAD: gl.constexpr, FIRST: gl.constexpr, DLAST: gl.constexpr, DOT: gl.constexpr,
):  # fmt: skip
    """Grid: (B * H * segments,). D is the width of keys and values on chip; `dgate` is [B, T, H].

    A segment is `span` chunks; `dlast` holds the gradients of the states that leave the segments, from the last to the first.
    """
    part = gl.program_id(0)
    head_index, segment = part // segments, segments - 1 - part % segments
    batch, head = head_index // heads, head_index % heads
    shared_head = head // group
    n_chunks = (length + C - 1) // C
    n_first, last = segment * span, gl.minimum(segment * span + span, n_chunks) - 1
    chunk_0 = head_index * n_chunks
    row = batch.to(gl.int64) * length * heads + head
    g += chunk_0.to(gl.int64) * C

    wide: gl.constexpr = _sums(D)
    square: gl.constexpr = _sums(C)
    i = gl.arange(0, C, gl.SliceLayout(1, wide))
    i_row, i_col = gl.arange(0, C, gl.SliceLayout(1, square)), gl.arange(0, C, gl.SliceLayout(0, square))
    d, e = gl.arange(0, D, gl.SliceLayout(1, wide)), gl.arange(0, D, gl.SliceLayout(0, wide))
    state_offsets, in_state = d[:, None] * V + e[None, :], (d < K)[:, None] & (e < V)[None, :]

    q_CK_s = gl.allocate_shared_memory(DOT, [1, C, D], shared_layout(D))
    k_CK_s = gl.allocate_shared_memory(DOT, [1, C, D], shared_layout(D))
    do_CV_s = gl.allocate_shared_memory(DOT, [1, C, D], shared_layout(D))
    error_CV_s = gl.allocate_shared_memory(DOT, [1, C, D], shared_layout(D))
    state_KV_s = gl.allocate_shared_memory(DOT, [1, D, D], shared_layout(D))
    h_CC_s = gl.allocate_shared_memory(DOT, [1, C, C], shared_layout(C))
    dstate_KV_s = gl.allocate_shared_memory(DOT, [1, D, D], shared_layout(D))
    x_CD_s = gl.allocate_shared_memory(DOT, [1, C, D], shared_layout(D))
    y_CD_s = gl.allocate_shared_memory(DOT, [1, C, D], shared_layout(D))
    z_CD_s = gl.allocate_shared_memory(DOT, [1, C, D], shared_layout(D))
    p_CC_s = gl.allocate_shared_memory(DOT, [1, C, C], shared_layout(C))
    m_CC_s = gl.allocate_shared_memory(DOT, [1, C, C], shared_layout(C))
    qk_bar, rest_bar = _barriers(1).index(0), _barriers(1).index(0)

    dstate = gl.zeros([D, D], gl.float32, wide)
    if DLAST:
        dstate = gl.load(dlast + part.to(gl.int64) * K * V + state_offsets, mask=in_state, other=0.0)
    steps = last - n_first + 1
    q_CK = q_CK_s.index(0)
    k_CK = k_CK_s.index(0)
    do_CV = do_CV_s.index(0)
    error_CV = error_CV_s.index(0)
    state_KV = state_KV_s.index(0)
    h_CC = h_CC_s.index(0)
    dstate_KV = dstate_KV_s.index(0)
    x_CD = x_CD_s.index(0)
    y_CD = y_CD_s.index(0)
    z_CD = z_CD_s.index(0)
    p_CC = p_CC_s.index(0)
    m_CC = m_CC_s.index(0)
    mbarrier.expect(qk_bar, 4 * C * D)
    tma.async_copy_global_to_shared(q, [batch, last * C, shared_head, 0], qk_bar, q_CK)
    tma.async_copy_global_to_shared(k, [batch, last * C, shared_head, 0], qk_bar, k_CK)
    mbarrier.expect(rest_bar, 2 * (2 * C * D + D * D + C * C))
    tma.async_copy_global_to_shared(do, [batch, last * C, head, 0], rest_bar, do_CV)
    tma.async_copy_global_to_shared(h, [chunk_0 + last, 0, 0], rest_bar, h_CC)
    tma.async_copy_global_to_shared(errors, [batch, last * C, head, 0], rest_bar, error_CV)
    tma.async_copy_global_to_shared(states, [chunk_0 + last, 0, 0], rest_bar, state_KV)
    for back in range(steps):
        n = last - back
        zero = gl.minimum(n, 0)
        q_CK = q_CK_s.index(zero)
        k_CK = k_CK_s.index(zero)
        do_CV = do_CV_s.index(zero)
        error_CV = error_CV_s.index(zero)
        state_KV = state_KV_s.index(zero)
        h_CC = h_CC_s.index(zero)
        dstate_KV = dstate_KV_s.index(zero)
        x_CD = x_CD_s.index(zero)
        y_CD = y_CD_s.index(zero)
        z_CD = z_CD_s.index(zero)
        p_CC = p_CC_s.index(zero)
        m_CC = m_CC_s.index(zero)
        start, following = n * C, gl.maximum(n - 1, 0)
        beta_C = _strengths(beta + row, start + i, length, heads)
        beta_row = gl.convert_layout(beta_C, gl.SliceLayout(1, square))
        beta_col = gl.convert_layout(beta_C, gl.SliceLayout(0, square))
        dstate_KV.store(dstate.to(DOT))
        seen = i_row[:, None] >= i_col[None, :]
        if GATED:
            g_C, g_all = gl.load(g + start + i), gl.load(g + start + C - 1)
            g_row = gl.convert_layout(g_C, gl.SliceLayout(1, square))
            g_col = gl.convert_layout(g_C, gl.SliceLayout(0, square))
            since_C, until_C, whole = gl.exp2(g_C), gl.exp2(g_all - g_C), gl.exp2(g_all)
            # Only exponents that are <= 0 are used; those of earlier readers would overflow and are masked before.
            decay_CC = gl.exp2(gl.where(seen, g_row[:, None] - g_col[None, :], float("-inf")))
        fence_async_shared()

        # Y, what reaches each value that was written
        mbarrier.wait(qk_bar, back % 2)
        scores, dwrite = _product(q_CK, k_CK.permute([1, 0]), C, C), _product(k_CK, dstate_KV, C, D)
        scores, dwrite = warpgroup_mma_wait(0, [scores, dwrite])
        if GATED:
            scores, dwrite = scores * decay_CC, dwrite * until_C[:, None]
        else:
            scores = gl.where(seen, scores, 0.0)
        p_CC.store(scores.to(DOT))
        fence_async_shared()
        mbarrier.wait(rest_bar, back % 2)
        dwrite = warpgroup_mma_wait(0, [warpgroup_mma(p_CC.permute([1, 0]), do_CV, dwrite, is_async=True)])
        tma.store_wait(0)
        x_CD.store((dwrite * beta_C[:, None]).to(DOT))
        faded_CV = do_CV
        if GATE_GRAD:
            dg_all = whole * gl.sum(gl.sum(state_KV.load(wide).to(gl.float32) * dstate, 1), 0)
        if GATED:
            z_CD.store((do_CV.load(wide).to(gl.float32) * since_C[:, None]).to(DOT))
            faded_CV = z_CD
            dstate = dstate * whole
        fence_async_shared()
        spread = _product(h_CC.permute([1, 0]), x_CD, C, D)
        dstate = warpgroup_mma(q_CK.permute([1, 0]), faded_CV, dstate, is_async=True)
        spread, dstate = warpgroup_mma_wait(0, [spread, dstate])
        y = dwrite - spread
        y_CD.store(y.to(DOT))
        y = y * beta_C[:, None]
        z_CD.store(y.to(DOT))
        if GATED:
            y = y * since_C[:, None]
        x_CD.store((-y).to(DOT))
        fence_async_shared()
        tma.async_copy_shared_to_global(dv, [batch, start, head, 0], z_CD)
        dstate = warpgroup_mma(k_CK.permute([1, 0]), x_CD, dstate, is_async=True)
        p, m = _product(do_CV, error_CV.permute([1, 0]), C, C), _product(y_CD, error_CV.permute([1, 0]), C, C)
        dstate, p, m = warpgroup_mma_wait(0, [dstate, p, m])

        # What was read later of what was written
        same = i_row[:, None] == i_col[None, :]
        t_row = start + i_row
        dbeta_C = gl.sum(gl.where(same, m, 0.0), 1)
        gl.store(dbeta + row + t_row.to(gl.int64) * heads, dbeta_C.to(dbeta.dtype.element_ty), mask=t_row < length)
        p, m = p * beta_col[None, :], m * (-beta_row[:, None] * beta_col[None, :])
        if GATED:
            p, m = p * decay_CC, m * decay_CC
        if GATE_GRAD:
            # What a token reads of itself would cancel in the gradient of the decays, and drown small gradients.
            own_C = gl.convert_layout(gl.sum(gl.where(same, p, 0.0), 1), gl.SliceLayout(1, wide))
            seen = i_row[:, None] > i_col[None, :]
        p_CC.store(gl.where(seen, p, 0.0).to(DOT))
        m_CC.store(gl.where(i_row[:, None] > i_col[None, :], m, 0.0).to(DOT))
        fence_async_shared()
        reads, erased = _product(do_CV, state_KV.permute([1, 0]), C, D), _product(y_CD, state_KV.permute([1, 0]), C, D)
        reads, erased = warpgroup_mma_wait(0, [reads, erased])
        erased = erased * -beta_C[:, None]
        if GATED:
            reads, erased = reads * since_C[:, None], erased * since_C[:, None]
        reads = warpgroup_mma(p_CC, k_CK, reads, is_async=True)
        erased = warpgroup_mma(m_CC, k_CK, erased, is_async=True)
        writes = _product(error_CV, dstate_KV.permute([1, 0]), C, D)
        reads, erased, writes = warpgroup_mma_wait(0, [reads, erased, writes])
        if GATE_GRAD:
            k_wide = k_CK.load(wide).to(gl.float32)
            dg_C = gl.sum(q_CK.load(wide).to(gl.float32) * reads + k_wide * erased, 1)
            reads += own_C[:, None] * k_wide
        x_CD.store(reads.to(DOT))
        writes = writes * beta_C[:, None]
        if GATED:
            writes = writes * until_C[:, None]
        if GATE_GRAD:
            dg_all += gl.sum(gl.sum(writes * k_CK.load(wide).to(gl.float32), 1), 0)
        fence_async_shared()
        tma.async_copy_shared_to_global(dq, [batch, start, head, 0], x_CD)
        writes = warpgroup_mma(p_CC.permute([1, 0]), q_CK, writes, is_async=True)
        writes = warpgroup_mma(m_CC.permute([1, 0]), k_CK, writes, is_async=True)
        writes = warpgroup_mma_wait(0, [writes])
        if GATE_GRAD:
            dg_C -= gl.sum(k_CK.load(wide).to(gl.float32) * writes, 1)
            gl.store(dgate + row + t_row.to(gl.int64) * heads, _later(dg_C, C) + dg_all, mask=t_row < length)
            writes += own_C[:, None] * q_CK.load(wide).to(gl.float32)
        y_CD.store((erased + writes).to(DOT))
        fence_async_shared()
        tma.async_copy_shared_to_global(dk, [batch, start, head, 0], y_CD)
        mbarrier.expect(qk_bar, 4 * C * D)
        tma.async_copy_global_to_shared(q, [batch, following * C, shared_head, 0], qk_bar, q_CK)
        tma.async_copy_global_to_shared(k, [batch, following * C, shared_head, 0], qk_bar, k_CK)
        mbarrier.expect(rest_bar, 2 * (2 * C * D + D * D + C * C))
        tma.async_copy_global_to_shared(do, [batch, following * C, head, 0], rest_bar, do_CV)
        tma.async_copy_global_to_shared(h, [chunk_0 + following, 0, 0], rest_bar, h_CC)
        tma.async_copy_global_to_shared(errors, [batch, following * C, head, 0], rest_bar, error_CV)
        tma.async_copy_global_to_shared(states, [chunk_0 + following, 0, 0], rest_bar, state_KV)
    mbarrier.wait(qk_bar, steps % 2)
    mbarrier.wait(rest_bar, steps % 2)
    tma.store_wait(0)
    if FIRST:
        in_state = in_state & (segment == 0)
        gl.store(dfirst + head_index.to(gl.int64) * K * V + state_offsets, dstate, mask=in_state)
