"""A forward walk with fewer registers and a shorter chain; H from memory, or made by a further warp group beside the walk.

Shape legend: B batch, T time, H heads, N chunks, C = 64 tokens of a chunk, K key, V value width, W chunks at a time,
S = 16 tokens of a block.
"""

from __future__ import annotations

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from kernels.walk_triton import LOG2_E
from trial.hopper import (
    SIZES,
    arrived,
    barriers,
    columns_of,
    factors_of,
    fetch,
    given_state,
    in_turn,
    place,
    scaled,
    shared_layout,
    sums_layout,
)

S = tl.constexpr(16)


@gluon.jit
def _buffers(BK: gl.constexpr, BV: gl.constexpr, C: gl.constexpr, DOT: gl.constexpr):
    """Queries and keys of two chunks; decays; values, the state, two matrices like values, scores."""
    q_buffers = gl.allocate_shared_memory(DOT, [2, C, BK], shared_layout(BK))
    k_buffers = gl.allocate_shared_memory(DOT, [2, C, BK], shared_layout(BK))
    v_buffer = gl.allocate_shared_memory(DOT, [C, BV], shared_layout(BV))
    state_buffer = gl.allocate_shared_memory(DOT, [BK, BV], shared_layout(BV))
    error_buffer = gl.allocate_shared_memory(DOT, [C, BV], shared_layout(BV))
    write_buffer = gl.allocate_shared_memory(DOT, [C, BV], shared_layout(BV))
    scores_buffer = gl.allocate_shared_memory(DOT, [C, C], shared_layout(C))
    g_buffer = gl.allocate_shared_memory(gl.float32, [C], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    return (q_buffers, k_buffers), g_buffer, (v_buffer, state_buffer, error_buffer, write_buffer, scores_buffer)


@gluon.jit
def _masked(scores_CC, g_C, g_buffer, C: gl.constexpr, GROUPS: gl.constexpr, GATED: gl.constexpr):
    """Scores of tokens and earlier ones, decayed."""
    square: gl.constexpr = sums_layout(C, GROUPS)
    rows, cols = gl.arange(0, C, gl.SliceLayout(1, square)), gl.arange(0, C, gl.SliceLayout(0, square))
    seen = rows[:, None] >= cols[None, :]
    if GATED:
        fall_CC = gl.convert_layout(g_C, gl.SliceLayout(1, square))[:, None] - g_buffer.load(gl.SliceLayout(0, square))[None, :]
        # Only exponents that are <= 0 are used; the others would overflow and are masked before.
        return scores_CC * gl.exp2(gl.where(seen, fall_CC, float("-inf")))
    else:
        return gl.where(seen, scores_CC, 0.0)


@gluon.jit
def _chunk(
    q_CK, k_CK, h_CC, buffers, g_buffer, qk_bars, v_bars, phase, state_KV, beta_C, g_C, g_all, out, kept, places,
    C: gl.constexpr, BV: gl.constexpr, GROUPS: gl.constexpr, GATED: gl.constexpr, KEEP: gl.constexpr, DOT: gl.constexpr,
):  # fmt: skip
    """Starts a chunk's last two products, of the next state and of the outputs."""
    v_buffer, state_buffer, error_buffer, write_buffer, scores_buffer = buffers
    errors, states = kept
    at_o, at_state = places
    square: gl.constexpr = sums_layout(C, GROUPS)
    narrow: gl.constexpr = sums_layout(BV, GROUPS)
    none_CV = gl.zeros([C, BV], gl.float32, narrow)
    arrived(qk_bars, phase // 2 % 2)
    read = warpgroup_mma(k_CK, state_buffer, none_CV, use_acc=False, is_async=True)
    scores = gl.zeros([C, C], gl.float32, square)
    scores = warpgroup_mma(q_CK, k_CK.permute([1, 0]), scores, use_acc=False, is_async=True)
    if KEEP:
        tma.async_copy_shared_to_global(states, at_state, state_buffer)
    arrived(v_bars, phase % 2)
    value_CV = v_buffer.load(narrow).to(gl.float32)
    read_CV, scores = warpgroup_mma_wait(1, [read, scores])
    error_CV = value_CV - scaled(read_CV, g_C, GATED)
    tma.store_wait(0)
    error_buffer.store((error_CV * -beta_C[:, None]).to(DOT))
    scores_CC = warpgroup_mma_wait(0, [scores])
    scores_buffer.store(_masked(scores_CC, g_C, g_buffer, C, GROUPS, GATED).to(DOT))
    fence_async_shared()
    error = warpgroup_mma(h_CC, error_buffer, error_CV, is_async=True)
    asked = warpgroup_mma(q_CK, state_buffer, none_CV, use_acc=False, is_async=True)
    error_CV, asked = warpgroup_mma_wait(1, [error, asked])
    write_CV = error_CV * beta_C[:, None]
    write_buffer.store(write_CV.to(DOT))
    fade_buffer = write_buffer
    if KEEP:
        v_buffer.store(error_CV.to(DOT))
    if GATED:
        state_KV, fade_buffer = state_KV * gl.exp2(g_all), error_buffer
        error_buffer.store((write_CV * gl.exp2(g_all - g_C)[:, None]).to(DOT))
    fence_async_shared()
    state = warpgroup_mma(k_CK.permute([1, 0]), fade_buffer, state_KV, is_async=True)
    if GATED:
        asked = scaled(warpgroup_mma_wait(1, [asked]), g_C, GATED)
    written = warpgroup_mma(scores_buffer, write_buffer, asked, is_async=True)
    if KEEP:
        tma.async_copy_shared_to_global(errors, at_o, v_buffer)
    return state, written


@gluon.jit
def _walk(
    descriptors, pointers, state_KV, h_buffers, h_bars, ready_bars, free_bars, buffers, g_buffer, qk_buffers, qk_bars, v_bars,
    batch, head, shared_head, chunk_0, n_first, n_last, e_start, length, heads,
    BK: gl.constexpr, BV: gl.constexpr, GROUPS: gl.constexpr, C: gl.constexpr,
    GATED: gl.constexpr, KEEP: gl.constexpr, FUSED: gl.constexpr, W: gl.constexpr, DOT: gl.constexpr,
):  # fmt: skip
    """Walks over the chunks of a segment; the state that leaves it."""
    q, k, v, h, o, errors, states = descriptors
    beta, g = pointers
    i = gl.arange(0, C, gl.SliceLayout(1, sums_layout(BV, GROUPS)))
    v_buffer, out_buffer = buffers[0], buffers[2]
    steps = n_last - n_first + 1
    at_qk, at_v = [batch, n_first * C, shared_head, 0], [batch, n_first * C, head, e_start]
    fetch(in_turn(qk_bars, 0), (C * BK, C * BK), (q, k), (at_qk, at_qk), in_turn(qk_buffers, 0))
    fetch(v_bars, (C * BV,), (v,), (at_v,), (v_buffer,))
    if FUSED:
        mbarrier.wait(ready_bars.index(0), 0)
    else:
        fetch(in_turn((h_bars,), 0), (C * C,), (h,), ([chunk_0 + n_first, 0, 0],), in_turn((h_buffers,), 0))
    beta_C, g_C, g_all = factors_of(beta, g, n_first, i, length, heads, C, GATED)
    buffers[1].store(state_KV.to(DOT))
    if GATED:
        g_buffer.store(g_C)
    fence_async_shared()
    for n in range(n_first, n_last + 1):
        step, following = n - n_first, gl.minimum(n + 1, n_last)
        at_qk, at_v, at_o = (
            [batch, following * C, shared_head, 0],
            [batch, following * C, head, e_start],
            [batch, n * C, head, e_start],
        )
        q_CK, k_CK = in_turn(qk_buffers, step)
        fetch(in_turn(qk_bars, step + 1), (C * BK, C * BK), (q, k), (at_qk, at_qk), in_turn(qk_buffers, step + 1))
        if FUSED:
            h_CC = h_buffers.index(step % (2 * W))
        else:
            h_CC = h_buffers.index(step % 2)
            fetch(in_turn((h_bars,), step + 1), (C * C,), (h,), ([chunk_0 + following, 0, 0],), in_turn((h_buffers,), step + 1))
            arrived(in_turn((h_bars,), step), step // 2 % 2)
        state, written = _chunk(
            q_CK, k_CK, h_CC, buffers, g_buffer, in_turn(qk_bars, step), v_bars, step, state_KV, beta_C, g_C, g_all, o,
            (errors, states), (at_o, [chunk_0 + n, 0, e_start]), C, BV, GROUPS, GATED, KEEP, DOT,
        )  # fmt: skip
        if FUSED:
            # H of four chunks was read when the first of the last two products began.
            mbarrier.arrive(free_bars.index(step // W % 2), count=1, pred=step % W == W - 1)
            ahead = following - n_first
            mbarrier.wait(ready_bars.index(ahead // W % 2), ahead // W // 2 % 2)
        beta_C, g_C, g_all = factors_of(beta, g, following, i, length, heads, C, GATED)
        if KEEP:
            tma.store_wait(0)
        fetch(v_bars, (C * BV,), (v,), (at_v,), (v_buffer,))
        # The next state is stored while the last product runs, once all warps have read the old one.
        state_KV, written = warpgroup_mma_wait(1, [state, written])
        gl.thread_barrier()
        buffers[1].store(state_KV.to(DOT))
        o_CV = warpgroup_mma_wait(0, [written])
        if GATED:
            g_buffer.store(g_C)
        out_buffer.store(o_CV.to(DOT))
        fence_async_shared()
        tma.async_copy_shared_to_global(o, at_o, out_buffer)
    arrived(in_turn(qk_bars, steps), steps // 2 % 2)
    arrived(v_bars, steps % 2)
    if not FUSED:
        arrived(in_turn((h_bars,), steps), steps // 2 % 2)
    tma.store_wait(0)
    return state_KV


@gluon.jit
def _product(a, b, sums, LAYOUT: gl.constexpr):
    """A product of blocks of 16 rows and columns, one for each warp."""
    a, b = gl.convert_layout(a, gl.DotOperandLayout(0, LAYOUT, 2)), gl.convert_layout(b, gl.DotOperandLayout(1, LAYOUT, 2))
    return mma_v2(a, b, sums)


@gluon.jit
def _turned(x):
    return x.permute([0, 2, 1])


@gluon.jit
def _grams(
    k, stride, n_C, length, K: gl.constexpr, BK: gl.constexpr, C: gl.constexpr, UNIT: gl.constexpr, W: gl.constexpr,
    LAYOUT: gl.constexpr,
):  # fmt: skip
    """Products K_J K_I^T of blocks of rows, J <= I, of W chunks, in the order (0, 0), (1, 0), (1, 1), (2, 0), ..."""
    rows_of: gl.constexpr = gl.BlockedLayout([1, 1, 8], [1, 8, 4], [W, 1, 1], [2, 1, 0])
    w = gl.arange(0, W, gl.SliceLayout(1, gl.SliceLayout(2, rows_of)))
    i = gl.arange(0, S, gl.SliceLayout(0, gl.SliceLayout(2, rows_of)))
    d = gl.arange(0, 32, gl.SliceLayout(0, gl.SliceLayout(1, rows_of)))
    none = gl.zeros([W, S, S], gl.float32, LAYOUT)
    sums = ()
    for _ in gl.static_range(C // S * (C // S + 1) // 2):
        sums = sums + (none,)  # noqa: RUF005
    for first in range(0, BK, 32):  # not unrolled, for the loads of all turns would take registers
        rows = ()
        for block in gl.static_range(C // S):
            t = (n_C + w)[:, None] * C + (block * S + i)[None, :]
            inside = (t < length)[:, :, None] & (first + d < K)[None, None, :]
            x = gl.load(k + t.to(gl.int64)[:, :, None] * stride * UNIT + (first + d)[None, None, :], mask=inside, other=0.0)
            # Eight columns of a lane go to the places that it has in two products; the order of a sum's terms is free.
            x = x.reshape([W, S, 4, 2, 2, 2]).permute([0, 1, 3, 4, 2, 5]).reshape([W, S, 32])
            rows = rows + (x,)  # noqa: RUF005
        more = ()
        for a in gl.static_range(C // S):
            for b in gl.static_range(a + 1):
                more = more + (_product(rows[b], _turned(rows[a]), sums[a * (a + 1) // 2 + b], LAYOUT),)  # noqa: RUF005
        sums = more
    return sums


@gluon.jit
def _decays(gate, stride, n_C, length, C: gl.constexpr, W: gl.constexpr, LAYOUT: gl.constexpr, zero):
    """Log2 decays of each block's tokens, cumulated from the start of the chunk; padding does not decay."""
    w = gl.arange(0, W, gl.SliceLayout(1, gl.SliceLayout(1, LAYOUT)))
    i = gl.arange(0, S, gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT)))
    rows, cols = gl.arange(0, S, gl.SliceLayout(0, gl.SliceLayout(2, LAYOUT))), i
    until = rows[None, :, None] >= cols[None, None, :]
    blocks = ()
    before = 0.0
    for block in gl.static_range(C // S):
        t = (n_C + w)[:, None] * C + (block * S + i + zero)[None, :]
        step = gl.load(gate + t.to(gl.int64) * stride, mask=t < length, other=0.0).to(gl.float32) * LOG2_E
        sums = gl.sum(gl.where(until, step[:, None, :], 0.0), 2) + before
        blocks = blocks + (sums,)  # noqa: RUF005
        last = gl.sum(gl.where((rows == S - 1)[None, :], sums, 0.0), 1)
        before = gl.convert_layout(last, gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT)))[:, None]
    return blocks


@gluon.jit
def _diagonal(x, xt, beta_rows, beta_cols, i_row, i_col, MERGE: gl.constexpr, W: gl.constexpr, LAYOUT: gl.constexpr):
    """A and H of a block on the diagonal from X and its transpose: A, H, and H transposed, as `kernels.delta_coupling_triton`."""
    none = gl.zeros([W, S, S], gl.float32, LAYOUT)
    one = gl.where(i_row == i_col, 1.0, 0.0)
    pair = (i_row >> 1) == (i_col >> 1)
    lt = xt * -beta_rows[:, :, None]
    a, at = gl.where(pair, one + x * -beta_cols[:, None, :], 0.0), gl.where(pair, one + lt, 0.0)
    for level in gl.static_range(1, 4):
        earlier, near = (i_row >> level) < (i_col >> level), (i_row >> (level + 1)) == (i_col >> (level + 1))
        part = _turned(gl.where(earlier & near, lt, 0.0).to(MERGE))
        left, right = a.to(MERGE), at.to(MERGE)
        step = _product(left, part, none, LAYOUT).to(MERGE)
        a = _product(step, _turned(right), a, LAYOUT)
        at = _product(right, _turned(step), at, LAYOUT)
    a, xt = a.to(MERGE), xt.to(MERGE)
    return a, _product(a, _turned(xt), none, LAYOUT), _product(xt, _turned(a), none, LAYOUT).to(MERGE)


@gluon.jit
def _couple(
    h_buffer, k, beta, gate, g, k_t, gate_t, n_C, n_last, length, heads,
    K: gl.constexpr, BK: gl.constexpr, C: gl.constexpr, UNIT: gl.constexpr, GATED: gl.constexpr, DOT: gl.constexpr,
    MERGE: gl.constexpr, W: gl.constexpr,
):  # fmt: skip
    """H of the chunks n_C + w, w < W, into shared memory [W, C, C], their cumulated decays into memory."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [W, 1, 1], [1, 16, 8])
    of_rows: gl.constexpr = gl.SliceLayout(2, layout)
    of_cols: gl.constexpr = gl.SliceLayout(1, layout)
    BLOCKS: gl.constexpr = C // S
    # Known to be zero by the chip only, as in `kernels.delta_coupling_triton`.
    zero = gl.minimum(length, 0)
    i, j = gl.arange(0, S, gl.SliceLayout(0, of_rows)) + zero, gl.arange(0, S, gl.SliceLayout(0, of_cols)) + zero
    i_row, i_col = i[None, :, None], j[None, None, :]
    w_row = gl.arange(0, W, gl.SliceLayout(1, of_rows))
    none = gl.zeros([W, S, S], gl.float32, layout)
    grams = _grams(k, k_t, n_C, length, K, BK, C, UNIT, W, layout)
    decays = ()
    if GATED:
        decays = _decays(gate, gate_t, n_C, length, C, W, layout, zero)
        for block in gl.static_range(BLOCKS):
            n_row = (n_C + w_row)[:, None]
            inside = (n_row <= n_last) & (i >= 0)[None, :]
            gl.store(g + n_row * C + (block * S + i)[None, :], decays[block], mask=inside)
    # What is left of the diagonal, rounded: half of the registers.
    lower = ()
    for row in gl.static_range(1, BLOCKS):
        for col in gl.static_range(row):
            xt = grams[row * (row + 1) // 2 + col]
            if GATED:
                xt = xt * gl.exp2(gl.convert_layout(decays[row], of_cols)[:, None, :] - decays[col][:, :, None])
            lower = lower + (xt.to(MERGE),)  # noqa: RUF005
    betas = ()
    solved = ()
    transposed = ()
    for block in gl.static_range(BLOCKS):
        t = (n_C + w_row)[:, None] * C + (block * S + i)[None, :]
        beta_rows = gl.load(beta + t.to(gl.int64) * heads, mask=t < length, other=0.0).to(gl.float32)
        beta_cols = gl.convert_layout(beta_rows, of_cols)
        gram = grams[block * (block + 1) // 2 + block]
        if GATED:
            fall = decays[block][:, :, None] - gl.convert_layout(decays[block], of_cols)[:, None, :]
            x = gram * gl.exp2(gl.where(i_row > i_col, fall, float("-inf")))
            xt = gram * gl.exp2(gl.where(i_row < i_col, -fall, float("-inf")))
        else:
            x, xt = gl.where(i_row > i_col, gram, 0.0), gl.where(i_row < i_col, gram, 0.0)
        a, h, ht = _diagonal(x, xt, beta_rows, beta_cols, i_row, i_col, MERGE, W, layout)
        h_buffer.slice(block * S, S, 1).slice(block * S, S, 2).store(h.to(DOT))
        solved, transposed, betas = solved + (a,), transposed + (ht,), betas + (beta_cols,)  # noqa: RUF005
    for row in gl.static_range(1, BLOCKS):
        left = (solved[row],)
        for back in gl.static_range(1, row + 1):
            p = none
            for step in gl.static_range(back):
                xt = lower[(row - step) * (row - step - 1) // 2 + row - back]
                p = _product(left[step], _turned(xt), p, layout)
            minus = -betas[row - back][:, None, :]
            p = _product((p * minus).to(MERGE), _turned(transposed[row - back]), p, layout)
            h_buffer.slice(row * S, S, 1).slice((row - back) * S, S, 2).store(p.to(DOT))
            h_buffer.slice((row - back) * S, S, 1).slice(row * S, S, 2).store(none.to(DOT))
            left = left + ((p * minus).to(MERGE),)  # noqa: RUF005


@gluon.jit
def _couplings(
    h_buffers, ready_bars, free_bars, h, k, beta, gate, g, k_t, gate_t, chunk_0, n_first, n_last, length, heads,
    K: gl.constexpr, BK: gl.constexpr, C: gl.constexpr, UNIT: gl.constexpr, GATED: gl.constexpr, KEEP: gl.constexpr,
    DOT: gl.constexpr, MERGE: gl.constexpr, W: gl.constexpr,
):  # fmt: skip
    """Makes H of W chunks at a time, of up to two times W ahead of the walk."""
    rounds = (n_last - n_first + W) // W
    for r in range(rounds):
        mbarrier.wait(free_bars.index(r % 2), (r // 2 + 1) % 2)
        if KEEP:
            tma.store_wait(0)
        _couple(
            h_buffers.index(r % 2).reshape([W, C, C]), k, beta, gate, g, k_t, gate_t, n_first + r * W, n_last, length, heads,
            K, BK, C, UNIT, GATED, DOT, MERGE, W,
        )  # fmt: skip
        fence_async_shared()
        gl.thread_barrier()
        mbarrier.arrive(ready_bars.index(r % 2), count=1)
        if KEEP:
            for w in gl.static_range(W):
                n = n_first + r * W + w
                if n <= n_last:
                    tma.async_copy_shared_to_global(h, [chunk_0 + n, 0, 0], h_buffers.index(r % 2).slice(w * C, C, 0))
    if KEEP:
        tma.store_wait(0)


@gluon.jit
def _walk_beside(
    descriptors, pointers, state_last, h_walk, ready_bars, free_bars, buffers, g_buffer, qk_buffers, qk_bars, v_bars,
    places, e_start, length, heads, order_last,
    K: gl.constexpr, V: gl.constexpr, BK: gl.constexpr, BV: gl.constexpr, GROUPS: gl.constexpr, C: gl.constexpr,
    GATED: gl.constexpr, FIRST: gl.constexpr, LAST: gl.constexpr, KEEP: gl.constexpr, W: gl.constexpr, DOT: gl.constexpr,
):  # fmt: skip
    """The walk as the partition of all warps but those that make H."""
    first, last, part, head_index = state_last
    batch, head, shared_head, chunk_0, n_first, n_last = places
    layout: gl.constexpr = sums_layout(BV, GROUPS)
    state_KV = given_state(first, part, layout, e_start, V, K, BK, BV, FIRST)
    state_KV = _walk(
        descriptors, pointers, state_KV, h_walk, h_walk, ready_bars, free_bars, buffers, g_buffer, qk_buffers, qk_bars, v_bars,
        batch, head, shared_head, chunk_0, n_first, n_last, e_start, length, heads,
        BK, BV, GROUPS, C, GATED, KEEP, True, W, DOT,
    )  # fmt: skip
    if LAST:
        offsets, inside = columns_of(layout, e_start, V, K, BK, BV)
        gl.store(last + head_index.to(gl.int64) * K * V + offsets, state_KV, mask=inside & order_last)


@gluon.jit(do_not_specialize=[*SIZES, "gate_every", "k_b", "k_t", "k_h", "gate_b", "gate_t"])
def fused_kernel(
    q, k, v, h, o, errors, states, k_rows, beta, gate, g, first, last,
    k_b: tl.int64, k_t: tl.int64, k_h: tl.int64, gate_b: tl.int64, gate_t: tl.int64, gate_every: tl.int32,
    length: tl.int32, heads: tl.int32, group: tl.int32, segments: tl.int32, span: tl.int32,
    K: gl.constexpr, V: gl.constexpr, BK: gl.constexpr, BV: gl.constexpr, GROUPS: gl.constexpr, C: gl.constexpr,
    UNIT: gl.constexpr, GATED: gl.constexpr, FIRST: gl.constexpr, LAST: gl.constexpr, KEEP: gl.constexpr,
    REGISTERS: gl.constexpr, W: gl.constexpr, DOT: gl.constexpr, MERGE: gl.constexpr,
):  # fmt: skip
    """The forward walk beside a warp group that makes H of the chunks ahead. Grid: (B * H * segments,); BV covers V."""
    part, e_start, n_chunks = gl.program_id(0), 0, (length + C - 1) // C
    head_index, order, n_first, n_last = place(part, segments, segments, span, n_chunks, False)
    batch, head, chunk_0 = head_index // heads, head_index % heads, head_index * n_chunks
    beta, g, shared_head = beta + batch.to(gl.int64) * length * heads + head, g + chunk_0.to(gl.int64) * C, head // group
    k_rows += (batch.to(gl.int64) * k_b + shared_head * k_h) * UNIT
    gate += (batch // gate_every) * gate_b + head
    qk_buffers, g_buffer, buffers = _buffers(BK, BV, C, DOT)
    h_buffers = gl.allocate_shared_memory(DOT, [2, W * C, C], shared_layout(C))
    h_walk = h_buffers._reinterpret(DOT, [2 * W, C, C], shared_layout(C))
    qk_bars, v_bars = (barriers(2), barriers(2)), (barriers(1).index(0),)
    ready_bars, free_bars = barriers(2), barriers(2)
    gl.warp_specialize(
        [
            (_walk_beside, (
                (q, k, v, h, o, errors, states), (beta, g), (first, last, part, head_index), h_walk, ready_bars, free_bars,
                buffers, g_buffer, qk_buffers, qk_bars, v_bars, (batch, head, shared_head, chunk_0, n_first, n_last), e_start,
                length, heads, order == segments - 1, K, V, BK, BV, GROUPS, C, GATED, FIRST, LAST, KEEP, W, DOT,
            )),
            (_couplings, (
                h_buffers, ready_bars, free_bars, h, k_rows, beta, gate, g, k_t, gate_t, chunk_0, n_first, n_last, length,
                heads, K, BK, C, UNIT, GATED, KEEP, DOT, MERGE, W,
            )),
        ],
        [W],
        [REGISTERS],
    )  # fmt: skip


@gluon.jit(do_not_specialize=SIZES)
def forward_kernel(
    q, k, v, h, o, errors, states, beta, g, first, last,
    length: tl.int32, heads: tl.int32, group: tl.int32, segments: tl.int32, span: tl.int32,
    K: gl.constexpr, V: gl.constexpr, BK: gl.constexpr, BV: gl.constexpr, GROUPS: gl.constexpr, C: gl.constexpr,
    GATED: gl.constexpr, FIRST: gl.constexpr, LAST: gl.constexpr, KEEP: gl.constexpr, DOT: gl.constexpr,
):  # fmt: skip
    """As `trial.hopper.forward_kernel`."""
    TILES: gl.constexpr = (V + BV - 1) // BV
    part, e_start, n_chunks = gl.program_id(0) // TILES, gl.program_id(0) % TILES * BV, (length + C - 1) // C
    head_index, order, n_first, n_last = place(part, segments, segments, span, n_chunks, False)
    batch, head, chunk_0 = head_index // heads, head_index % heads, head_index * n_chunks
    beta, g, shared_head = beta + batch.to(gl.int64) * length * heads + head, g + chunk_0.to(gl.int64) * C, head // group
    qk_buffers, g_buffer, buffers = _buffers(BK, BV, C, DOT)
    h_buffers = gl.allocate_shared_memory(DOT, [2, C, C], shared_layout(C))
    qk_bars, v_bars, h_bars = (barriers(2), barriers(2)), (barriers(1).index(0),), barriers(2)
    layout: gl.constexpr = sums_layout(BV, GROUPS)
    state_KV = given_state(first, part, layout, e_start, V, K, BK, BV, FIRST)
    state_KV = _walk(
        (q, k, v, h, o, errors, states), (beta, g), state_KV, h_buffers, h_bars, h_bars, h_bars, buffers, g_buffer, qk_buffers,
        qk_bars, v_bars, batch, head, shared_head, chunk_0, n_first, n_last, e_start, length, heads,
        BK, BV, GROUPS, C, GATED, KEEP, False, 1, DOT,
    )  # fmt: skip
    if LAST:
        offsets, inside = columns_of(layout, e_start, V, K, BK, BV)
        gl.store(last + head_index.to(gl.int64) * K * V + offsets, state_KV, mask=inside & (order == segments - 1))


@gluon.jit(do_not_specialize=["length", "chunks", "heads", "group", "gate_every", "k_b", "k_t", "k_h", "gate_b", "gate_t"])
def couple_kernel(
    h, k, beta, gate, g,
    k_b: tl.int64, k_t: tl.int64, k_h: tl.int64, gate_b: tl.int64, gate_t: tl.int64,
    length: tl.int32, chunks: tl.int32, heads: tl.int32, group: tl.int32, gate_every: tl.int32,
    K: gl.constexpr, BK: gl.constexpr, C: gl.constexpr, UNIT: gl.constexpr, GATED: gl.constexpr, DOT: gl.constexpr,
    MERGE: gl.constexpr, W: gl.constexpr,
):  # fmt: skip
    """H and cumulated decays of W chunks a program. Grid: (B * H * ceil(N / W),)."""
    rounds = (chunks + W - 1) // W
    head_index, n_first = gl.program_id(0) // rounds, gl.program_id(0) % rounds * W
    batch, head, chunk_0 = head_index // heads, head_index % heads, head_index * chunks
    k += (batch.to(gl.int64) * k_b + (head // group) * k_h) * UNIT
    gate += (batch // gate_every) * gate_b + head
    beta, g = beta + batch.to(gl.int64) * length * heads + head, g + chunk_0.to(gl.int64) * C
    h_buffer = gl.allocate_shared_memory(DOT, [W * C, C], shared_layout(C))
    _couple(
        h_buffer.reshape([W, C, C]), k, beta, gate, g, k_t, gate_t, n_first, chunks - 1, length, heads,
        K, BK, C, UNIT, GATED, DOT, MERGE, W,
    )  # fmt: skip
    fence_async_shared()
    for w in gl.static_range(W):
        if n_first + w < chunks:
            tma.async_copy_shared_to_global(h, [chunk_0 + n_first + w, 0, 0], h_buffer.slice(w * C, C, 0))
    tma.store_wait(0)
