"""What the selective scan's kernels for few channels share: four lanes own a channel, so that warps are four times as many.

States [N, C] lie in registers as the right operand of a product with 16 rows: lanes 4 c to 4 c + 3 have the states of channel c,
four each. So a warp has 8 channels, and tensor cores sum over the states of all of them: nothing moves between lanes. What they
sum is rounded to bf16.

Shape legend: T time, N = 16 states, L tokens of a tile, C channels of a program.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

LOG2_E = gl.constexpr(1.4426950408889634)
STATES = gl.constexpr(16)
"""States of a channel, those that there are not included."""


@gluon.constexpr_function
def sums_layout(warps):
    """Sums [L, C] of products, and through it their operands."""
    return gl.NVMMADistributedLayout([2, 0], [1, warps], [16, 8])


@gluon.constexpr_function
def states_layout(warps):
    """States [N, C]: lane q of a channel has 2q, 2q + 1, 2q + 8 and 2q + 9."""
    return gl.DotOperandLayout(1, sums_layout(warps), 2)


@gluon.constexpr_function
def left_layout(warps):
    """Rows [L, N] that states are multiplied with."""
    return gl.DotOperandLayout(0, sums_layout(warps), 2)


@gluon.constexpr_function
def rows_layout(columns, warps):
    """Rows of a tile as they come from memory."""
    lanes = min(32, columns // 4)
    return gl.BlockedLayout([1, 4], [32 // lanes, lanes], [warps, 1], [1, 0])


@gluon.constexpr_function
def quads_layout(rows):
    """Rows of states in shared memory so that the four of a lane are beside each other."""
    return gl.SharedLinearLayout([[0, 1], [0, 8], [0, 2], [0, 4]] + [[1 << i, 0] for i in range(rows.bit_length() - 1)])


@gluon.constexpr_function
def four_tokens(warps):
    """Four tokens of a channel in each of the lanes that have its states."""
    lanes, blocks = [[0, 0], [0, 0], [0, 1], [0, 2], [0, 4]], [[0, 8 << i] for i in range(warps.bit_length() - 1)]
    return gl.DistributedLinearLayout([[1, 0], [2, 0]], lanes, blocks, [], [4, 8 * warps])


@gluon.jit
def row_of_products(sums_LC, left_LN, x_NC, t: gl.constexpr, layout: gl.constexpr):
    """Sums whose row t is the sum over n of left[t, n] x[n, c]."""
    row_L1 = gl.arange(0, sums_LC.shape[0], gl.SliceLayout(1, layout))[:, None]
    none_LC = gl.zeros([sums_LC.shape[0], sums_LC.shape[1]], gl.float32, layout)
    return gl.where(row_L1 == t, mma_v2(left_LN, x_NC, none_LC), sums_LC)


@gluon.jit
def tokens_of(buffer, first: gl.constexpr, C: gl.constexpr, WARPS: gl.constexpr):
    """Four rows [1, C] of [L, C] in shared memory, read at once."""
    layout: gl.constexpr = gl.SliceLayout(0, states_layout(WARPS))
    x = buffer.slice(first, 4, 0).load(four_tokens(WARPS))
    even, odd = gl.split(x.reshape([2, 2, C]).permute([0, 2, 1]))
    rows = gl.split(even.permute([1, 0])) + gl.split(odd.permute([1, 0]))
    return (
        gl.convert_layout(rows[0], layout, assert_trivial=True)[None, :],
        gl.convert_layout(rows[2], layout, assert_trivial=True)[None, :],
        gl.convert_layout(rows[1], layout, assert_trivial=True)[None, :],
        gl.convert_layout(rows[3], layout, assert_trivial=True)[None, :],
    )


@gluon.jit
def stacked(rows, L: gl.constexpr):
    """[L, N, C] of L tensors [N, C]; only names registers."""
    if L == 1:
        return rows[0].reshape([1, rows[0].shape[0], rows[0].shape[1]])
    else:
        evens, odds = (rows[0],), (rows[1],)
        for n in gl.static_range(1, L // 2):
            evens, odds = evens + (rows[2 * n],), odds + (rows[2 * n + 1],)
        both = gl.join(stacked(evens, L // 2), stacked(odds, L // 2))
        return both.permute([0, 3, 1, 2]).reshape([L, rows[0].shape[0], rows[0].shape[1]])


@gluon.jit
def entering(ptr, place, n_N1, channel_1C, state_stride, channel_stride, inside_NC):
    """The state, or its gradient, that enters a segment; zero without strides."""
    inside_NC = inside_NC & (channel_stride > 0)
    return gl.load(ptr + (place + n_N1 * state_stride + channel_1C * channel_stride), mask=inside_NC, other=0.0).to(gl.float32)


@gluon.jit
def opened(z_LC):
    """What the outputs are multiplied with, SiLU(z), and its derivative."""
    open_LC = 1.0 / (1.0 + gl.exp2(z_LC * -LOG2_E))
    return z_LC * open_LC, open_LC * (1.0 + z_LC * (1.0 - open_LC))


@gluon.constexpr_function
def batched(warps):
    """Sums [L, N, 8] of products for each token, whose tokens are shared out among warps."""
    return gl.NVMMADistributedLayout([2, 0], [warps, 1, 1], [1, 16, 8])


@gluon.jit
def over_channels(x_LCN, weight_LC, L: gl.constexpr, C: gl.constexpr, WARPS: gl.constexpr):
    """The sum over c of x[t, c, n] weight[t, c], both in shared memory; it comes eight times, [L, N, 8]."""
    LAYOUT: gl.constexpr = batched(WARPS)
    right: gl.constexpr = gl.DotOperandLayout(1, LAYOUT, 2)
    weight_LC8 = weight_LC.load(gl.SliceLayout(2, right))[:, :, None].broadcast_to([L, C, 8])
    x_LNC = x_LCN.permute([0, 2, 1]).load(gl.DotOperandLayout(0, LAYOUT, 2))
    return mma_v2(x_LNC, weight_LC8, gl.zeros([L, STATES, 8], gl.float32, LAYOUT))


@gluon.jit
def store_sums(ptr, sums, first, n_tokens, n_states, L: gl.constexpr, WARPS: gl.constexpr):
    """Stores `over_channels` to rows of [T, states] from token `first` on."""
    LAYOUT: gl.constexpr = batched(WARPS)
    t = first + gl.arange(0, L, gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT)))[:, None, None]
    n = gl.arange(0, STATES, gl.SliceLayout(0, gl.SliceLayout(2, LAYOUT)))[None, :, None]
    same = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT)))[None, None, :]
    inside = (n < n_states) & (t < n_tokens) & (same == 0)
    gl.store(ptr + (t * n_states + n + 0 * same), sums.to(ptr.dtype.element_ty), mask=inside)
