"""The forward walk of the delta rule for Hopper on the transposed state, with couplings and scores made beside it, in Gluon.

Rows of every product of the walk are columns of the values, so its left operands are made in the registers where they are used,
warp groups share nothing, and the chain of a chunk has no barrier: S^T K^T, (beta R)^T H^T, the next state. A helper of four warps
makes what does not depend on the state, H and the masked scores of a chunk, while the walk is at the chunk before.

Shape legend: B batch, T time, H heads, N chunks, C = 64 tokens of a chunk, K key, V value width, S = 16 tokens of a block.
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

from kernels.delta_hopper import SIZES, barriers, fetch, place, shared_layout, thread_barrier
from kernels.delta_hopper_couplings import _diagonal
from kernels.walk_triton import LOG2_E

S = tl.constexpr(16)


@gluon.constexpr_function
def turned_layout(width, groups):
    """Registers of sums with `width` columns, of whose rows each warp group has 64."""
    return gl.NVMMADistributedLayout([3, 0], [4 * groups, 1], [16, width, 16])


@gluon.constexpr_function
def line_layout(warps):
    return gl.BlockedLayout([1], [32], [warps], [0])


@gluon.jit
def _operand(x, C: gl.constexpr, GROUPS: gl.constexpr):
    return gl.convert_layout(x, gl.DotOperandLayout(0, turned_layout(C, GROUPS), 2))


@gluon.jit
def _panel_product(a, b, sums, TWO: gl.constexpr):
    return mma_v2(gl.convert_layout(a, gl.DotOperandLayout(0, TWO, 2)), b, sums)


@gluon.jit
def _vectors(beta, gate, gate_t, n, t, length, heads, GATED: gl.constexpr):
    """Betas and log2 decays of a chunk's tokens, zero beyond the end."""
    t_C = n * 64 + t
    beta_C = gl.load(beta + t_C.to(gl.int64) * heads, mask=t_C < length, other=0.0).to(gl.float32)
    step_C = beta_C
    if GATED:
        step_C = gl.load(gate + t_C.to(gl.int64) * gate_t, mask=t_C < length, other=0.0).to(gl.float32) * LOG2_E
    return beta_C, step_C


@gluon.jit
def _cumulated(step_buffer, g_buffer, eg_C, fade_C, all_V, step_C, i, j, C: gl.constexpr, BV: gl.constexpr, SQUARE: gl.constexpr):
    """Cumulated log2 decays as rows and as columns; leaves the factors that the walk takes."""
    line: gl.constexpr = line_layout(4)
    step_buffer.store(step_C)
    steps = step_buffer.load(gl.SliceLayout(0, SQUARE))
    g_rows = gl.sum(gl.where(i[:, None] >= j[None, :], steps[None, :], 0.0), 1)
    total = gl.sum(step_C, 0)
    g_buffer.store(g_rows)
    eg_C.store(gl.exp2(g_rows))
    fade_C.store(gl.exp2(total - g_rows))
    all_V.store(gl.zeros([BV], gl.float32, line) + gl.exp2(total))
    return g_rows, g_buffer.load(gl.SliceLayout(0, SQUARE))


@gluon.jit
def _blocks(buffer, dim: gl.constexpr, THREE: gl.constexpr, C: gl.constexpr):
    """A vector of a chunk as rows or columns of its blocks [C / S, S]."""
    square: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    return buffer._reinterpret(gl.float32, [C // S, S], square).load(gl.SliceLayout(dim, THREE))


@gluon.jit
def _own_blocks(gram, fall, x_buffer, i, j, C: gl.constexpr, MERGE: gl.constexpr):
    """Stores X; of K K^T the blocks on the diagonal [C / S, S, S]."""
    BLOCKS: gl.constexpr = C // S
    x_buffer.store(gl.where(i[:, None] > j[None, :], gram * fall, 0.0).to(MERGE))
    # Of each row of blocks its own column of blocks is left.
    own = gl.where((i[:, None] >> 4) == (j[None, :] >> 4), gram, 0.0)
    own = gl.sum(own.reshape([C, BLOCKS, S]), 1).reshape([BLOCKS, S, S])
    return gl.convert_layout(own, gl.NVMMADistributedLayout([2, 0], [BLOCKS, 1, 1], [1, 16, 8]))


@gluon.jit
def _solve(
    own, x_buffer, hd_buffer, beta_C, g_buffer, h_CC, zero,
    C: gl.constexpr, GATED: gl.constexpr, DOT: gl.constexpr, MERGE: gl.constexpr,
):  # fmt: skip
    """H of one chunk from X and the blocks of K K^T on the diagonal; each warp has a row of blocks."""
    BLOCKS: gl.constexpr = C // S
    three: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [BLOCKS, 1, 1], [1, 16, 8])
    two: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [BLOCKS, 1], [16, 8])
    r = gl.arange(0, S, gl.SliceLayout(0, gl.SliceLayout(2, three))) + zero
    c = gl.arange(0, S, gl.SliceLayout(0, gl.SliceLayout(1, three))) + zero
    i_row, i_col = r[None, :, None], c[None, None, :]
    if GATED:
        down = _blocks(g_buffer, 2, three, C)[:, :, None] - _blocks(g_buffer, 1, three, C)[:, None, :]
        own = own * gl.exp2(gl.where(i_row > i_col, down, -down))
    x, xt = gl.where(i_row > i_col, own, 0.0), gl.where(i_row < i_col, own, 0.0)
    betas = ((_blocks(beta_C, 2, three, C), _blocks(beta_C, 1, three, C)),)
    lefts, hs, _ = _diagonal((x,), (xt,), betas, i_row, i_col, BLOCKS, MERGE, three)
    left = gl.convert_layout(lefts[0].reshape([C, S]), two)
    h_own = gl.convert_layout(hs[0].reshape([C, S]), two)
    hd_buffer.store(h_own.to(MERGE))
    rows = gl.arange(0, C, gl.SliceLayout(1, two)) + zero
    panels = (gl.where((rows >> 4 == BLOCKS - 1)[:, None], left.to(gl.float32), 0.0).to(MERGE),)
    h_CC.slice(C - S, S, 1).store(gl.where((rows >> 4 == BLOCKS - 1)[:, None], h_own, 0.0).to(DOT))
    for back in gl.static_range(1, BLOCKS):
        p = gl.zeros([C, S], gl.float32, two)
        for step in gl.static_range(back):
            right = x_buffer.slice((BLOCKS - 1 - step) * S, S, 0).slice((BLOCKS - 1 - back) * S, S, 1).load(gl.DotOperandLayout(1, two, 2))
            p = _panel_product(panels[step], right, p, two)
        minus = -beta_C.slice((BLOCKS - 1 - back) * S, S, 0).load(gl.SliceLayout(0, two))[None, :]
        right = hd_buffer.slice((BLOCKS - 1 - back) * S, S, 0).load(gl.DotOperandLayout(1, two, 2))
        p = _panel_product((p * minus).to(MERGE), right, p, two)
        below, at = (rows >> 4 > BLOCKS - 1 - back)[:, None], (rows >> 4 == BLOCKS - 1 - back)[:, None]
        h_CC.slice((BLOCKS - 1 - back) * S, S, 1).store(gl.where(below, p, gl.where(at, h_own, 0.0)).to(DOT))
        panels = panels + (gl.where(below, p * minus, gl.where(at, left.to(gl.float32), 0.0)).to(MERGE),)  # noqa: RUF005


@gluon.jit
def _help(
    h, pointers, gate_t, bounds, chunk_0, tile, rows, made, vectors, inner, bars, length, heads,
    BV: gl.constexpr, C: gl.constexpr, STAGES: gl.constexpr, GATED: gl.constexpr, KEEP: gl.constexpr, CARRY: gl.constexpr,
    REVERSE: gl.constexpr, DOT: gl.constexpr, MERGE: gl.constexpr,
):  # fmt: skip
    """The partition that makes H and scores of a chunk, and its factors; no scores where states are only carried."""
    SQUARE: gl.constexpr = turned_layout(C, 1)
    line: gl.constexpr = line_layout(4)
    q_buffers, k_buffers = rows
    h_buffers, p_buffers = made
    beta_vectors, eg_vectors, fade_vectors, all_vectors = vectors
    x_buffer, hd_buffer, step_buffer, g_buffer = inner
    bars, ready_bars, free_bars = bars
    beta, gate, g = pointers
    n_first, n_last = bounds
    # Known to be zero by the chip only, as in `kernels.delta_coupling_triton`.
    zero = gl.minimum(length, 0)
    i, j = gl.arange(0, C, gl.SliceLayout(1, SQUARE)) + zero, gl.arange(0, C, gl.SliceLayout(0, SQUARE)) + zero
    t = gl.arange(0, C, line)
    none_CC = gl.zeros([C, C], gl.float32, SQUARE)
    beta_C, step_C = _vectors(beta, gate, gate_t, n_last if REVERSE else n_first, t, length, heads, GATED)
    for step in range(n_last - n_first + 1):
        n = n_last - step if REVERSE else n_first + step
        following = gl.maximum(n - 1, n_first) if REVERSE else gl.minimum(n + 1, n_last)
        part = step % 2
        k_CK, q_CK = k_buffers.index(step % STAGES), q_buffers.index(step % STAGES)
        h_CC, p_CC, b_C = h_buffers.index(part), p_buffers.index(part), beta_vectors.index(part)
        mbarrier.wait(bars.index(step % STAGES), step // STAGES % 2)
        gram = warpgroup_mma(k_CK, k_CK.permute([1, 0]), none_CC, use_acc=False, is_async=True)
        if not CARRY:
            scores = warpgroup_mma(q_CK, k_CK.permute([1, 0]), none_CC, use_acc=False, is_async=True)
        mbarrier.wait(free_bars.index(part), (step // 2 + 1) % 2)
        if KEEP:
            tma.store_wait(0)
        b_C.store(beta_C)
        fall = 1.0
        if GATED:
            g_rows, g_cols = _cumulated(
                step_buffer, g_buffer, eg_vectors.index(part), fade_vectors.index(part), all_vectors.index(part), step_C, i, j,
                C, BV, SQUARE,
            )  # fmt: skip
            fall = gl.exp2(gl.where(i[:, None] >= j[None, :], g_rows[:, None] - g_cols[None, :], float("-inf")))
            if not CARRY:
                gl.store(g + n * C + i, g_rows, mask=(tile == 0) & (i >= 0))
        beta_C, step_C = _vectors(beta, gate, gate_t, following, t, length, heads, GATED)
        if CARRY:
            own = _own_blocks(warpgroup_mma_wait(0, [gram]), fall, x_buffer, i, j, C, MERGE)
        else:
            gram_CC, scores = warpgroup_mma_wait(1, [gram, scores])
            own = _own_blocks(gram_CC, fall, x_buffer, i, j, C, MERGE)
            scores_CC = warpgroup_mma_wait(0, [scores])
            p_CC.store(gl.where(i[:, None] >= j[None, :], scores_CC * fall, 0.0).to(DOT))
        thread_barrier()
        _solve(own, x_buffer, hd_buffer, b_C, g_buffer, h_CC, zero, C, GATED, DOT, MERGE)
        fence_async_shared()
        thread_barrier()
        mbarrier.arrive(ready_bars.index(part), count=1)
        if KEEP:
            if tile == 0:
                tma.async_copy_shared_to_global(h, [chunk_0 + n, 0, 0], h_CC)
    if KEEP:
        tma.store_wait(0)


@gluon.jit
def _state_places(e_start, V: gl.constexpr, K: gl.constexpr, BK: gl.constexpr, BV: gl.constexpr, LAYOUT: gl.constexpr):
    e, d = e_start + gl.arange(0, BV, gl.SliceLayout(1, LAYOUT)), gl.arange(0, BK, gl.SliceLayout(0, LAYOUT))
    return d[None, :] * V + e[:, None], (d < K)[None, :] & (e < V)[:, None]


@gluon.jit
def _walk(
    sources, results, place, bounds, rows, made, vectors, work, bars, v_bars, states, final, length, heads,
    K: gl.constexpr, V: gl.constexpr, BK: gl.constexpr, BV: gl.constexpr, GROUPS: gl.constexpr, C: gl.constexpr,
    STAGES: gl.constexpr, ORDER: gl.constexpr, GATED: gl.constexpr, FIRST: gl.constexpr, LAST: gl.constexpr, KEEP: gl.constexpr,
    DOT: gl.constexpr,
):  # fmt: skip
    """The partition that walks."""
    q, k, v = sources
    o, errors, kept_states = results
    batch, head, shared_head, chunk_0, e_start = place
    n_first, n_last = bounds
    q_buffers, k_buffers, v_buffers = rows
    h_buffers, p_buffers = made
    beta_vectors, eg_vectors, fade_vectors, all_vectors = vectors
    o_buffer, state_buffer = work
    bars, ready_bars, free_bars = bars
    first, last, part_index, head_index = states
    narrow: gl.constexpr = turned_layout(C, GROUPS)
    wide: gl.constexpr = turned_layout(BK, GROUPS)
    of_cols: gl.constexpr = gl.SliceLayout(0, narrow)
    none_VC = gl.zeros([BV, C], gl.float32, narrow)
    for early in gl.static_range(STAGES - 1):
        n = gl.minimum(n_first + early, n_last)
        at = [batch, n * C, shared_head, 0]
        fetch(bars.index(early), 4 * C * BK, (q, k), (at, at), (q_buffers.index(early), k_buffers.index(early)))
    fetch(v_bars.index(0), 2 * C * BV, (v,), ([batch, n_first * C, head, e_start],), (v_buffers.index(0),))
    state_VK = gl.zeros([BV, BK], gl.float32, wide)
    offsets, inside = _state_places(e_start, V, K, BK, BV, wide)
    if FIRST:
        state_VK = gl.load(first + part_index.to(gl.int64) * K * V + offsets, mask=inside, other=0.0)
    if KEEP:
        state_buffer.permute([1, 0]).store(state_VK.to(DOT))
        fence_async_shared()
    thread_barrier()
    for n in range(n_first, n_last + 1):
        step = n - n_first
        part = step % 2
        q_CK, k_CK, v_CV = q_buffers.index(step % STAGES), k_buffers.index(step % STAGES), v_buffers.index(part)
        b_C = beta_vectors.index(part)
        old_VK = _operand(state_VK.to(DOT), C, GROUPS)
        mbarrier.wait(bars.index(step % STAGES), step // STAGES % 2)
        read = warpgroup_mma(old_VK, k_CK.permute([1, 0]), none_VC, use_acc=False, is_async=True)
        if ORDER == 0:
            asked = warpgroup_mma(old_VK, q_CK.permute([1, 0]), none_VC, use_acc=False, is_async=True)
        if KEEP:
            tma.store_wait(1)  # the errors of the chunk before, which left by way of its values
            tma.async_copy_shared_to_global(kept_states, [chunk_0 + n, 0, e_start], state_buffer)
        then, later = step + STAGES - 1, gl.minimum(n + STAGES - 1, n_last)
        at, then_v = [batch, later * C, shared_head, 0], [batch, gl.minimum(n + 1, n_last) * C, head, e_start]
        fetch(
            bars.index(then % STAGES), 4 * C * BK, (q, k), (at, at),
            (q_buffers.index(then % STAGES), k_buffers.index(then % STAGES)),
        )  # fmt: skip
        fetch(v_bars.index(1 - part), 2 * C * BV, (v,), (then_v,), (v_buffers.index(1 - part),))
        mbarrier.wait(v_bars.index(part), step // 2 % 2)
        error_VC = v_CV.permute([1, 0]).load(narrow).to(gl.float32)
        mbarrier.wait(ready_bars.index(part), step // 2 % 2)
        if ORDER == 0:
            read_VC, asked = warpgroup_mma_wait(1, [read, asked])
        else:
            read_VC = warpgroup_mma_wait(0, [read])
        if GATED:
            read_VC = read_VC * eg_vectors.index(part).load(of_cols)[None, :]
        error_VC = error_VC - read_VC
        scaled_VC = _operand((error_VC * -b_C.load(of_cols)[None, :]).to(DOT), C, GROUPS)
        error = warpgroup_mma(scaled_VC, h_buffers.index(part).permute([1, 0]), error_VC, is_async=True)
        if ORDER == 1:
            asked = warpgroup_mma(old_VK, q_CK.permute([1, 0]), none_VC, use_acc=False, is_async=True)
            error_VC, asked = warpgroup_mma_wait(1, [error, asked])
        elif ORDER == 0:
            asked_VC, error = warpgroup_mma_wait(1, [asked, error])
            error_VC = warpgroup_mma_wait(0, [error])
        else:
            error_VC = warpgroup_mma_wait(0, [error])
        if KEEP:
            v_CV.permute([1, 0]).store(error_VC.to(DOT))
        error_VC = error_VC * b_C.load(of_cols)[None, :]
        write_VC = _operand(error_VC.to(DOT), C, GROUPS)
        fading_VC = write_VC
        if GATED:
            fading_VC = _operand((error_VC * fade_vectors.index(part).load(of_cols)[None, :]).to(DOT), C, GROUPS)
            state_VK = state_VK * all_vectors.index(part).load(gl.SliceLayout(1, wide))[:, None]
        state = warpgroup_mma(fading_VC, k_CK, state_VK, is_async=True)
        if ORDER == 1:
            asked_VC, state = warpgroup_mma_wait(1, [asked, state])
        elif ORDER == 2:
            asked = warpgroup_mma(old_VK, q_CK.permute([1, 0]), none_VC, use_acc=False, is_async=True)
            asked_VC = asked
        if GATED:
            if ORDER == 2:
                state, asked_VC = warpgroup_mma_wait(0, [state, asked])
            asked_VC = asked_VC * eg_vectors.index(part).load(of_cols)[None, :]
        written = warpgroup_mma(write_VC, p_buffers.index(part).permute([1, 0]), asked_VC, is_async=True)
        if KEEP:
            fence_async_shared()
            thread_barrier()
            tma.async_copy_shared_to_global(errors, [batch, n * C, head, e_start], v_CV)
            tma.store_wait(1)  # the state that entered the chunk, and before it the outputs of the last one
        else:
            tma.store_wait(0)
        state_VK, written = warpgroup_mma_wait(1, [state, written])
        if ORDER == 2:
            if GATED == False:
                state_VK, written = warpgroup_mma_wait(0, [state_VK, written])
        thread_barrier()
        if KEEP:
            state_buffer.permute([1, 0]).store(state_VK.to(DOT))
        o_VC = warpgroup_mma_wait(0, [written])
        o_buffer.permute([1, 0]).store(o_VC.to(DOT))
        fence_async_shared()
        thread_barrier()
        tma.async_copy_shared_to_global(o, [batch, n * C, head, e_start], o_buffer)
        mbarrier.arrive(free_bars.index(part), count=1)
    steps = n_last - n_first + 1
    for late in gl.static_range(STAGES - 1):
        mbarrier.wait(bars.index((steps + late) % STAGES), (steps + late) // STAGES % 2)
    mbarrier.wait(v_bars.index(steps % 2), steps // 2 % 2)
    tma.store_wait(0)
    if LAST:
        gl.store(last + head_index.to(gl.int64) * K * V + offsets, state_VK, mask=inside & final)


@gluon.jit(do_not_specialize=[*SIZES, "gate_b", "gate_t", "gate_every"])
def forward_kernel(
    q, k, v, h, o, errors, states, beta, gate, g, first, last,
    gate_b: tl.int64, gate_t: tl.int64, gate_every: tl.int32,
    length: tl.int32, heads: tl.int32, group: tl.int32, segments: tl.int32, span: tl.int32,
    K: gl.constexpr, V: gl.constexpr, BK: gl.constexpr, BV: gl.constexpr, GROUPS: gl.constexpr, C: gl.constexpr,
    STAGES: gl.constexpr, ORDER: gl.constexpr, REGISTERS: gl.constexpr, GATED: gl.constexpr,
    FIRST: gl.constexpr, LAST: gl.constexpr, KEEP: gl.constexpr, DOT: gl.constexpr, MERGE: gl.constexpr,
):  # fmt: skip
    """Couplings and the forward walk. Grid: (B * H * segments * value tiles,), of GROUPS warp groups that walk and one beside."""
    TILES: gl.constexpr = (V + BV - 1) // BV
    part, tile, n_chunks = gl.program_id(0) // TILES, gl.program_id(0) % TILES, (length + C - 1) // C
    head_index, order, n_first, n_last = place(part, segments, segments, span, n_chunks, False)
    batch, head, chunk_0 = head_index // heads, head_index % heads, head_index * n_chunks
    beta, g = beta + batch.to(gl.int64) * length * heads + head, g + chunk_0.to(gl.int64) * C
    gate += (batch // gate_every) * gate_b + head
    q_buffers = gl.allocate_shared_memory(DOT, [STAGES, C, BK], shared_layout(BK))
    k_buffers = gl.allocate_shared_memory(DOT, [STAGES, C, BK], shared_layout(BK))
    v_buffers = gl.allocate_shared_memory(DOT, [2, C, BV], shared_layout(BV))
    h_buffers = gl.allocate_shared_memory(DOT, [2, C, C], shared_layout(C))
    p_buffers = gl.allocate_shared_memory(DOT, [2, C, C], shared_layout(C))
    o_buffer = gl.allocate_shared_memory(DOT, [C, BV], shared_layout(BV))
    state_buffer = o_buffer
    if KEEP:
        state_buffer = gl.allocate_shared_memory(DOT, [BK, BV], shared_layout(BV))
    x_buffer = gl.allocate_shared_memory(MERGE, [C, C], gl.SwizzledSharedLayout(8, 1, 8, [1, 0]))
    hd_buffer = gl.allocate_shared_memory(MERGE, [C, S], gl.SwizzledSharedLayout(8, 4, 2, [1, 0]))
    line: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    vectors = (
        gl.allocate_shared_memory(gl.float32, [2, C], line), gl.allocate_shared_memory(gl.float32, [2, C], line),
        gl.allocate_shared_memory(gl.float32, [2, C], line), gl.allocate_shared_memory(gl.float32, [2, BV], line),
    )  # fmt: skip
    step_buffer = gl.allocate_shared_memory(gl.float32, [C], line)
    g_buffer = gl.allocate_shared_memory(gl.float32, [C], line)
    bars = (barriers(STAGES), barriers(2), barriers(2))
    v_bars = barriers(2)
    gl.warp_specialize(
        [
            (_walk, (
                (q, k, v), (o, errors, states), (batch, head, head // group, chunk_0, tile * BV), (n_first, n_last),
                (q_buffers, k_buffers, v_buffers), (h_buffers, p_buffers), vectors, (o_buffer, state_buffer), bars, v_bars,
                (first, last, part, head_index), order == segments - 1, length, heads,
                K, V, BK, BV, GROUPS, C, STAGES, ORDER, GATED, FIRST, LAST, KEEP, DOT,
            )),
            (_help, (
                h, (beta, gate, g), gate_t, (n_first, n_last), chunk_0, tile, (q_buffers, k_buffers), (h_buffers, p_buffers),
                vectors, (x_buffer, hd_buffer, step_buffer, g_buffer), bars, length, heads,
                BV, C, STAGES, GATED, KEEP, False, False, DOT, MERGE,
            )),
        ],
        [4],
        [REGISTERS],
    )  # fmt: skip


@gluon.jit
def _carry(
    sources, place, bounds, rows, h_buffers, vectors, bars, v_bars, state_VK, length, heads,
    BK: gl.constexpr, BV: gl.constexpr, C: gl.constexpr, STAGES: gl.constexpr, GATED: gl.constexpr, DOT: gl.constexpr,
):  # fmt: skip
    """The walk of a segment without outputs; the state that leaves it."""
    k, v = sources
    batch, head, shared_head, e_start = place
    n_first, n_last = bounds
    k_buffers, v_buffers = rows
    beta_vectors, eg_vectors, fade_vectors, all_vectors = vectors
    bars, ready_bars, free_bars = bars
    narrow: gl.constexpr = turned_layout(C, 1)
    wide: gl.constexpr = turned_layout(BK, 1)
    of_cols: gl.constexpr = gl.SliceLayout(0, narrow)
    none_VC = gl.zeros([BV, C], gl.float32, narrow)
    for early in gl.static_range(STAGES - 1):
        n = gl.minimum(n_first + early, n_last)
        fetch(bars.index(early), 2 * C * BK, (k,), ([batch, n * C, shared_head, 0],), (k_buffers.index(early),))
    fetch(v_bars.index(0), 2 * C * BV, (v,), ([batch, n_first * C, head, e_start],), (v_buffers.index(0),))
    for n in range(n_first, n_last + 1):
        step = n - n_first
        part = step % 2
        k_CK, v_CV, b_C = k_buffers.index(step % STAGES), v_buffers.index(part), beta_vectors.index(part)
        old_VK = _operand(state_VK.to(DOT), C, 1)
        mbarrier.wait(bars.index(step % STAGES), step // STAGES % 2)
        read = warpgroup_mma(old_VK, k_CK.permute([1, 0]), none_VC, use_acc=False, is_async=True)
        then, later = step + STAGES - 1, gl.minimum(n + STAGES - 1, n_last)
        at_v = [batch, gl.minimum(n + 1, n_last) * C, head, e_start]
        fetch(
            bars.index(then % STAGES), 2 * C * BK, (k,), ([batch, later * C, shared_head, 0],), (k_buffers.index(then % STAGES),)
        )  # fmt: skip
        fetch(v_bars.index(1 - part), 2 * C * BV, (v,), (at_v,), (v_buffers.index(1 - part),))
        mbarrier.wait(v_bars.index(part), step // 2 % 2)
        error_VC = v_CV.permute([1, 0]).load(narrow).to(gl.float32)
        mbarrier.wait(ready_bars.index(part), step // 2 % 2)
        read_VC = warpgroup_mma_wait(0, [read])
        if GATED:
            read_VC = read_VC * eg_vectors.index(part).load(of_cols)[None, :]
        error_VC = error_VC - read_VC
        scaled_VC = _operand((error_VC * -b_C.load(of_cols)[None, :]).to(DOT), C, 1)
        error = warpgroup_mma(scaled_VC, h_buffers.index(part).permute([1, 0]), error_VC, is_async=True)
        error_VC = warpgroup_mma_wait(0, [error]) * b_C.load(of_cols)[None, :]
        if GATED:
            error_VC = error_VC * fade_vectors.index(part).load(of_cols)[None, :]
            state_VK = state_VK * all_vectors.index(part).load(gl.SliceLayout(1, wide))[:, None]
        state = warpgroup_mma(_operand(error_VC.to(DOT), C, 1), k_CK, state_VK, is_async=True)
        state_VK = warpgroup_mma_wait(0, [state])
        thread_barrier()
        mbarrier.arrive(free_bars.index(part), count=1)
    steps = n_last - n_first + 1
    for late in gl.static_range(STAGES - 1):
        mbarrier.wait(bars.index((steps + late) % STAGES), (steps + late) // STAGES % 2)
    mbarrier.wait(v_bars.index(steps % 2), steps // 2 % 2)
    return state_VK


@gluon.jit
def _carry_out(
    sources, place, bounds, rows, h_buffers, vectors, bars, v_bars, first, ends, head_index, order, slot, length, heads,
    K: gl.constexpr, V: gl.constexpr, BK: gl.constexpr, BV: gl.constexpr, C: gl.constexpr, STAGES: gl.constexpr,
    GATED: gl.constexpr, FIRST: gl.constexpr, DOT: gl.constexpr,
):  # fmt: skip
    """The partition that walks: from columns of the state given, of zero or of the identity."""
    VALUES: gl.constexpr = (V + BV - 1) // BV * BV
    WIDTH: gl.constexpr = VALUES + (K + BV - 1) // BV * BV
    wide: gl.constexpr = turned_layout(BK, 1)
    e_start = place[3]
    e, d = e_start + gl.arange(0, BV, gl.SliceLayout(1, wide)), gl.arange(0, BK, gl.SliceLayout(0, wide))
    state_VK = gl.where(d[None, :] == e[:, None] - VALUES, 1.0, 0.0)
    if FIRST:
        offsets, inside = _state_places(e_start, V, K, BK, BV, wide)
        state_VK += gl.load(first + head_index.to(gl.int64) * K * V + offsets, mask=inside & (order == 0), other=0.0)
    state_VK = _carry(
        sources, place, bounds, rows, h_buffers, vectors, bars, v_bars, state_VK, length, heads, BK, BV, C, STAGES, GATED, DOT
    )  # fmt: skip
    offsets, inside = _state_places(e_start, WIDTH, K, BK, BV, wide)
    gl.store(ends + slot.to(gl.int64) * K * WIDTH + offsets, state_VK, mask=inside)


@gluon.jit(do_not_specialize=[*SIZES, "gate_b", "gate_t", "gate_every"])
def carry_kernel(
    k, v, beta, gate, first, ends,
    gate_b: tl.int64, gate_t: tl.int64, gate_every: tl.int32,
    length: tl.int32, heads: tl.int32, group: tl.int32, segments: tl.int32, span: tl.int32,
    K: gl.constexpr, V: gl.constexpr, BK: gl.constexpr, BV: gl.constexpr, C: gl.constexpr,
    STAGES: gl.constexpr, REGISTERS: gl.constexpr, GATED: gl.constexpr, FIRST: gl.constexpr, DOT: gl.constexpr,
    MERGE: gl.constexpr,
):  # fmt: skip
    """What segments do to a state, as in `kernels.delta_hopper_carry`. Grid: (B * H * (segments - 1) * tiles of C and of R,)."""
    TILES: gl.constexpr = (V + BV - 1) // BV + (K + BV - 1) // BV
    slot, tile, n_chunks = gl.program_id(0) // TILES, gl.program_id(0) % TILES, (length + C - 1) // C
    head_index, order, n_first, n_last = place(slot, segments - 1, segments, span, n_chunks, False)
    batch, head, chunk_0 = head_index // heads, head_index % heads, head_index * n_chunks
    beta += batch.to(gl.int64) * length * heads + head
    gate += (batch // gate_every) * gate_b + head
    k_buffers = gl.allocate_shared_memory(DOT, [STAGES, C, BK], shared_layout(BK))
    v_buffers = gl.allocate_shared_memory(DOT, [2, C, BV], shared_layout(BV))
    h_buffers = gl.allocate_shared_memory(DOT, [2, C, C], shared_layout(C))
    x_buffer = gl.allocate_shared_memory(MERGE, [C, C], gl.SwizzledSharedLayout(8, 1, 8, [1, 0]))
    hd_buffer = gl.allocate_shared_memory(MERGE, [C, S], gl.SwizzledSharedLayout(8, 4, 2, [1, 0]))
    line: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    vectors = (
        gl.allocate_shared_memory(gl.float32, [2, C], line), gl.allocate_shared_memory(gl.float32, [2, C], line),
        gl.allocate_shared_memory(gl.float32, [2, C], line), gl.allocate_shared_memory(gl.float32, [2, BV], line),
    )  # fmt: skip
    step_buffer = gl.allocate_shared_memory(gl.float32, [C], line)
    g_buffer = gl.allocate_shared_memory(gl.float32, [C], line)
    bars = (barriers(STAGES), barriers(2), barriers(2))
    v_bars = barriers(2)
    gl.warp_specialize(
        [
            (_carry_out, (
                (k, v), (batch, head, head // group, tile * BV), (n_first, n_last), (k_buffers, v_buffers), h_buffers, vectors,
                bars, v_bars, first, ends, head_index, order, slot, length, heads, K, V, BK, BV, C, STAGES, GATED, FIRST, DOT,
            )),
            (_help, (
                k, (beta, gate, gate), gate_t, (n_first, n_last), chunk_0, tile, (k_buffers, k_buffers), (h_buffers, h_buffers),
                vectors, (x_buffer, hd_buffer, step_buffer, g_buffer), bars, length, heads,
                BV, C, STAGES, GATED, False, True, False, DOT, MERGE,
            )),
        ],
        [4],
        [REGISTERS],
    )  # fmt: skip


@gluon.jit
def _carry_back(
    sources, place, bounds, rows, made, vectors, bars, v_bars, dlast, ends, head_index, order, slot, length, heads,
    K: gl.constexpr, V: gl.constexpr, BK: gl.constexpr, BV: gl.constexpr, C: gl.constexpr, STAGES: gl.constexpr,
    GATED: gl.constexpr, DLAST: gl.constexpr, DOT: gl.constexpr,
):  # fmt: skip
    """The partition that walks back over a segment with columns of a state's gradient, of zero or of the identity."""
    VALUES: gl.constexpr = (V + BV - 1) // BV * BV
    WIDTH: gl.constexpr = VALUES + (K + BV - 1) // BV * BV
    q, k, do = sources
    batch, head, shared_head, e_start = place
    n_first, n_last = bounds
    q_buffers, k_buffers, do_buffers = rows
    h_buffers, p_buffers = made
    beta_vectors, eg_vectors, fade_vectors, all_vectors = vectors
    bars, ready_bars, free_bars = bars
    narrow: gl.constexpr = turned_layout(C, 1)
    wide: gl.constexpr = turned_layout(BK, 1)
    of_cols: gl.constexpr = gl.SliceLayout(0, narrow)
    none_VC = gl.zeros([BV, C], gl.float32, narrow)
    for early in gl.static_range(STAGES - 1):
        at = [batch, gl.maximum(n_last - early, n_first) * C, shared_head, 0]
        fetch(bars.index(early), 4 * C * BK, (q, k), (at, at), (q_buffers.index(early), k_buffers.index(early)))
    fetch(v_bars.index(0), 2 * C * BV, (do,), ([batch, n_last * C, head, e_start],), (do_buffers.index(0),))
    e, d = e_start + gl.arange(0, BV, gl.SliceLayout(1, wide)), gl.arange(0, BK, gl.SliceLayout(0, wide))
    dstate_VK = gl.where(d[None, :] == e[:, None] - VALUES, 1.0, 0.0)
    if DLAST:
        offsets, inside = _state_places(e_start, V, K, BK, BV, wide)
        dstate_VK += gl.load(dlast + head_index.to(gl.int64) * K * V + offsets, mask=inside & (order == 0), other=0.0)
    for step in range(n_last - n_first + 1):
        n, part = n_last - step, step % 2
        q_CK, k_CK = q_buffers.index(step % STAGES), k_buffers.index(step % STAGES)
        b_C, p_CC = beta_vectors.index(part), p_buffers.index(part)
        mbarrier.wait(bars.index(step % STAGES), step // STAGES % 2)
        old_VK = _operand(dstate_VK.to(DOT), C, 1)
        read = warpgroup_mma(old_VK, k_CK.permute([1, 0]), none_VC, use_acc=False, is_async=True)
        then, later = step + STAGES - 1, gl.maximum(n - STAGES + 1, n_first)
        at, at_do = [batch, later * C, shared_head, 0], [batch, gl.maximum(n - 1, n_first) * C, head, e_start]
        fetch(
            bars.index(then % STAGES), 4 * C * BK, (q, k), (at, at),
            (q_buffers.index(then % STAGES), k_buffers.index(then % STAGES)),
        )  # fmt: skip
        fetch(v_bars.index(1 - part), 2 * C * BV, (do,), (at_do,), (do_buffers.index(1 - part),))
        mbarrier.wait(v_bars.index(part), step // 2 % 2)
        do_VC = do_buffers.index(part).permute([1, 0]).load(narrow)
        mbarrier.wait(ready_bars.index(part), step // 2 % 2)
        asked = warpgroup_mma(_operand(do_VC, C, 1), p_CC, none_VC, use_acc=False, is_async=True)
        read_VC, asked = warpgroup_mma_wait(1, [read, asked])
        if GATED:
            read_VC = read_VC * fade_vectors.index(part).load(of_cols)[None, :]
        dwrite_VC = warpgroup_mma_wait(0, [asked]) + read_VC
        scaled_VC = _operand((dwrite_VC * -b_C.load(of_cols)[None, :]).to(DOT), C, 1)
        y = warpgroup_mma(scaled_VC, h_buffers.index(part), dwrite_VC, is_async=True)
        if GATED:
            dstate_VK = dstate_VK * all_vectors.index(part).load(gl.SliceLayout(1, wide))[:, None]
            do_VC = (do_VC.to(gl.float32) * eg_vectors.index(part).load(of_cols)[None, :]).to(DOT)
        dstate = warpgroup_mma(_operand(do_VC, C, 1), q_CK, dstate_VK, is_async=True)
        y_VC, dstate = warpgroup_mma_wait(1, [y, dstate])
        y_VC = y_VC * -b_C.load(of_cols)[None, :]
        if GATED:
            y_VC = y_VC * eg_vectors.index(part).load(of_cols)[None, :]
        dstate = warpgroup_mma(_operand(y_VC.to(DOT), C, 1), k_CK, dstate, is_async=True)
        dstate_VK = warpgroup_mma_wait(0, [dstate])
        thread_barrier()
        mbarrier.arrive(free_bars.index(part), count=1)
    steps = n_last - n_first + 1
    for late in gl.static_range(STAGES - 1):
        mbarrier.wait(bars.index((steps + late) % STAGES), (steps + late) // STAGES % 2)
    mbarrier.wait(v_bars.index(steps % 2), steps // 2 % 2)
    offsets, inside = _state_places(e_start, WIDTH, K, BK, BV, wide)
    gl.store(ends + slot.to(gl.int64) * K * WIDTH + offsets, dstate_VK, mask=inside)


@gluon.jit(do_not_specialize=[*SIZES, "gate_b", "gate_t", "gate_every"])
def reverse_carry_kernel(
    q, k, do, beta, gate, dlast, ends,
    gate_b: tl.int64, gate_t: tl.int64, gate_every: tl.int32,
    length: tl.int32, heads: tl.int32, group: tl.int32, segments: tl.int32, span: tl.int32,
    K: gl.constexpr, V: gl.constexpr, BK: gl.constexpr, BV: gl.constexpr, C: gl.constexpr,
    STAGES: gl.constexpr, REGISTERS: gl.constexpr, GATED: gl.constexpr, DLAST: gl.constexpr, DOT: gl.constexpr,
    MERGE: gl.constexpr,
):  # fmt: skip
    """What segments do to a state's gradient. Grid: (B * H * (segments - 1) * tiles of C and of R,)."""
    TILES: gl.constexpr = (V + BV - 1) // BV + (K + BV - 1) // BV
    slot, tile, n_chunks = gl.program_id(0) // TILES, gl.program_id(0) % TILES, (length + C - 1) // C
    head_index, order, n_first, n_last = place(slot, segments - 1, segments, span, n_chunks, True)
    batch, head, chunk_0 = head_index // heads, head_index % heads, head_index * n_chunks
    beta += batch.to(gl.int64) * length * heads + head
    gate += (batch // gate_every) * gate_b + head
    q_buffers = gl.allocate_shared_memory(DOT, [STAGES, C, BK], shared_layout(BK))
    k_buffers = gl.allocate_shared_memory(DOT, [STAGES, C, BK], shared_layout(BK))
    do_buffers = gl.allocate_shared_memory(DOT, [2, C, BV], shared_layout(BV))
    h_buffers = gl.allocate_shared_memory(DOT, [2, C, C], shared_layout(C))
    p_buffers = gl.allocate_shared_memory(DOT, [2, C, C], shared_layout(C))
    x_buffer = gl.allocate_shared_memory(MERGE, [C, C], gl.SwizzledSharedLayout(8, 1, 8, [1, 0]))
    hd_buffer = gl.allocate_shared_memory(MERGE, [C, S], gl.SwizzledSharedLayout(8, 4, 2, [1, 0]))
    line: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    vectors = (
        gl.allocate_shared_memory(gl.float32, [2, C], line), gl.allocate_shared_memory(gl.float32, [2, C], line),
        gl.allocate_shared_memory(gl.float32, [2, C], line), gl.allocate_shared_memory(gl.float32, [2, BV], line),
    )  # fmt: skip
    step_buffer = gl.allocate_shared_memory(gl.float32, [C], line)
    g_buffer = gl.allocate_shared_memory(gl.float32, [C], line)
    bars = (barriers(STAGES), barriers(2), barriers(2))
    v_bars = barriers(2)
    gl.warp_specialize(
        [
            (_carry_back, (
                (q, k, do), (batch, head, head // group, tile * BV), (n_first, n_last), (q_buffers, k_buffers, do_buffers),
                (h_buffers, p_buffers), vectors, bars, v_bars, dlast, ends, head_index, order, slot, length, heads,
                K, V, BK, BV, C, STAGES, GATED, DLAST, DOT,
            )),
            (_help, (
                k, (beta, gate, ends), gate_t, (n_first, n_last), chunk_0, 1, (q_buffers, k_buffers), (h_buffers, p_buffers),
                vectors, (x_buffer, hd_buffer, step_buffer, g_buffer), bars, length, heads,
                BV, C, STAGES, GATED, False, False, True, DOT, MERGE,
            )),
        ],
        [4],
        [REGISTERS],
    )  # fmt: skip
