"""What of a chunk of the delta rule does not depend on the state, for Hopper, in Gluon: made by four warps beside a walk.

H = X (I + beta X)^-1 by the sums of `kernels.delta_coupling_triton`, each warp with the 16 rows of a block; the scores of queries
and keys, masked and decayed; and the factors of the chunk's tokens. All of it reaches the walk in shared memory, two chunks at most
ahead of it, made from the keys and queries that are there for the walk. H reaches memory only where the backward pass will read it.

A row of blocks needs of the others only X, and H of the blocks on the diagonal: with J from right to left, P_J = sum A_M X_MJ over
M > J, H_J = P_J - P_J beta_J H_JJ, A_J = -H_J beta_J are columns of blocks of which each warp has its own. Above the diagonal A is
zero, so that all warps do what the last has to.

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

from kernels.delta_hopper import barriers, shared_layout, thread_barrier, turned_layout
from kernels.walk_triton import LOG2_E

S = tl.constexpr(16)
LEVELS = tl.constexpr(4)


@gluon.constexpr_function
def line_layout():
    """One element of a vector for each thread of the four warps, or for two of them."""
    return gl.BlockedLayout([1], [32], [4], [0])


@gluon.constexpr_function
def diagonal_layout(blocks):
    """Sums [blocks, S, S] of which each warp has one block."""
    return gl.NVMMADistributedLayout([2, 0], [blocks, 1, 1], [1, 16, 8])


@gluon.jit
def beside_buffers(C: gl.constexpr, BV: gl.constexpr, DOT: gl.constexpr, MERGE: gl.constexpr):
    """Shared memory: H and scores of two chunks; beta, decays since the chunk began and until it ends, of the whole chunk (for
    each row of a state); what only the four warps see; and barriers that say what is ready and what is free again."""
    line: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    h_buffers = gl.allocate_shared_memory(DOT, [2, C, C], shared_layout(C))
    p_buffers = gl.allocate_shared_memory(DOT, [2, C, C], shared_layout(C))
    beta_buffers = gl.allocate_shared_memory(gl.float32, [2, C], line)
    since_buffers = gl.allocate_shared_memory(gl.float32, [2, C], line)
    until_buffers = gl.allocate_shared_memory(gl.float32, [2, C], line)
    whole_buffers = gl.allocate_shared_memory(gl.float32, [2, BV], line)
    x_buffer = gl.allocate_shared_memory(MERGE, [C, C], gl.SwizzledSharedLayout(8, 1, 8, [1, 0]))
    own_buffer = gl.allocate_shared_memory(MERGE, [C, S], gl.SwizzledSharedLayout(8, 4, 2, [1, 0]))
    step_buffer = gl.allocate_shared_memory(gl.float32, [C], line)
    g_buffer = gl.allocate_shared_memory(gl.float32, [C], line)
    made = (h_buffers, p_buffers, beta_buffers, since_buffers, until_buffers, whole_buffers)
    return made, (x_buffer, own_buffer, step_buffer, g_buffer), (barriers(2), barriers(2))


@gluon.jit
def _vectors(beta, gate, gate_t, n, length, heads, C: gl.constexpr, GATED: gl.constexpr):
    """Betas and log2 decays of a chunk's tokens, zero beyond the end."""
    t_C = n * C + gl.arange(0, C, line_layout())
    beta_C = gl.load(beta + t_C.to(gl.int64) * heads, mask=t_C < length, other=0.0).to(gl.float32)
    step_C = beta_C
    if GATED:
        step_C = gl.load(gate + t_C.to(gl.int64) * gate_t, mask=t_C < length, other=0.0).to(gl.float32) * LOG2_E
    return beta_C, step_C


@gluon.jit
def _decays(step_C, step_buffer, g_buffer, since_C, until_C, whole_V, i, j, C: gl.constexpr, BV: gl.constexpr):
    """Leaves the factors for the walk; the cumulated log2 decays, and the decays from one token to another."""
    square: gl.constexpr = turned_layout(C, 1)
    step_buffer.store(step_C)
    steps = step_buffer.load(gl.SliceLayout(0, square))
    g_C = gl.sum(gl.where(i[:, None] >= j[None, :], steps[None, :], 0.0), 1)
    g_all = gl.sum(step_C, 0)
    g_buffer.store(g_C)
    since_C.store(gl.exp2(g_C))
    until_C.store(gl.exp2(g_all - g_C))
    whole_V.store(gl.zeros([BV], gl.float32, line_layout()) + gl.exp2(g_all))
    # Only exponents that are <= 0 are used; the others would overflow and are masked before.
    fall_CC = g_C[:, None] - g_buffer.load(gl.SliceLayout(0, square))[None, :]
    return g_C, gl.exp2(gl.where(i[:, None] >= j[None, :], fall_CC, float("-inf")))


@gluon.jit
def _on_diagonal(gram_CC, C: gl.constexpr):
    """The blocks on the diagonal [C / S, S, S]: of each row of blocks its own column of blocks is left."""
    BLOCKS: gl.constexpr = C // S
    square: gl.constexpr = turned_layout(C, 1)
    i, j = gl.arange(0, C, gl.SliceLayout(1, square)), gl.arange(0, C, gl.SliceLayout(0, square))
    own = gl.where((i // S)[:, None] == (j // S)[None, :], gram_CC, 0.0).reshape([C, BLOCKS, S])
    return gl.convert_layout(gl.sum(own, 1).reshape([BLOCKS, S, S]), diagonal_layout(BLOCKS))


@gluon.jit
def _by_blocks(buffer, dim: gl.constexpr, C: gl.constexpr):
    """A vector of a chunk for the rows (dim 2) or the columns (dim 1) of the blocks on the diagonal."""
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    return buffer._reinterpret(gl.float32, [C // S, S], flat).load(gl.SliceLayout(dim, diagonal_layout(C // S)))


@gluon.jit
def _product(a, b, sums, LAYOUT: gl.constexpr):
    """A product of blocks that each warp has one of, of operands in the registers of sums; `b` is given transposed."""
    b = gl.convert_layout(b.permute([0, 2, 1]), gl.DotOperandLayout(1, LAYOUT, 2))
    return mma_v2(gl.convert_layout(a, gl.DotOperandLayout(0, LAYOUT, 2)), b, sums)


@gluon.jit
def _solve_diagonal(own, beta_C, g_buffer, zero, C: gl.constexpr, GATED: gl.constexpr, MERGE: gl.constexpr):
    """A and H of the blocks on the diagonal, from those of K K^T."""
    BLOCKS: gl.constexpr = C // S
    layout: gl.constexpr = diagonal_layout(BLOCKS)
    # Known to be zero by the chip only, as in `kernels.delta_coupling_triton`.
    i = (gl.arange(0, S, gl.SliceLayout(0, gl.SliceLayout(2, layout))) + zero)[None, :, None]
    j = (gl.arange(0, S, gl.SliceLayout(0, gl.SliceLayout(1, layout))) + zero)[None, None, :]
    if GATED:
        fall = _by_blocks(g_buffer, 2, C)[:, :, None] - _by_blocks(g_buffer, 1, C)[:, None, :]
        own = own * gl.exp2(gl.where(i > j, fall, -fall))
    x, xt = gl.where(i > j, own, 0.0), gl.where(i < j, own, 0.0)
    none = gl.zeros([BLOCKS, S, S], gl.float32, layout)
    one, pair = gl.where(i == j, 1.0, 0.0), (i >> 1) == (j >> 1)
    lt = xt * -_by_blocks(beta_C, 2, C)[:, :, None]
    a = gl.where(pair, one + x * -_by_blocks(beta_C, 1, C)[:, None, :], 0.0)
    at = gl.where(pair, one + lt, 0.0)
    for level in gl.static_range(1, LEVELS):
        between = ((i >> level) < (j >> level)) & ((i >> (level + 1)) == (j >> (level + 1)))
        right = at.to(MERGE)
        step = _product(a.to(MERGE), gl.where(between, lt, 0.0).to(MERGE), none, layout).to(MERGE)
        a, at = _product(step, right, a, layout), _product(right, step, at, layout)
    return a, _product(a.to(MERGE), xt.to(MERGE), none, layout)


@gluon.jit
def _store_couplings(h_CC, own, x_buffer, own_buffer, beta_C, g_buffer, zero, C: gl.constexpr, GATED: gl.constexpr,
    DOT: gl.constexpr, MERGE: gl.constexpr,
):  # fmt: skip
    """H of a chunk from X, in shared memory, and the blocks of K K^T on the diagonal."""
    BLOCKS: gl.constexpr = C // S
    layout: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [BLOCKS, 1], [16, 8])
    left: gl.constexpr = gl.DotOperandLayout(0, layout, 2)
    right: gl.constexpr = gl.DotOperandLayout(1, layout, 2)
    a, h = _solve_diagonal(own, beta_C, g_buffer, zero, C, GATED, MERGE)
    a, h = gl.convert_layout(a.reshape([C, S]), layout), gl.convert_layout(h.reshape([C, S]), layout)
    own_buffer.store(h.to(MERGE))
    block = ((gl.arange(0, C, gl.SliceLayout(1, layout)) + zero) // S)[:, None]
    columns = ()
    for back in gl.static_range(BLOCKS):
        p = gl.zeros([C, S], gl.float32, layout)
        for step in gl.static_range(back):
            x = x_buffer.slice((BLOCKS - 1 - step) * S, S, 0).slice((BLOCKS - 1 - back) * S, S, 1)
            p = mma_v2(gl.convert_layout(columns[step], left), x.load(right), p)
        minus = -beta_C.slice((BLOCKS - 1 - back) * S, S, 0).load(gl.SliceLayout(0, layout))[None, :]
        if back > 0:
            solved = own_buffer.slice((BLOCKS - 1 - back) * S, S, 0).load(right)
            p = mma_v2(gl.convert_layout((p * minus).to(MERGE), left), solved, p)
        below, at = block > BLOCKS - 1 - back, block == BLOCKS - 1 - back
        h_CC.slice((BLOCKS - 1 - back) * S, S, 1).store(gl.where(below, p, gl.where(at, h, 0.0)).to(DOT))
        columns = columns + (gl.where(below, p * minus, gl.where(at, a, 0.0)).to(MERGE),)  # noqa: RUF005


@gluon.jit
def beside(
    h, pointers, gate_t, bounds, chunk_0, rows, bars, made, inner, handed, keeps, length, heads,
    C: gl.constexpr, BV: gl.constexpr, STAGES: gl.constexpr, GATED: gl.constexpr, SCORES: gl.constexpr, REVERSE: gl.constexpr,
    KEEP: gl.constexpr, DOT: gl.constexpr, MERGE: gl.constexpr,
):  # fmt: skip
    """The partition of four warps that makes what a walk over a segment's chunks needs; for training it keeps H.

    Where SCORES, cumulated decays are stored too; of programs that share a head only one `keeps` these and H.
    """
    square: gl.constexpr = turned_layout(C, 1)
    q_buffers, k_buffers = rows
    beta, gate, g = pointers
    h_buffers, p_buffers, beta_buffers, since_buffers, until_buffers, whole_buffers = made
    x_buffer, own_buffer, step_buffer, g_buffer = inner
    ready_bars, free_bars = handed
    n_first, n_last = bounds
    zero = gl.minimum(length, 0)  # known by the chip only
    i, j = gl.arange(0, C, gl.SliceLayout(1, square)) + zero, gl.arange(0, C, gl.SliceLayout(0, square)) + zero
    none_CC = gl.zeros([C, C], gl.float32, square)
    beta_C, step_C = _vectors(beta, gate, gate_t, n_last if REVERSE else n_first, length, heads, C, GATED)
    for step in range(n_last - n_first + 1):
        n, following = n_first + step, gl.minimum(n_first + step + 1, n_last)
        if REVERSE:
            n, following = n_last - step, gl.maximum(n_last - step - 1, n_first)
        part, k_CK = step % 2, k_buffers.index(step % STAGES)
        h_CC, beta_buffer = h_buffers.index(part), beta_buffers.index(part)
        mbarrier.wait(bars.index(step % STAGES), step // STAGES % 2)
        gram = warpgroup_mma(k_CK, k_CK.permute([1, 0]), none_CC, use_acc=False, is_async=True)
        if SCORES:
            scores = warpgroup_mma(q_buffers.index(step % STAGES), k_CK.permute([1, 0]), none_CC, use_acc=False, is_async=True)
        mbarrier.wait(free_bars.index(part), (step // 2 + 1) % 2)
        if KEEP:
            tma.store_wait(0)
        beta_buffer.store(beta_C)
        fall = 1.0
        if GATED:
            g_C, fall = _decays(
                step_C, step_buffer, g_buffer, since_buffers.index(part), until_buffers.index(part), whole_buffers.index(part),
                i, j, C, BV,
            )  # fmt: skip
            if SCORES:
                gl.store(g + n * C + i, g_C, mask=keeps & (i >= 0))
        beta_C, step_C = _vectors(beta, gate, gate_t, following, length, heads, C, GATED)
        if SCORES:
            gram, scores = warpgroup_mma_wait(1, [gram, scores])
        else:
            gram = warpgroup_mma_wait(0, [gram])
        x_buffer.store(gl.where(i[:, None] > j[None, :], gram * fall, 0.0).to(MERGE))
        own = _on_diagonal(gram, C)
        if SCORES:
            scores = warpgroup_mma_wait(0, [scores])
            p_buffers.index(part).store(gl.where(i[:, None] >= j[None, :], scores * fall, 0.0).to(DOT))
        thread_barrier()
        _store_couplings(h_CC, own, x_buffer, own_buffer, beta_buffer, g_buffer, zero, C, GATED, DOT, MERGE)
        fence_async_shared()
        thread_barrier()
        mbarrier.arrive(ready_bars.index(part), count=1)
        if KEEP:
            if keeps:
                tma.async_copy_shared_to_global(h, [chunk_0 + n, 0, 0], h_CC)
    if KEEP:
        tma.store_wait(0)
