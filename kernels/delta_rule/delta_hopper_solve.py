"""H = X (I + beta X)^-1 of the delta rule for Hopper, in Gluon: made beside a walk by four warps, one chunk after the other.

The sums of `delta_coupling_triton`, of a chunk that is shared by the warps: each has the 16 rows of a row of blocks. It
needs of the other rows only X, and H of the blocks on the diagonal: with J from right to left, P_J = sum A_M X_MJ over M > J,
H_J = P_J - P_J beta_J H_JJ and A_J = -H_J beta_J are columns of blocks of which each warp has its own. Above the diagonal A is
zero, so that all warps do what the last one has to.

With decays X is D X' D^-1, where D has exp(G) on its diagonal and X' = tril(K K^T, -1), so H is D H' D^-1: what is solved knows
of no decays, and each element of H' is multiplied by exp(G_i - G_j). For keys of unit length and betas up to 2 H' is small.

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

from kernels.delta_rule.delta_hopper import thread_barrier, turned_layout
from kernels.delta_rule.delta_hopper_beside import S, bring_first, bring_next, cumulated, seen_by, vectors

LEVELS = tl.constexpr(4)


@gluon.constexpr_function
def diagonal_layout(blocks):
    """Sums [blocks, S, S] of which each warp has one block."""
    return gl.NVMMADistributedLayout([2, 0], [blocks, 1, 1], [1, 16, 8])


@gluon.jit
def _halves(x, C: gl.constexpr, WIDTH: gl.constexpr):
    """The left and the right half of `WIDTH` columns, in the registers where they are."""
    return gl.split(x.reshape([C, 2, WIDTH // 2]).permute([0, 2, 1]))


@gluon.jit
def _on_diagonal(gram_CC, C: gl.constexpr):
    """The blocks on the diagonal [C / S, S, S]: of each row of blocks its own column of blocks is left."""
    BLOCKS: gl.constexpr = C // S
    square: gl.constexpr = turned_layout(C)
    row_CC = gl.arange(0, C, gl.SliceLayout(1, square))[:, None] + gl.zeros([C, C], gl.int32, square)
    left, right = _halves(gram_CC, C, C)
    row, _ = _halves(row_CC, C, C)
    left, right = _halves(gl.where(row >= C // 2, right, left), C, C // 2)
    row, _ = _halves(row, C, C // 2)
    own = gl.where(row // S % 2 == 1, right, left)
    return gl.convert_layout(own.reshape([BLOCKS, S, S]), diagonal_layout(BLOCKS))


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
def _solve_diagonal(own, minus_C, C: gl.constexpr, MERGE: gl.constexpr):
    """A and H of the blocks on the diagonal, from those of K K^T."""
    BLOCKS: gl.constexpr = C // S
    layout: gl.constexpr = diagonal_layout(BLOCKS)
    i = gl.arange(0, S, gl.SliceLayout(0, gl.SliceLayout(2, layout)))[None, :, None]
    j = gl.arange(0, S, gl.SliceLayout(0, gl.SliceLayout(1, layout)))[None, None, :]
    x, xt = gl.where(i > j, own, 0.0), gl.where(i < j, own, 0.0)
    none = gl.zeros([BLOCKS, S, S], gl.float32, layout)
    one, pair = gl.where(i == j, 1.0, 0.0), (i >> 1) == (j >> 1)
    lt = xt * _by_blocks(minus_C, 2, C)[:, :, None]
    a = gl.where(pair, one + x * _by_blocks(minus_C, 1, C)[:, None, :], 0.0)
    at = gl.where(pair, one + lt, 0.0)
    for level in gl.static_range(1, LEVELS):
        between = ((i >> level) < (j >> level)) & ((i >> (level + 1)) == (j >> (level + 1)))
        right = at.to(MERGE)
        step = _product(a.to(MERGE), gl.where(between, lt, 0.0).to(MERGE), none, layout).to(MERGE)
        a, at = _product(step, right, a, layout), _product(right, step, at, layout)
    return a, _product(a.to(MERGE), xt.to(MERGE), none, layout)


@gluon.jit
def store_couplings(
    h_CC, a, h, x_buffer, own_buffer, minus_C, g_buffer,
    C: gl.constexpr, GATED: gl.constexpr, DOT: gl.constexpr, MERGE: gl.constexpr,
):  # fmt: skip
    """H of a chunk from X and H of the blocks on the diagonal, in shared memory, and A and H of these in registers; decayed."""
    BLOCKS: gl.constexpr = C // S
    layout: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [BLOCKS, 1], [16, 8])
    left: gl.constexpr = gl.DotOperandLayout(0, layout, 2)
    right: gl.constexpr = gl.DotOperandLayout(1, layout, 2)
    block = gl.arange(0, C, gl.SliceLayout(1, layout)) // S
    if GATED:
        g_row = g_buffer.load(gl.SliceLayout(1, layout))
    columns = ()
    for back in gl.static_range(BLOCKS):
        p = gl.zeros([C, S], gl.float32, layout)
        for step in gl.static_range(back):
            x = x_buffer.slice((BLOCKS - 1 - step) * S, S, 0).slice((BLOCKS - 1 - back) * S, S, 1)
            p = mma_v2(gl.convert_layout(columns[step], left), x.load(right), p)
        minus = minus_C.slice((BLOCKS - 1 - back) * S, S, 0).load(gl.SliceLayout(0, layout))[None, :]
        if back > 0:
            solved = own_buffer.slice((BLOCKS - 1 - back) * S, S, 0).load(right)
            p = mma_v2(gl.convert_layout((p * minus).to(MERGE), left), solved, p)
        # On and above the diagonal P is zero.
        at = gl.where(block == BLOCKS - 1 - back, 1.0, 0.0)[:, None]
        below = p
        if GATED and back > 0:  # from later to earlier decays might not be finite
            g_column = g_buffer.slice((BLOCKS - 1 - back) * S, S, 0).load(gl.SliceLayout(0, layout))[None, :]
            below = p * gl.exp2(gl.where(block > BLOCKS - 1 - back, g_row, float("-inf"))[:, None] - g_column)
        h_CC.slice((BLOCKS - 1 - back) * S, S, 1).store(gl.fma(h, at, below).to(DOT))
        columns = columns + (gl.fma(a, at, p * minus).to(MERGE),)


@gluon.jit
def solved(gram_CC, x_buffer, own_buffer, minus_C, g_buffer, C: gl.constexpr, GATED: gl.constexpr, MERGE: gl.constexpr):
    """A and decayed H of the blocks on the diagonal, a row of blocks a warp; X and H of these in shared memory; from K K^T."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [C // S, 1], [16, 8])
    x_buffer.store(gram_CC.to(MERGE))  # read are only blocks below the diagonal
    own = _on_diagonal(gram_CC, C)
    thread_barrier()
    a, h_own = _solve_diagonal(own, minus_C, C, MERGE)
    own_buffer.store(gl.convert_layout(h_own.reshape([C, S]), layout).to(MERGE))
    if GATED:
        fall = _by_blocks(g_buffer, 2, C)[:, :, None] - _by_blocks(g_buffer, 1, C)[:, None, :]
        h_own = h_own * gl.exp2(gl.minimum(fall, 0.0))
    return gl.convert_layout(a.reshape([C, S]), layout), gl.convert_layout(h_own.reshape([C, S]), layout)


@gluon.jit
def solve(
    given,
    C: gl.constexpr, STAGES: gl.constexpr, SOLVER: gl.constexpr, SOLVERS: gl.constexpr, GATED: gl.constexpr,
    KEEP: gl.constexpr, DOT: gl.constexpr, MERGE: gl.constexpr,
):  # fmt: skip
    """The partition that makes H of every SOLVERS-th chunk, and keeps it for training."""
    _, h, pointers, gate_t, _, bounds, chunk_0, rows, made, inner, handed, length, heads = given
    beta, gate, _ = pointers
    x_buffer, own_buffer = inner[0].index(SOLVER), inner[1].index(SOLVER)
    minus_buffer, g_buffer = inner[2].index(SOLVER * 2 + 1), inner[2].index(SOLVER * 2 + 2)
    none_CC = gl.zeros([C, C], gl.float32, turned_layout(C))
    steps = bounds[1] - bounds[0] + 1
    first = gl.minimum(SOLVER, steps - 1)
    beta_C, step_C = vectors(beta, gate, gate_t, bounds[0] + first, length, heads, C, GATED)
    for step in range(SOLVER, steps, SOLVERS):
        part, k_CK = step % 2, rows[0][1].index(step % STAGES)
        mbarrier.wait(rows[2][0].index(step % STAGES), step // STAGES % 2)
        gram = warpgroup_mma(k_CK, k_CK.permute([1, 0]), none_CC, use_acc=False, is_async=True)
        minus_buffer.store(-beta_C)
        if GATED:
            cumulated(step_C, g_buffer)
        following = bounds[0] + gl.minimum(step + SOLVERS, steps - 1)
        beta_C, step_C = vectors(beta, gate, gate_t, following, length, heads, C, GATED)
        gram_CC = warpgroup_mma_wait(0, [gram])
        a, h_own = solved(gram_CC, x_buffer, own_buffer, minus_buffer, g_buffer, C, GATED, MERGE)
        mbarrier.wait(handed[1].index(part), (step // 2 + 1) % 2)
        if KEEP:
            tma.store_wait(0)
        thread_barrier()
        store_couplings(made[0].index(part), a, h_own, x_buffer, own_buffer, minus_buffer, g_buffer, C, GATED, DOT, MERGE)
        fence_async_shared()
        thread_barrier()
        mbarrier.arrive(handed[0].index(part), count=1)
        if KEEP:
            tma.async_copy_shared_to_global(h, [chunk_0 + bounds[0] + step, 0, 0], made[0].index(part))
    if KEEP:
        tma.store_wait(0)


@gluon.jit
def score_and_solve(
    given,
    BK: gl.constexpr, C: gl.constexpr, STAGES: gl.constexpr, DEPTH: gl.constexpr, WALKS: gl.constexpr,
    KEEP: gl.constexpr, DOT: gl.constexpr, MERGE: gl.constexpr,
):  # fmt: skip
    """The partition that does what `kernels.delta_rule.delta_hopper_beside.score` and `solve` do, without decays.

    Two partitions would leave the walks too few registers for products that run on.
    """
    square: gl.constexpr = turned_layout(C)
    sources, h, pointers, gate_t, place, bounds, chunk_0, rows, made, inner, handed, length, heads = given
    beta, gate, _ = pointers
    x_buffer, own_buffer, minus_buffer = inner[0].index(0), inner[1].index(0), inner[2].index(0)
    none_CC = gl.zeros([C, C], gl.float32, square)
    steps = bounds[1] - bounds[0] + 1
    bring_first(sources, h, rows, place, bounds, chunk_0, made[0], BK, C, STAGES, DEPTH, WALKS, 1)
    beta_C, _ = vectors(beta, gate, gate_t, bounds[0], length, heads, C, False)
    for step in range(steps):
        part, q_CK, k_CK = step % 2, rows[0][0].index(step % STAGES), rows[0][1].index(step % STAGES)
        h_CC = made[0].index(part)
        mbarrier.wait(handed[1].index(part), (step // 2 + 1) % 2)
        bring_next(sources, h, rows, place, bounds, chunk_0, made[0], step, BK, C, STAGES, DEPTH, WALKS, 1)
        mbarrier.wait(rows[2][0].index(step % STAGES), step // STAGES % 2)
        scores = warpgroup_mma(q_CK, k_CK.permute([1, 0]), none_CC, use_acc=False, is_async=True)
        made[2].index(part).store(beta_C)
        minus_buffer.store(-beta_C)
        following = bounds[0] + gl.minimum(step + 1, steps - 1)
        beta_C, _ = vectors(beta, gate, gate_t, following, length, heads, C, False)
        scores_CC = warpgroup_mma_wait(0, [scores])
        gram = warpgroup_mma(k_CK, k_CK.permute([1, 0]), none_CC, use_acc=False, is_async=True)
        made[1].index(part).store((scores_CC * gl.where(seen_by(C), 1.0, 0.0)).to(DOT))
        gram_CC = warpgroup_mma_wait(0, [gram])
        a, h_own = solved(gram_CC, x_buffer, own_buffer, minus_buffer, minus_buffer, C, False, MERGE)
        if KEEP:
            tma.store_wait(0)
        thread_barrier()
        store_couplings(h_CC, a, h_own, x_buffer, own_buffer, minus_buffer, minus_buffer, C, False, DOT, MERGE)
        fence_async_shared()
        thread_barrier()
        mbarrier.arrive(handed[0].index(part), count=1)
        if KEEP:
            tma.async_copy_shared_to_global(h, [chunk_0 + bounds[0] + step, 0, 0], h_CC)
    if KEEP:
        tma.store_wait(0)
