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

from kernels.delta_hopper import barriers, fetch, shared_layout, thread_barrier, turned_layout
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
def rows_buffers(
    COUNT: gl.constexpr, BK: gl.constexpr, C: gl.constexpr, STAGES: gl.constexpr, WALKS: gl.constexpr, DOT: gl.constexpr
):  # fmt: skip
    """Shared memory for COUNT tensors of queries and keys, STAGES chunks of each, and 64 values of two chunks for each walk; barriers
    on which their copies report."""
    buffers = ()
    for _ in gl.static_range(COUNT):
        buffers = buffers + (gl.allocate_shared_memory(DOT, [STAGES, C, BK], shared_layout(BK)),)  # noqa: RUF005
    v_buffers = gl.allocate_shared_memory(DOT, [2 * WALKS, C, 64], shared_layout(64))
    return buffers, v_buffers, (barriers(STAGES), barriers(2))


@gluon.jit
def beside_buffers(C: gl.constexpr, WALKS: gl.constexpr, DOT: gl.constexpr, MERGE: gl.constexpr):
    """Shared memory of what is made, of two chunks each, and of what only the four warps see; barriers.

    Made are H and scores; beta; decays since the chunk began, until it ends, and (for each row of a transposed state) of all of
    it. The barriers say what is ready, and what is free again for the walks.
    """
    line: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    h_buffers = gl.allocate_shared_memory(DOT, [2, C, C], shared_layout(C))
    p_buffers = gl.allocate_shared_memory(DOT, [2, C, C], shared_layout(C))
    beta_buffers = gl.allocate_shared_memory(gl.float32, [2, C], line)
    since_buffers = gl.allocate_shared_memory(gl.float32, [2, C], line)
    until_buffers = gl.allocate_shared_memory(gl.float32, [2, C], line)
    whole_buffers = gl.allocate_shared_memory(gl.float32, [2, C], line)
    x_buffer = gl.allocate_shared_memory(MERGE, [C, C], gl.SwizzledSharedLayout(8, 1, 8, [1, 0]))
    own_buffer = gl.allocate_shared_memory(MERGE, [C, S], gl.SwizzledSharedLayout(8, 4, 2, [1, 0]))
    step_buffer = gl.allocate_shared_memory(gl.float32, [C], line)
    g_buffer = gl.allocate_shared_memory(gl.float32, [C], line)
    made = (h_buffers, p_buffers, beta_buffers, since_buffers, until_buffers, whole_buffers)
    return made, (x_buffer, own_buffer, step_buffer, g_buffer), (barriers(2), barriers(2, WALKS))


@gluon.jit
def _bring_keys(sources, rows, place, n, step, BK: gl.constexpr, C: gl.constexpr, STAGES: gl.constexpr):
    """Starts to copy queries and keys of a chunk, or keys alone."""
    batch, _, shared_head, _ = place
    BYTES: gl.constexpr = 2 * C * BK * (len(sources) - 1)
    places = ()
    views = ()
    for source in gl.static_range(len(sources) - 1):
        places = places + ([batch, n * C, shared_head, 0],)  # noqa: RUF005
        views = views + (rows[0][source].index(step % STAGES),)  # noqa: RUF005
    fetch(rows[2][0].index(step % STAGES), BYTES, sources, places, views)


@gluon.jit
def _bring_values(sources, rows, place, n, step, C: gl.constexpr, WALKS: gl.constexpr):
    """Starts to copy the values of a chunk, or gradients of outputs."""
    batch, head, _, e_start = place
    values = ()
    places = ()
    views = ()
    for walk in gl.static_range(WALKS):
        values = values + (sources[len(sources) - 1],)  # noqa: RUF005
        places = places + ([batch, n * C, head, e_start + walk * 64],)  # noqa: RUF005
        views = views + (rows[1].index(step % 2 * WALKS + walk),)  # noqa: RUF005
    fetch(rows[2][1].index(step % 2), 2 * C * 64 * WALKS, values, places, views)


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
def _decays(step_C, step_buffer, g_buffer, since_C, until_C, whole_V, i, j, C: gl.constexpr):
    """Leaves the factors for the walk; the cumulated log2 decays, and the decays from one token to another."""
    square: gl.constexpr = turned_layout(C)
    step_buffer.store(step_C)
    steps = step_buffer.load(gl.SliceLayout(0, square))
    g_C = gl.sum(gl.where(i[:, None] >= j[None, :], steps[None, :], 0.0), 1)
    g_all = gl.sum(step_C, 0)
    g_buffer.store(g_C)
    since_C.store(gl.exp2(g_C))
    until_C.store(gl.exp2(g_all - g_C))
    whole_V.store(gl.zeros([C], gl.float32, line_layout()) + gl.exp2(g_all))
    # Only exponents that are <= 0 are used; the others would overflow and are masked before.
    fall_CC = g_C[:, None] - g_buffer.load(gl.SliceLayout(0, square))[None, :]
    return g_C, gl.exp2(gl.where(i[:, None] >= j[None, :], fall_CC, float("-inf")))


@gluon.jit
def _on_diagonal(gram_CC, C: gl.constexpr):
    """The blocks on the diagonal [C / S, S, S]: of each row of blocks its own column of blocks is left."""
    BLOCKS: gl.constexpr = C // S
    square: gl.constexpr = turned_layout(C)
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
def _chunk(bounds, step, REVERSE: gl.constexpr):
    """The chunk of a step of the walk."""
    n = bounds[0] + step
    if REVERSE:
        n = bounds[1] - step
    return n


@gluon.jit
def _make(
    pointers, n, step, rows, made, inner, factors, keeps, length,
    C: gl.constexpr, STAGES: gl.constexpr, GATED: gl.constexpr, SCORES: gl.constexpr, DOT: gl.constexpr, MERGE: gl.constexpr,
):  # fmt: skip
    """All that a chunk needs, from its rows in shared memory, its betas and its log2 decays."""
    square: gl.constexpr = turned_layout(C)
    h_buffers, p_buffers, beta_buffers, since_buffers, until_buffers, whole_buffers = made
    x_buffer, own_buffer, step_buffer, g_buffer = inner
    zero = gl.minimum(length, 0)  # known by the chip only
    i, j = gl.arange(0, C, gl.SliceLayout(1, square)) + zero, gl.arange(0, C, gl.SliceLayout(0, square)) + zero
    part, none_CC = step % 2, gl.zeros([C, C], gl.float32, square)
    k_CK, beta_buffer = rows[0][len(rows[0]) - 1].index(step % STAGES), beta_buffers.index(part)
    gram = warpgroup_mma(k_CK, k_CK.permute([1, 0]), none_CC, use_acc=False, is_async=True)
    beta_buffer.store(factors[0])
    fall = 1.0
    if GATED:
        g_C, fall = _decays(
            factors[1], step_buffer, g_buffer, since_buffers.index(part), until_buffers.index(part), whole_buffers.index(part),
            i, j, C,
        )  # fmt: skip
        if SCORES:
            gl.store(pointers[2] + n * C + i, g_C, mask=keeps & (i >= 0))
    gram_CC = warpgroup_mma_wait(0, [gram])
    x_buffer.store(gl.where(i[:, None] > j[None, :], gram_CC * fall, 0.0).to(MERGE))
    own = _on_diagonal(gram_CC, C)
    if SCORES:
        scores = warpgroup_mma(rows[0][0].index(step % STAGES), k_CK.permute([1, 0]), none_CC, use_acc=False, is_async=True)
        scores_CC = warpgroup_mma_wait(0, [scores])
        p_buffers.index(part).store(gl.where(i[:, None] >= j[None, :], scores_CC * fall, 0.0).to(DOT))
    thread_barrier()
    _store_couplings(
        h_buffers.index(part), own, x_buffer, own_buffer, beta_buffer, g_buffer, zero, C, GATED, DOT, MERGE
    )  # fmt: skip


@gluon.jit
def beside(
    sources, h, pointers, gate_t, place, bounds, chunk_0, rows, made, inner, handed, keeps, length, heads,
    BK: gl.constexpr, C: gl.constexpr, STAGES: gl.constexpr, WALKS: gl.constexpr, GATED: gl.constexpr, SCORES: gl.constexpr,
    REVERSE: gl.constexpr, KEEP: gl.constexpr, DOT: gl.constexpr, MERGE: gl.constexpr,
):  # fmt: skip
    """The partition of four warps beside WALKS walks over a segment: brings rows, makes what the walks need, keeps H for training.

    Where SCORES, cumulated decays are stored too; of programs that share a head only one `keeps` these and H.
    """
    beta, gate, _ = pointers
    steps = bounds[1] - bounds[0] + 1
    for early in gl.static_range(STAGES):
        if early < steps:
            _bring_keys(sources, rows, place, _chunk(bounds, early, REVERSE), early, BK, C, STAGES)
    for early in gl.static_range(2):
        if early < steps:
            _bring_values(sources, rows, place, _chunk(bounds, early, REVERSE), early, C, WALKS)
    factors = _vectors(beta, gate, gate_t, _chunk(bounds, 0, REVERSE), length, heads, C, GATED)
    for step in range(steps):
        n, part = _chunk(bounds, step, REVERSE), step % 2
        mbarrier.wait(handed[1].index(part), (step // 2 + 1) % 2)
        if step >= 2:
            _bring_values(sources, rows, place, n, step, C, WALKS)
            if step - 2 + STAGES < steps:
                then = step - 2 + STAGES
                _bring_keys(sources, rows, place, _chunk(bounds, then, REVERSE), then, BK, C, STAGES)
        if KEEP:
            tma.store_wait(0)
        mbarrier.wait(rows[2][0].index(step % STAGES), step // STAGES % 2)
        now = factors
        factors = _vectors(beta, gate, gate_t, _chunk(bounds, gl.minimum(step + 1, steps - 1), REVERSE), length, heads, C, GATED)
        _make(pointers, n, step, rows, made, inner, now, keeps, length, C, STAGES, GATED, SCORES, DOT, MERGE)
        fence_async_shared()
        thread_barrier()
        mbarrier.arrive(handed[0].index(part), count=1)
        if KEEP:
            if keeps:  # noqa: SIM102
                tma.async_copy_shared_to_global(h, [chunk_0 + n, 0, 0], made[0].index(part))
    if KEEP:
        tma.store_wait(0)
