"""What walks over a transposed state share: `delta_hopper_transposed` forward, and those of `delta_hopper_carry`.

Shape legend: C = 64 tokens of a chunk, K key, V value width.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma

from kernels.delta_rule.delta_hopper import turned_layout


@gluon.jit
def operand(x, C: gl.constexpr, DOT: gl.constexpr):
    """Sums as the left operand of the next product, in the registers where they are."""
    return gl.convert_layout(x.to(DOT), gl.DotOperandLayout(0, turned_layout(C), 2))


@gluon.jit
def token_factors(buffer, C: gl.constexpr):
    """A factor of each token, for the columns of sums."""
    return buffer.load(gl.SliceLayout(0, turned_layout(C)))[None, :]


@gluon.jit
def whole_decay(buffer, BK: gl.constexpr):
    """The decay of a whole chunk, for the rows of a state."""
    return buffer.load(gl.SliceLayout(1, turned_layout(BK)))[:, None]


@gluon.jit
def state_places(e_start, V: gl.constexpr, K: gl.constexpr, BK: gl.constexpr):
    """Where 64 of a state's columns are in [K, V], for their transpose, and what of them is inside."""
    wide: gl.constexpr = turned_layout(BK)
    e, d = e_start + gl.arange(0, 64, gl.SliceLayout(1, wide)), gl.arange(0, BK, gl.SliceLayout(0, wide))
    return d[None, :] * V + e[:, None], (d < K)[None, :] & (e < V)[:, None]


@gluon.jit
def error_factors(made, part, C: gl.constexpr, GATED: gl.constexpr):
    """The decays of tokens since the chunk began and their betas, with the sign that errors want."""
    minus_C = -token_factors(made[2].index(part), C)
    since_C = minus_C
    if GATED:
        since_C = token_factors(made[3].index(part), C)
    return since_C, minus_C


@gluon.jit
def start_errors(read_VC, value_VC, factors, h_CC, C: gl.constexpr, GATED: gl.constexpr, DOT: gl.constexpr):
    """Starts the product that makes the errors E of what is read, K S, and the values."""
    since_C, minus_C = factors
    if GATED:
        read_VC = read_VC * since_C
    rest_VC = value_VC - read_VC
    return warpgroup_mma(operand(rest_VC * minus_C, C, DOT), h_CC.permute([1, 0]), rest_VC, is_async=True)


@gluon.jit
def faded(state_VK, made, part, minus_C, BK: gl.constexpr, C: gl.constexpr, GATED: gl.constexpr):
    """A state as its chunk's end sees it, and the factors with which errors enter it; to be made while errors are."""
    enter_C = -minus_C
    if GATED:
        enter_C = token_factors(made[4].index(part), C)
        state_VK = state_VK * whole_decay(made[5].index(part), BK)
    return state_VK, enter_C
