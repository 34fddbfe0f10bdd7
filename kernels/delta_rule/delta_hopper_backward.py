"""The backward pass of the delta rule for Hopper, in Gluon: one walk back over the chunks makes every gradient.

What `delta_triton.reverse_kernel` and `delta_gradients_triton.gradients_kernel` do in two passes: neither the
solved gradients Y nor the gradients of the states reach memory, and queries, keys and gradients of outputs are read once. A
program holds the gradient of a head's whole state in the registers of two warp groups, each of which takes half of the
columns of every product.

Shape legend: B batch, T time, H heads, N chunks, C = 64 tokens of a chunk, K key, V value width, D the width of both on chip.
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
from kernels.delta_rule.delta_hopper import SIZES, barriers, columns_of, fetch, given_state, place, shared_layout


@gluon.constexpr_function
def _sums(width):
    """Registers of sums that are `width` columns wide, half of them in each warp group."""
    return gl.NVMMADistributedLayout([3, 0], [4, 2], [16, width // 2, 16])


@gluon.jit
def _buffer(ROWS: gl.constexpr, COLS: gl.constexpr, DOT: gl.constexpr):
    """A matrix in shared memory behind an index, see `_views`."""
    return gl.allocate_shared_memory(DOT, [1, ROWS, COLS], shared_layout(COLS))


@gluon.jit
def _views(buffers, zero):
    """The matrices behind a number that only the chip knows to be zero.

    Under a constant index the compiler would keep each product's descriptors in registers over the whole walk, and spill.
    """
    views = ()
    for index in gl.static_range(len(buffers)):
        views = views + (buffers[index].index(zero),)
    return views


@gluon.jit
def _fetch(sources, views, bars, batch, start, head, shared_head, chunk, C: gl.constexpr, D: gl.constexpr):
    """Starts to copy what a chunk needs: q and k, which are needed first, on the first barrier, the rest on the second."""
    q, k, do, errors, states, h = sources
    row, key_row, matrix = [batch, start, head, 0], [batch, start, shared_head, 0], [chunk, 0, 0]
    fetch(bars[0], 4 * C * D, (q, k), (key_row, key_row), (views[0], views[1]))
    places, targets = (row, matrix, row, matrix), (views[2], views[5], views[3], views[4])
    fetch(bars[1], 2 * (2 * C * D + D * D + C * C), (do, h, errors, states), places, targets)


@gluon.jit
def _product(a, b, ROWS: gl.constexpr, COLS: gl.constexpr):
    """Starts a product of two matrices in shared memory."""
    none = gl.zeros([ROWS, COLS], gl.float32, _sums(COLS))
    return warpgroup_mma(a, b, none, use_acc=False, is_async=True)


@gluon.jit
def _add(a, b, sums):
    """Starts a product that is added to sums."""
    return warpgroup_mma(a, b, sums, is_async=True)


@gluon.jit
def _scaled(x, by_C, SCALE: gl.constexpr):
    """Rows times factors, if they are to be."""
    if SCALE:
        x = x * by_C[:, None]
    return x


@gluon.jit
def _decays(g, start, C: gl.constexpr, D: gl.constexpr, GATED: gl.constexpr):
    """Decays of tokens since the chunk began and until it ends, of the whole chunk, and of pairs: zero from later to earlier."""
    square: gl.constexpr = _sums(C)
    i_row, i_col = gl.arange(0, C, gl.SliceLayout(1, square)), gl.arange(0, C, gl.SliceLayout(0, square))
    seen = i_row[:, None] >= i_col[None, :]
    decays = (1.0, 1.0, 1.0, seen)
    if GATED:
        g_C = gl.load(g + start + gl.arange(0, C, gl.SliceLayout(1, _sums(D))))
        g_all = gl.load(g + start + C - 1)
        g_row, g_col = gl.convert_layout(g_C, gl.SliceLayout(1, square)), gl.convert_layout(g_C, gl.SliceLayout(0, square))
        # Only exponents that are <= 0 are used; those of earlier readers would overflow and are masked before.
        pair_CC = gl.exp2(gl.where(seen, g_row[:, None] - g_col[None, :], float("-inf")))
        decays = (gl.exp2(g_C), gl.exp2(g_all - g_C), gl.exp2(g_all), pair_CC)
    return decays


@gluon.jit
def _masked(x_CC, pair_CC, GATED: gl.constexpr):
    """Pairs of a token and an earlier one or itself, decayed."""
    return x_CC * pair_CC if GATED else gl.where(pair_CC, x_CC, 0.0)


@gluon.jit
def _solve(
    views, bars, phase, dstate, beta_C, decays, C: gl.constexpr, D: gl.constexpr, DOT: gl.constexpr, GATED: gl.constexpr
):  # fmt: skip
    """Y, in registers and, as Y and -beta Y since the chunk began, in shared memory; and the gradient of the state before k Y^T."""
    q_CK, k_CK, do_CV, _, _, h_CC, dstate_KV, x_CD, y_CD, z_CD, p_CC, _ = views
    since_C, until_C, whole, pair_CC = decays
    mbarrier.wait(bars[0], phase)
    scores, dwrite = _product(q_CK, k_CK.permute([1, 0]), C, C), _product(k_CK, dstate_KV, C, D)
    scores, dwrite = warpgroup_mma_wait(0, [scores, dwrite])
    p_CC.store(_masked(scores, pair_CC, GATED).to(DOT))
    fence_async_shared()
    mbarrier.wait(bars[1], phase)
    dwrite = _add(p_CC.permute([1, 0]), do_CV, _scaled(dwrite, until_C, GATED))
    dwrite = warpgroup_mma_wait(0, [dwrite])
    tma.store_wait(0)
    x_CD.store((dwrite * beta_C[:, None]).to(DOT))
    faded_CV = do_CV
    if GATED:
        z_CD.store((do_CV.load(_sums(D)).to(gl.float32) * since_C[:, None]).to(DOT))
        faded_CV = z_CD
        dstate = dstate * whole
    fence_async_shared()
    spread = _product(h_CC.permute([1, 0]), x_CD, C, D)
    dstate = _add(q_CK.permute([1, 0]), faded_CV, dstate)
    spread, dstate = warpgroup_mma_wait(0, [spread, dstate])
    y = dwrite - spread
    y_CD.store(y.to(DOT))
    y = y * beta_C[:, None]
    z_CD.store(y.to(DOT))
    x_CD.store((-_scaled(y, since_C, GATED)).to(DOT))
    fence_async_shared()
    return dstate


@gluon.jit
def _pairs(
    views, dstate, beta_C, pair_CC, dbeta, heads, t_C, length,
    C: gl.constexpr, D: gl.constexpr, DOT: gl.constexpr, GATED: gl.constexpr, GATE_GRAD: gl.constexpr,
):  # fmt: skip
    """What was read later, with q and with k, of what was written, in shared memory; and the gradient of the state."""
    _, k_CK, do_CV, error_CV, _, _, _, x_CD, y_CD, _, p_CC, m_CC = views
    square: gl.constexpr = _sums(C)
    i_row, i_col = gl.arange(0, C, gl.SliceLayout(1, square)), gl.arange(0, C, gl.SliceLayout(0, square))
    dstate = _add(k_CK.permute([1, 0]), x_CD, dstate)
    p, m = _product(do_CV, error_CV.permute([1, 0]), C, C), _product(y_CD, error_CV.permute([1, 0]), C, C)
    dstate, p, m = warpgroup_mma_wait(0, [dstate, p, m])
    same, later = i_row[:, None] == i_col[None, :], i_row[:, None] > i_col[None, :]
    dbeta_C = gl.convert_layout(gl.sum(gl.where(same, m, 0.0), 1), gl.SliceLayout(1, _sums(D)))
    gl.store(dbeta + t_C.to(gl.int64) * heads, dbeta_C.to(dbeta.dtype.element_ty), mask=t_C < length)
    beta_row, beta_col = gl.convert_layout(beta_C, gl.SliceLayout(1, square)), gl.convert_layout(beta_C, gl.SliceLayout(0, square))
    p, m = _masked(p * beta_col[None, :], pair_CC, GATED), m * (-beta_row[:, None] * beta_col[None, :])
    own_C = beta_C
    if GATED:
        m = m * pair_CC
    if GATE_GRAD:
        # What a token reads of itself would cancel in the gradient of the decays, and drown small gradients.
        own_C = gl.convert_layout(gl.sum(gl.where(same, p, 0.0), 1), gl.SliceLayout(1, _sums(D)))
        p = gl.where(later, p, 0.0)
    p_CC.store(p.to(DOT))
    m_CC.store(gl.where(later, m, 0.0).to(DOT))
    fence_async_shared()
    return dstate, own_C


@gluon.jit
def _later(dg_C, C: gl.constexpr):
    """Sums of each token's and all later tokens' elements."""
    square: gl.constexpr = _sums(C)
    rows, cols = gl.arange(0, C, gl.SliceLayout(1, square)), gl.arange(0, C, gl.SliceLayout(0, square))
    dg_cols = gl.convert_layout(dg_C, gl.SliceLayout(0, square))
    return gl.sum(gl.where(cols[None, :] >= rows[:, None], dg_cols[None, :], 0.0), 1)


@gluon.jit
def _gradients(
    views, targets, at, own_C, beta_C, decays, dg_all, dgate, heads, t_C, length,
    C: gl.constexpr, D: gl.constexpr, DOT: gl.constexpr, GATED: gl.constexpr, GATE_GRAD: gl.constexpr,
):  # fmt: skip
    """Gradients of queries, keys and decays."""
    q_CK, k_CK, do_CV, error_CV, state_KV, _, dstate_KV, x_CD, y_CD, _, p_CC, m_CC = views
    wide: gl.constexpr = _sums(D)
    since_C, until_C, _, _ = decays
    reads, erased = _product(do_CV, state_KV.permute([1, 0]), C, D), _product(y_CD, state_KV.permute([1, 0]), C, D)
    reads, erased = warpgroup_mma_wait(0, [reads, erased])
    reads, erased = _scaled(reads, since_C, GATED), _scaled(erased * -beta_C[:, None], since_C, GATED)
    reads, erased = _add(p_CC, k_CK, reads), _add(m_CC, k_CK, erased)
    writes = _product(error_CV, dstate_KV.permute([1, 0]), C, D)
    reads, erased, writes = warpgroup_mma_wait(0, [reads, erased, writes])
    writes = _scaled(writes * beta_C[:, None], until_C, GATED)
    if GATE_GRAD:
        k_wide = k_CK.load(wide).to(gl.float32)
        dg_C = gl.sum(q_CK.load(wide).to(gl.float32) * reads + k_wide * erased, 1)
        dg_all += gl.sum(gl.sum(writes * k_wide, 1), 0)
        reads += own_C[:, None] * k_wide
    x_CD.store(reads.to(DOT))
    fence_async_shared()
    tma.async_copy_shared_to_global(targets[0], at, x_CD)
    writes = _add(m_CC.permute([1, 0]), k_CK, _add(p_CC.permute([1, 0]), q_CK, writes))
    writes = warpgroup_mma_wait(0, [writes])
    if GATE_GRAD:
        dg_C -= gl.sum(k_CK.load(wide).to(gl.float32) * writes, 1)
        later_C = gl.convert_layout(_later(dg_C, C), gl.SliceLayout(1, wide))
        gl.store(dgate + t_C.to(gl.int64) * heads, later_C + dg_all, mask=t_C < length)
        writes += own_C[:, None] * q_CK.load(wide).to(gl.float32)
    y_CD.store((erased + writes).to(DOT))
    fence_async_shared()
    tma.async_copy_shared_to_global(targets[1], at, y_CD)


@entry(do_not_specialize=SIZES, gluon=True)
def backward_kernel(
    q, k, do, errors, states, h, dq, dk, dv, beta, g, dlast, dbeta, dgate, dfirst,
    length: tl.int32, heads: tl.int32, group: tl.int32, segments: tl.int32, span: tl.int32,
    K: gl.constexpr, V: gl.constexpr, D: gl.constexpr, C: gl.constexpr,
    GATED: gl.constexpr, GATE_GRAD: gl.constexpr, FIRST: gl.constexpr, DLAST: gl.constexpr, DOT: gl.constexpr,
):  # fmt: skip
    """Grid: (B * H * segments,). `dgate` is [B, T, H].

    A segment is `span` chunks; `dlast` holds the gradients of the states that leave the segments, from the last to the first.
    """
    part, n_chunks = gl.program_id(0), (length + C - 1) // C
    head_index, order, n_first, n_last = place(part, segments, segments, span, n_chunks, True)
    batch, head, chunk_0 = head_index // heads, head_index % heads, head_index * n_chunks
    row = batch.to(gl.int64) * length * heads + head
    beta, dbeta, dgate, g = beta + row, dbeta + row, dgate + row, g + chunk_0.to(gl.int64) * C
    wide: gl.constexpr = _sums(D)
    i = gl.arange(0, C, gl.SliceLayout(1, wide))
    buffers = (
        _buffer(C, D, DOT), _buffer(C, D, DOT), _buffer(C, D, DOT), _buffer(C, D, DOT), _buffer(D, D, DOT), _buffer(C, C, DOT),
        _buffer(D, D, DOT), _buffer(C, D, DOT), _buffer(C, D, DOT), _buffer(C, D, DOT), _buffer(C, C, DOT), _buffer(C, C, DOT),
    )  # fmt: skip
    bars = (barriers(1).index(0), barriers(1).index(0))
    sources = (q, k, do, errors, states, h)

    dstate = given_state(dlast, part, wide, 0, V, K, D, D, DLAST)
    _fetch(sources, _views(buffers, 0), bars, batch, n_last * C, head, head // group, chunk_0 + n_last, C, D)
    steps = n_last - n_first + 1
    for back in range(steps):
        n = n_last - back
        views = _views(buffers, gl.minimum(n, 0))
        t_C = n * C + i
        beta_C = gl.load(beta + t_C.to(gl.int64) * heads, mask=t_C < length, other=0.0).to(gl.float32)
        decays = _decays(g, n * C, C, D, GATED)
        views[6].store(dstate.to(DOT))
        fence_async_shared()
        dstate = _solve(views, bars, back % 2, dstate, beta_C, decays, C, D, DOT, GATED)
        tma.async_copy_shared_to_global(dv, [batch, n * C, head, 0], views[9])
        dg_all = 0.0
        if GATE_GRAD:
            dg_all = decays[2] * gl.sum(gl.sum(views[4].load(wide).to(gl.float32) * views[6].load(wide).to(gl.float32), 1), 0)
        dstate, own_C = _pairs(views, dstate, beta_C, decays[3], dbeta, heads, t_C, length, C, D, DOT, GATED, GATE_GRAD)
        _gradients(
            views, (dq, dk), [batch, n * C, head, 0], own_C, beta_C, decays, dg_all, dgate, heads, t_C, length,
            C, D, DOT, GATED, GATE_GRAD,
        )  # fmt: skip
        following = gl.maximum(n - 1, 0)
        _fetch(sources, views, bars, batch, following * C, head, head // group, chunk_0 + following, C, D)
    mbarrier.wait(bars[0], steps % 2)
    mbarrier.wait(bars[1], steps % 2)
    tma.store_wait(0)
    if FIRST:
        offsets, inside = columns_of(wide, 0, V, K, D, D)
        gl.store(dfirst + head_index.to(gl.int64) * K * V + offsets, dstate, mask=inside & (order == segments - 1))
