"""Pieces of the kernels for Mamba-2's narrow states in Gluon: layouts of one warp, operands, and scalars of tokens.

Shape legend: as `kernels.narrow.ssd_forward_triton`; E heads of a group, padded to a power of two.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

LOG2_E = gl.constexpr(1.4426950408889634)
LEAST = gl.constexpr(1e-37)
"""A time step whose logarithm there is."""


@gluon.constexpr_function
def products():
    """Of accumulators."""
    return gl.NVMMADistributedLayout([2, 0], [1, 1], [16, 8])


@gluon.constexpr_function
def copied(width):
    """Of rows on their way into shared memory, 16 bytes a thread."""
    return gl.BlockedLayout([1, 8], [256 // width, width // 8], [1, 1], [1, 0])


@gluon.constexpr_function
def slots(width):
    """Of rows in shared memory: eight rows of 16 bytes meet no bank twice."""
    return gl.SwizzledSharedLayout(8, 64 // width, width // 8, [1, 0])


@gluon.constexpr_function
def plain(rank):
    """Of scalars in shared memory."""
    return gl.SwizzledSharedLayout(1, 1, 1, list(range(rank))[::-1])


@gluon.constexpr_function
def by_token(tokens, heads):
    """[C, E]: a thread has E tokens of a head."""
    return gl.BlockedLayout([tokens * heads // 32, 1], [32 // heads, heads], [1, 1], [0, 1])


@gluon.jit
def added(a, b):
    """What a scan does."""
    return a + b


@gluon.jit
def softplus(z):
    """max(z, 0) + log(1 + exp(-|z|)), small ones without losing the exponential beside the one."""
    e = gl.exp2(-gl.abs(z) * LOG2_E)
    one = 1.0 + e
    return gl.maximum(z, 0.0) + gl.where(one == 1.0, e, gl.log(one) * (e / gl.where(one == 1.0, 1.0, one - 1.0)))


@gluon.jit
def slope_of(dt):
    """(1 - exp(-dt)) / dt, the derivative of a softplus where that is dt, by it; small ones without a difference of ones."""
    return gl.where(dt < 0.01, 1.0 - 0.5 * dt, (1.0 - gl.exp2(-dt * LOG2_E)) / gl.maximum(dt, 0.01))


@gluon.jit
def into_left(x_RK, like):
    """Sums as a left operand of the next product; only names registers."""
    return gl.convert_layout(x_RK.to(like), gl.DotOperandLayout(0, products(), 2))


@gluon.jit
def right_of(slot):
    """A right operand [K, N] from shared memory."""
    return slot.load(gl.DotOperandLayout(1, products(), 2))


@gluon.jit
def left_of(slot):
    """A left operand [R, K] from shared memory."""
    return slot.load(gl.DotOperandLayout(0, products(), 2))


@gluon.jit
def no_sums(R: gl.constexpr, N: gl.constexpr):
    """Where products start."""
    return gl.zeros([R, N], gl.float32, products())


@gluon.jit
def as_sums(x_RN):
    """A left operand in fp32 as sums; only names registers."""
    return gl.convert_layout(x_RN.to(gl.float32), products())


@gluon.jit
def four_shares(x_RN, R: gl.constexpr, N: gl.constexpr):
    """Sums over columns by four neighbouring lanes, [R, 4], each of what it has."""
    return gl.sum(gl.sum(x_RN.reshape([R, N // 8, 4, 2]), 3), 1)


@gluon.jit
def lane_shares(x_RN, R: gl.constexpr, N: gl.constexpr):
    """Sums by lane, [32], each of what it has."""
    return gl.sum(four_shares(x_RN, R, N).reshape([R // 8, 8, 4]), 0).reshape([32])


@gluon.jit
def by_tokens(slots_EC, HEADS: gl.constexpr, C: gl.constexpr):
    """Slots of heads as [C, E]."""
    return slots_EC._reinterpret(gl.float32, [HEADS, C], plain(2)).permute([1, 0])


@gluon.jit
def ask(slot, ptr, ROWS: gl.constexpr, COLS: gl.constexpr, row_limit, col_limit, WHOLE: gl.constexpr, STRIDE: gl.constexpr):
    """Sends rows on their way into shared memory, 0 beyond the limits."""
    L: gl.constexpr = copied(COLS)
    r = gl.arange(0, ROWS, gl.SliceLayout(1, L))
    c = gl.arange(0, COLS, gl.SliceLayout(0, L))
    at_RC = r.to(gl.int64)[:, None] * STRIDE + c[None, :]
    if WHOLE:
        async_copy.async_copy_global_to_shared(slot, ptr + at_RC)
    else:
        async_copy.async_copy_global_to_shared(slot, ptr + at_RC, (r[:, None] < row_limit) & (c[None, :] < col_limit))
