"""H = X (I + beta X)^-1 of the delta rule for Hopper, in Gluon: made beside a walk by four warps, one chunk after the other.

The sums of `kernels.delta_coupling_triton`, of a chunk that is shared by the warps: each has the 16 rows of a row of blocks. It
needs of the other rows only X, and H of the blocks on the diagonal: with J from right to left, P_J = sum A_M X_MJ over M > J,
H_J = P_J - P_J beta_J H_JJ and A_J = -H_J beta_J are columns of blocks of which each warp has its own. Above the diagonal A is
zero, so that all warps do what the last one has to.

Shape legend: C = 64 tokens of a chunk, S = 16 tokens of a block.
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

from kernels.delta_hopper import fetch, thread_barrier, turned_layout
from kernels.delta_hopper_beside import GROUP, S, _bring_keys, _bring_values, decays, line_layout, vectors

LEVELS = tl.constexpr(4)


@gluon.constexpr_function
def diagonal_layout(blocks):
    """Sums [blocks, S, S] of which each warp has one block."""
    return gl.NVMMADistributedLayout([2, 0], [blocks, 1, 1], [1, 16, 8])


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
def _store_couplings(h_CC, a, h, x_buffer, own_buffer, beta_C, zero, C: gl.constexpr, DOT: gl.constexpr, MERGE: gl.constexpr):
    """H of a chunk from X and H of the blocks on the diagonal, in shared memory, and A and H of these in registers."""
    BLOCKS: gl.constexpr = C // S
    layout: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [BLOCKS, 1], [16, 8])
    left: gl.constexpr = gl.DotOperandLayout(0, layout, 2)
    right: gl.constexpr = gl.DotOperandLayout(1, layout, 2)
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
def solve(
    h, pointers, gate_t, bounds, chunk_0, rows, made, inner, handed, length, heads,
    C: gl.constexpr, STAGES: gl.constexpr, SOLVER: gl.constexpr, SOLVERS: gl.constexpr, GATED: gl.constexpr,
    KEEP: gl.constexpr, DOT: gl.constexpr, MERGE: gl.constexpr,
):  # fmt: skip
    """The partition that makes H of every SOLVERS-th chunk, and keeps it for training."""
    square: gl.constexpr = turned_layout(C)
    layout: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [C // S, 1], [16, 8])
    beta, gate = pointers[0], pointers[1]
    x_buffer, own_buffer = inner[0].index(SOLVER), inner[1].index(SOLVER)
    beta_buffer, step_buffer, g_buffer = (
        inner[2].index(SOLVER * 3 + 2),
        inner[2].index(SOLVER * 3 + 3),
        inner[2].index(SOLVER * 3 + 4),
    )
    zero = gl.minimum(length, 0)  # known by the chip only
    i, j = gl.arange(0, C, gl.SliceLayout(1, square)) + zero, gl.arange(0, C, gl.SliceLayout(0, square)) + zero
    none_CC = gl.zeros([C, C], gl.float32, square)
    steps = bounds[1] - bounds[0] + 1
    first = gl.minimum(SOLVER, steps - 1)
    beta_C, step_C = vectors(beta, gate, gate_t, bounds[0] + first, length, heads, C, GATED)
    for step in range(SOLVER, steps, SOLVERS):
        part, k_CK = step % 2, rows[0][1].index(step % STAGES)
        mbarrier.wait(rows[2][0].index(step % STAGES), step // STAGES % 2)
        gram = warpgroup_mma(k_CK, k_CK.permute([1, 0]), none_CC, use_acc=False, is_async=True)
        beta_buffer.store(beta_C)
        fall = 1.0
        if GATED:
            fall = decays(step_C, step_buffer, g_buffer, zero, C)[1]
        following = bounds[0] + gl.minimum(step + SOLVERS, steps - 1)
        beta_C, step_C = vectors(beta, gate, gate_t, following, length, heads, C, GATED)
        gram_CC = warpgroup_mma_wait(0, [gram])
        x_buffer.store(gl.where(i[:, None] > j[None, :], gram_CC * fall, 0.0).to(MERGE))
        own = _on_diagonal(gram_CC, C)
        thread_barrier()
        a, h_own = _solve_diagonal(own, beta_buffer, g_buffer, zero, C, GATED, MERGE)
        a, h_own = gl.convert_layout(a.reshape([C, S]), layout), gl.convert_layout(h_own.reshape([C, S]), layout)
        own_buffer.store(h_own.to(MERGE))
        mbarrier.wait(handed[1].index(part), (step // 2 + 1) % 2)
        if KEEP:
            tma.store_wait(0)
        thread_barrier()
        _store_couplings(made[0].index(part), a, h_own, x_buffer, own_buffer, beta_buffer, zero, C, DOT, MERGE)
        fence_async_shared()
        thread_barrier()
        mbarrier.arrive(handed[0].index(part), count=1)
        if KEEP:
            tma.async_copy_shared_to_global(h, [chunk_0 + bounds[0] + step, 0, 0], made[0].index(part))
    if KEEP:
        tma.store_wait(0)


@gluon.jit
def _bring_item(k, bar, k_CK, place, item, BK: gl.constexpr, C: gl.constexpr):
    """Starts to copy the keys of a chunk; items are the chunks of all heads, early ones first."""
    walks, heads, group, _, _, _ = place
    head_index = item % walks
    fetch(bar, 2 * C * BK, (k,), ([head_index // heads, item // walks * C, head_index % heads // group, 0],), (k_CK,))


@gluon.jit
def _item_vectors(pointers, gate_t, place, item, length, C: gl.constexpr, GATED: gl.constexpr):
    walks, heads, _, gate_b, gate_every, _ = place
    batch, head = item % walks // heads, item % walks % heads
    beta, gate = pointers[0] + batch.to(gl.int64) * length * heads + head, pointers[1] + (batch // gate_every) * gate_b + head
    return vectors(beta, gate, gate_t, item // walks, length, heads, C, GATED)


@gluon.jit
def make(
    k, h, flags, pointers, gate_t, place, first, groups, rows, made, inner, length,
    BK: gl.constexpr, C: gl.constexpr, SOLVER: gl.constexpr, GATED: gl.constexpr, DOT: gl.constexpr, MERGE: gl.constexpr,
):  # fmt: skip
    """The partition that makes H of every `groups`-th chunk of all heads, for programs that walk meanwhile."""
    walks, heads, group, _, _, n_chunks = place
    square: gl.constexpr = turned_layout(C)
    layout: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [C // S, 1], [16, 8])
    flat: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    h_CC, k_CK, bar = made[0].index(SOLVER), rows[0][1].index(SOLVER), rows[2][0].index(SOLVER)
    x_buffer, own_buffer = inner[0].index(SOLVER), inner[1].index(SOLVER)
    beta_buffer, step_buffer, g_buffer = (
        inner[2].index(SOLVER * 3 + 2),
        inner[2].index(SOLVER * 3 + 3),
        inner[2].index(SOLVER * 3 + 4),
    )
    zero = gl.minimum(length, 0)  # known by the chip only
    i, j = gl.arange(0, C, gl.SliceLayout(1, square)) + zero, gl.arange(0, C, gl.SliceLayout(0, square)) + zero
    r, c = gl.arange(0, C, gl.SliceLayout(1, flat)), gl.arange(0, C, gl.SliceLayout(0, flat))
    none_CC = gl.zeros([C, C], gl.float32, square)
    total = walks * n_chunks
    steps = (total - first + groups - 1) // groups
    item = gl.minimum(first, total - 1)
    beta_C, step_C = _item_vectors(pointers, gate_t, place, item, length, C, GATED)
    if steps > 0:
        _bring_item(k, bar, k_CK, place, item, BK, C)
    for step in range(steps):
        item = first + step * groups
        n, head_index = item // walks, item % walks
        at = head_index.to(gl.int64) * n_chunks + n
        mbarrier.wait(bar, step % 2)
        gram = warpgroup_mma(k_CK, k_CK.permute([1, 0]), none_CC, use_acc=False, is_async=True)
        beta_buffer.store(beta_C)
        fall = 1.0
        if GATED:
            g_C, fall = decays(step_C, step_buffer, g_buffer, zero, C)
            gl.store(pointers[2] + at * C + i, g_C, mask=i >= 0)
        following = gl.minimum(item + groups, total - 1)
        beta_C, step_C = _item_vectors(pointers, gate_t, place, following, length, C, GATED)
        gram_CC = warpgroup_mma_wait(0, [gram])
        x_buffer.store(gl.where(i[:, None] > j[None, :], gram_CC * fall, 0.0).to(MERGE))
        own = _on_diagonal(gram_CC, C)
        thread_barrier()
        if step + 1 < steps:
            _bring_item(k, bar, k_CK, place, following, BK, C)
        a, h_own = _solve_diagonal(own, beta_buffer, g_buffer, zero, C, GATED, MERGE)
        a, h_own = gl.convert_layout(a.reshape([C, S]), layout), gl.convert_layout(h_own.reshape([C, S]), layout)
        own_buffer.store(h_own.to(MERGE))
        thread_barrier()
        _store_couplings(h_CC, a, h_own, x_buffer, own_buffer, beta_buffer, zero, C, DOT, MERGE)
        thread_barrier()
        gl.store(h + at * C * C + r[:, None] * C + c[None, :], h_CC.load(flat), mask=(r >= 0)[:, None] & (c >= 0)[None, :])
        thread_barrier()
        gl.atomic_add(flags + head_index * ((n_chunks + GROUP - 1) // GROUP) + n // GROUP, 1, sem="release", scope="gpu")


@gluon.jit
def score_and_solve(
    sources, h, pointers, gate_t, place, bounds, chunk_0, rows, made, inner, handed, length, heads,
    BK: gl.constexpr, C: gl.constexpr, STAGES: gl.constexpr, DEPTH: gl.constexpr, WALKS: gl.constexpr,
    GATED: gl.constexpr, KEEP: gl.constexpr, DOT: gl.constexpr, MERGE: gl.constexpr,
):  # fmt: skip
    """The partition that does what `kernels.delta_hopper_beside.score` and `solve` do, for walks that need their registers."""
    square: gl.constexpr = turned_layout(C)
    layout: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [C // S, 1], [16, 8])
    beta, gate, g = pointers
    h_buffers, p_buffers, beta_buffers, since_buffers, until_buffers, whole_buffers = made
    x_buffer, own_buffer, step_buffer, g_buffer = inner[0].index(0), inner[1].index(0), inner[2].index(0), inner[2].index(1)
    zero = gl.minimum(length, 0)  # known by the chip only
    i, j = gl.arange(0, C, gl.SliceLayout(1, square)) + zero, gl.arange(0, C, gl.SliceLayout(0, square)) + zero
    none_CC = gl.zeros([C, C], gl.float32, square)
    steps = bounds[1] - bounds[0] + 1
    for early in gl.static_range(STAGES):
        if early < steps:
            _bring_keys(sources, rows, place, bounds[0] + early, early, BK, C, STAGES)
    for early in gl.static_range(DEPTH):
        if early < steps:
            _bring_values(sources, h, rows, place, chunk_0, made[0], bounds[0] + early, early, C, DEPTH, WALKS, 1)
    beta_C, step_C = vectors(beta, gate, gate_t, bounds[0], length, heads, C, GATED)
    for step in range(steps):
        n, part = bounds[0] + step, step % 2
        mbarrier.wait(handed[1].index(part), (step // 2 + 1) % 2)
        if step >= 2:
            if step - 2 + DEPTH < steps:
                then = step - 2 + DEPTH
                _bring_values(sources, h, rows, place, chunk_0, made[0], bounds[0] + then, then, C, DEPTH, WALKS, 1)
            if step - 2 + STAGES < steps:
                then = step - 2 + STAGES
                _bring_keys(sources, rows, place, bounds[0] + then, then, BK, C, STAGES)
        q_CK, k_CK = rows[0][0].index(step % STAGES), rows[0][1].index(step % STAGES)
        mbarrier.wait(rows[2][0].index(step % STAGES), step // STAGES % 2)
        scores = warpgroup_mma(q_CK, k_CK.permute([1, 0]), none_CC, use_acc=False, is_async=True)
        beta_buffers.index(part).store(beta_C)
        fall = 1.0
        if GATED:
            g_C, fall = decays(step_C, step_buffer, g_buffer, zero, C)
            g_all = gl.sum(step_C, 0)
            since_buffers.index(part).store(gl.exp2(g_C))
            until_buffers.index(part).store(gl.exp2(g_all - g_C))
            whole_buffers.index(part).store(gl.zeros([C], gl.float32, line_layout()) + gl.exp2(g_all))
            gl.store(g + n * C + i, g_C, mask=i >= 0)
        following = bounds[0] + gl.minimum(step + 1, steps - 1)
        beta_C, step_C = vectors(beta, gate, gate_t, following, length, heads, C, GATED)
        scores_CC = warpgroup_mma_wait(0, [scores])
        gram = warpgroup_mma(k_CK, k_CK.permute([1, 0]), none_CC, use_acc=False, is_async=True)
        p_buffers.index(part).store(gl.where(i[:, None] >= j[None, :], scores_CC * fall, 0.0).to(DOT))
        gram_CC = warpgroup_mma_wait(0, [gram])
        x_buffer.store(gl.where(i[:, None] > j[None, :], gram_CC * fall, 0.0).to(MERGE))
        own = _on_diagonal(gram_CC, C)
        thread_barrier()
        a, h_own = _solve_diagonal(own, beta_buffers.index(part), g_buffer, zero, C, GATED, MERGE)
        a, h_own = gl.convert_layout(a.reshape([C, S]), layout), gl.convert_layout(h_own.reshape([C, S]), layout)
        own_buffer.store(h_own.to(MERGE))
        if KEEP:
            tma.store_wait(0)
        thread_barrier()
        _store_couplings(h_buffers.index(part), a, h_own, x_buffer, own_buffer, beta_buffers.index(part), zero, C, DOT, MERGE)
        fence_async_shared()
        thread_barrier()
        mbarrier.arrive(handed[0].index(part), count=1)
        if KEEP:
            tma.async_copy_shared_to_global(h, [chunk_0 + n, 0, 0], h_buffers.index(part))
    if KEEP:
        tma.store_wait(0)
