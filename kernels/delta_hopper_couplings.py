"""H = X (I + beta X)^-1 of the delta rule for Hopper, in Gluon: made by warps of its own beside the forward walk.

The sums of `kernels.delta_coupling_triton`, of W chunks at a time, one for each warp. They reach the walk by way of shared
memory, and memory only where the backward pass will read them; the rows of keys that they take are in the L2 cache when the
walk wants them. A walk waits for the first W chunks; from then on it is a few chunks behind.

Shape legend: B batch, T time, H heads, N chunks, C = 64 tokens of a chunk, K key, V value width, S = 16 tokens of a block.
"""

from __future__ import annotations

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from kernels._entry import entry
from kernels.delta_hopper import SIZES, barriers, columns_of, given_state, shared_layout, sums_layout, thread_barrier
from kernels.delta_hopper_walk import walk, walk_buffers
from kernels.walk_triton import LOG2_E

S = tl.constexpr(16)
LEVELS = tl.constexpr(4)


@gluon.jit
def _product(a, b, sums, LAYOUT: gl.constexpr):
    """A product of blocks [W, S, S], one for each warp."""
    a, b = gl.convert_layout(a, gl.DotOperandLayout(0, LAYOUT, 2)), gl.convert_layout(b, gl.DotOperandLayout(1, LAYOUT, 2))
    return mma_v2(a, b, sums)


@gluon.jit
def _turned(x):
    return x.permute([0, 2, 1])


@gluon.jit
def _grams(
    k, stride, n, length, K: gl.constexpr, BK: gl.constexpr, C: gl.constexpr, UNIT: gl.constexpr, W: gl.constexpr,
    LAYOUT: gl.constexpr,
):  # fmt: skip
    """Products K_J K_I^T of blocks of rows, J <= I, of the chunks from n on, in the order (0, 0), (1, 0), (1, 1), (2, 0), ..."""
    rows_of: gl.constexpr = gl.BlockedLayout([1, 1, 8], [1, 8, 4], [W, 1, 1], [2, 1, 0])
    w = gl.arange(0, W, gl.SliceLayout(1, gl.SliceLayout(2, rows_of)))
    i = gl.arange(0, S, gl.SliceLayout(0, gl.SliceLayout(2, rows_of)))
    d = gl.arange(0, 32, gl.SliceLayout(0, gl.SliceLayout(1, rows_of)))
    sums = ()
    for _ in gl.static_range(C // S * (C // S + 1) // 2):
        sums = sums + (gl.zeros([W, S, S], gl.float32, LAYOUT),)  # noqa: RUF005
    for first in range(0, BK, 32):  # not unrolled, for the loads of all turns would take registers
        rows = ()
        for block in gl.static_range(C // S):
            t = (n + w)[:, None] * C + (block * S + i)[None, :]
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
def _decays(gate, stride, n, length, zero, C: gl.constexpr, W: gl.constexpr, LAYOUT: gl.constexpr):
    """Log2 decays of each block's tokens, cumulated from the start of the chunk; padding does not decay."""
    w = gl.arange(0, W, gl.SliceLayout(1, gl.SliceLayout(1, LAYOUT)))
    cols = gl.arange(0, S, gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT)))
    rows = gl.arange(0, S, gl.SliceLayout(0, gl.SliceLayout(2, LAYOUT)))
    until = rows[None, :, None] >= cols[None, None, :]
    blocks = ()
    before = 0.0
    for block in gl.static_range(C // S):
        t = (n + w)[:, None] * C + (block * S + cols + zero)[None, :]
        step = gl.load(gate + t.to(gl.int64) * stride, mask=t < length, other=0.0).to(gl.float32) * LOG2_E
        sums = gl.sum(gl.where(until, step[:, None, :], 0.0), 2) + before
        blocks = blocks + (sums,)  # noqa: RUF005
        before = gl.sum(gl.where((rows == S - 1)[None, :], sums, 0.0), 1)
        before = gl.convert_layout(before, gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT)))[:, None]
    return blocks


@gluon.jit
def _diagonal(x, xt, betas, i_row, i_col, W: gl.constexpr, MERGE: gl.constexpr, LAYOUT: gl.constexpr):
    """A, H and H transposed of blocks on the diagonal from X and its transpose.

    Blocks go through a level side by side, for of each block one product waits for another.
    """
    BLOCKS: gl.constexpr = len(x)
    none = gl.zeros([W, S, S], gl.float32, LAYOUT)
    one, pair = gl.where(i_row == i_col, 1.0, 0.0), (i_row >> 1) == (i_col >> 1)
    a = ()
    at = ()
    lt = ()
    for block in gl.static_range(BLOCKS):
        rows, cols = betas[block]
        lt = lt + (xt[block] * -rows[:, :, None],)  # noqa: RUF005
        a = a + (gl.where(pair, one + x[block] * -cols[:, None, :], 0.0),)  # noqa: RUF005
        at = at + (gl.where(pair, one + lt[block], 0.0),)  # noqa: RUF005
    for level in gl.static_range(1, LEVELS):
        between = ((i_row >> level) < (i_col >> level)) & ((i_row >> (level + 1)) == (i_col >> (level + 1)))
        steps = ()
        for block in gl.static_range(BLOCKS):
            part = _turned(gl.where(between, lt[block], 0.0).to(MERGE))
            steps = steps + (_product(a[block].to(MERGE), part, none, LAYOUT).to(MERGE),)  # noqa: RUF005
        more = ()
        turned = ()
        for block in gl.static_range(BLOCKS):
            right = at[block].to(MERGE)
            more = more + (_product(steps[block], _turned(right), a[block], LAYOUT),)  # noqa: RUF005
            turned = turned + (_product(right, _turned(steps[block]), at[block], LAYOUT),)  # noqa: RUF005
        a, at = more, turned
    solved = ()
    h = ()
    ht = ()
    for block in gl.static_range(BLOCKS):
        left, right = a[block].to(MERGE), xt[block].to(MERGE)
        solved, h = solved + (left,), h + (_product(left, _turned(right), none, LAYOUT),)  # noqa: RUF005
        ht = ht + (_product(right, _turned(left), none, LAYOUT).to(MERGE),)  # noqa: RUF005
    return solved, h, ht


@gluon.jit
def _pairs(grams, decays, i_row, i_col, of_cols: gl.constexpr, BLOCKS: gl.constexpr, GATED: gl.constexpr, MERGE: gl.constexpr):
    """X of blocks on the diagonal, its transpose, and X transposed of those left of it, row by row and rounded."""
    x = ()
    xt = ()
    lower = ()
    for row in gl.static_range(BLOCKS):
        for col in gl.static_range(row):
            pair = grams[row * (row + 1) // 2 + col]
            if GATED:
                pair = pair * gl.exp2(gl.convert_layout(decays[row], of_cols)[:, None, :] - decays[col][:, :, None])
            lower = lower + (pair.to(MERGE),)  # noqa: RUF005
    for row in gl.static_range(BLOCKS):
        gram = grams[row * (row + 1) // 2 + row]
        if GATED:
            # Only exponents that are <= 0 are used.
            fall = decays[row][:, :, None] - gl.convert_layout(decays[row], of_cols)[:, None, :]
            x = x + (gram * gl.exp2(gl.where(i_row > i_col, fall, float("-inf"))),)  # noqa: RUF005
            xt = xt + (gram * gl.exp2(gl.where(i_row < i_col, -fall, float("-inf"))),)  # noqa: RUF005
        else:
            x, xt = x + (gl.where(i_row > i_col, gram, 0.0),), xt + (gl.where(i_row < i_col, gram, 0.0),)  # noqa: RUF005
    return x, xt, lower


@gluon.jit
def _couple(
    h_buffer, k, beta, gate, g, k_t, gate_t, n, n_last, length, heads,
    K: gl.constexpr, BK: gl.constexpr, C: gl.constexpr, UNIT: gl.constexpr, W: gl.constexpr,
    GATED: gl.constexpr, DOT: gl.constexpr, MERGE: gl.constexpr,
):  # fmt: skip
    """H of W chunks from n on, the blocks that are not zero, into shared memory [W, C, C]; cumulated decays into memory."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [W, 1, 1], [1, 16, 8])
    of_rows: gl.constexpr = gl.SliceLayout(2, layout)
    of_cols: gl.constexpr = gl.SliceLayout(1, layout)
    BLOCKS: gl.constexpr = C // S
    # Known to be zero by the chip only, as in `kernels.delta_coupling_triton`.
    zero = gl.minimum(length, 0)
    i, j = gl.arange(0, S, gl.SliceLayout(0, of_rows)) + zero, gl.arange(0, S, gl.SliceLayout(0, of_cols)) + zero
    i_row, i_col = i[None, :, None], j[None, None, :]
    n_W = n + gl.arange(0, W, gl.SliceLayout(1, of_rows))
    grams = _grams(k, k_t, n, length, K, BK, C, UNIT, W, layout)
    decays = ()
    if GATED:
        decays = _decays(gate, gate_t, n, length, zero, C, W, layout)
    betas = ()
    for block in gl.static_range(BLOCKS):
        t = n_W[:, None] * C + (block * S + i)[None, :]
        beta_rows = gl.load(beta + t.to(gl.int64) * heads, mask=t < length, other=0.0).to(gl.float32)
        betas = betas + ((beta_rows, gl.convert_layout(beta_rows, of_cols)),)  # noqa: RUF005
        if GATED:
            gl.store(g + t, decays[block], mask=(n_W <= n_last)[:, None] & (i >= 0)[None, :])
    x, xt, lower = _pairs(grams, decays, i_row, i_col, of_cols, BLOCKS, GATED, MERGE)
    # A and H of a row's block `back` blocks left of the diagonal come after those of all rows' blocks nearer to it.
    lefts, blocks, transposed = _diagonal(x, xt, betas, i_row, i_col, W, MERGE, layout)
    for back in gl.static_range(1, BLOCKS):
        for row in gl.static_range(back, BLOCKS):
            p = gl.zeros([W, S, S], gl.float32, layout)
            for step in gl.static_range(back):
                left = lefts[step * BLOCKS - step * (step - 1) // 2 + row - step]
                p = _product(left, _turned(lower[(row - step) * (row - step - 1) // 2 + row - back]), p, layout)
            minus = -betas[row - back][1][:, None, :]
            p = _product((p * minus).to(MERGE), _turned(transposed[row - back]), p, layout)
            blocks, lefts = blocks + (p,), lefts + ((p * minus).to(MERGE),)  # noqa: RUF005
    for back in gl.static_range(BLOCKS):
        for row in gl.static_range(back, BLOCKS):
            block = blocks[back * BLOCKS - back * (back - 1) // 2 + row - back]
            h_buffer.slice(row * S, S, 1).slice((row - back) * S, S, 2).store(block.to(DOT))


@gluon.jit
def _couplings(
    h_buffers, ready_bars, free_bars, h, pointers, strides, bounds, chunk_0, length, heads,
    K: gl.constexpr, BK: gl.constexpr, C: gl.constexpr, UNIT: gl.constexpr, W: gl.constexpr,
    GATED: gl.constexpr, KEEP: gl.constexpr, DOT: gl.constexpr, MERGE: gl.constexpr,
):  # fmt: skip
    """The partition that makes H of a segment, of W chunks at a time and of up to 2 W that the walk has not read."""
    k, beta, gate, g = pointers
    k_t, gate_t = strides
    n_first, n_last = bounds
    above: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [W, 1], [1, 0])
    for part in gl.static_range(2):
        h_buffers.index(part).store(gl.zeros([W * C, C], DOT, above))
    for turn in range((n_last - n_first + W) // W):
        n = n_first + turn * W
        mbarrier.wait(free_bars.index(turn % 2), (turn // 2 + 1) % 2)
        if KEEP:
            tma.store_wait(0)
        _couple(
            h_buffers.index(turn % 2).reshape([W, C, C]), k, beta, gate, g, k_t, gate_t, n, n_last, length, heads,
            K, BK, C, UNIT, W, GATED, DOT, MERGE,
        )  # fmt: skip
        fence_async_shared()
        thread_barrier()
        mbarrier.arrive(ready_bars.index(turn % 2), count=1)
        if KEEP:
            for w in gl.static_range(W):
                if n + w <= n_last:
                    tma.async_copy_shared_to_global(h, [chunk_0 + n + w, 0, 0], h_buffers.index(turn % 2).slice(w * C, C, 0))
    if KEEP:
        tma.store_wait(0)


@gluon.jit
def _walk_beside(
    sources, results, pointers, place, bounds, made, states, length, heads,
    K: gl.constexpr, V: gl.constexpr, BK: gl.constexpr, BV: gl.constexpr, GROUPS: gl.constexpr, C: gl.constexpr,
    STAGES: gl.constexpr, W: gl.constexpr, GATED: gl.constexpr, FIRST: gl.constexpr, LAST: gl.constexpr, KEEP: gl.constexpr,
    DOT: gl.constexpr,
):  # fmt: skip
    """The partition that walks."""
    first, last, head_index = states
    layout: gl.constexpr = sums_layout(BV, GROUPS)
    rows, work = walk_buffers(BK, BV, C, STAGES, DOT)
    state_KV = walk(
        sources, results, pointers, place, bounds, rows, work, barriers(STAGES), made,
        given_state(first, head_index, layout, 0, V, K, BK, BV, FIRST), length, heads,
        BK, BV, GROUPS, C, STAGES, W, GATED, KEEP, DOT,
    )  # fmt: skip
    if LAST:
        offsets, inside = columns_of(layout, 0, V, K, BK, BV)
        gl.store(last + head_index.to(gl.int64) * K * V + offsets, state_KV, mask=inside)


@entry(do_not_specialize=SIZES, gluon=True)
def forward_kernel(
    q, k, v, h, o, errors, states, k_rows, beta, gate, g, first, last,
    k_b: tl.int64, k_t: tl.int64, k_h: tl.int64, gate_b: tl.int64, gate_t: tl.int64,
    gate_every: tl.int32, length: tl.int32, heads: tl.int32, group: tl.int32,
    K: gl.constexpr, V: gl.constexpr, BK: gl.constexpr, BV: gl.constexpr, GROUPS: gl.constexpr, C: gl.constexpr,
    STAGES: gl.constexpr, UNIT: gl.constexpr, W: gl.constexpr, REGISTERS: gl.constexpr, GATED: gl.constexpr,
    FIRST: gl.constexpr, LAST: gl.constexpr, KEEP: gl.constexpr, DOT: gl.constexpr, MERGE: gl.constexpr,
):  # fmt: skip
    """Couplings and forward walk of whole sequences. Grid: (B * H,); a program has all BV >= V columns of the values.

    Writes what `kernels.delta_hopper_walk.forward_kernel` writes and, for training, H [B * H * N, C, C]; where there are decays,
    these cumulated [B, H, N, C]. W warps of REGISTERS registers a thread make H.
    """
    head_index, n_chunks = gl.program_id(0), (length + C - 1) // C
    batch, head, chunk_0 = head_index // heads, head_index % heads, head_index * n_chunks
    bounds, place = (0, n_chunks - 1), (batch, head, head // group, chunk_0, 0)
    beta, g = beta + batch.to(gl.int64) * length * heads + head, g + chunk_0.to(gl.int64) * C
    k_rows += (batch.to(gl.int64) * k_b + head // group * k_h) * UNIT
    gate += (batch // gate_every) * gate_b + head
    h_buffers = gl.allocate_shared_memory(DOT, [2, W * C, C], shared_layout(C))
    ready_bars, free_bars = barriers(2), barriers(2)
    made = (h_buffers._reinterpret(DOT, [2 * W, C, C], shared_layout(C)), ready_bars, free_bars)
    gl.warp_specialize(
        [
            (_walk_beside, (
                (q, k, v), (o, errors, states), (beta, g), place, bounds, made, (first, last, head_index), length, heads,
                K, V, BK, BV, GROUPS, C, STAGES, W, GATED, FIRST, LAST, KEEP, DOT,
            )),
            (_couplings, (
                h_buffers, ready_bars, free_bars, h, (k_rows, beta, gate, g), (k_t, gate_t), bounds, chunk_0, length, heads,
                K, BK, C, UNIT, W, GATED, KEEP, DOT, MERGE,
            )),
        ],
        [W],
        [REGISTERS],
    )  # fmt: skip
