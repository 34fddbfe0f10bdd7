"""How much of a segment reaches its end, for kernels that find what segments do to a state on Hopper.

What is behind a decay of 2^-NOTHING leaves nothing in fp32. With the delta rule that holds if writes do not make a state grow
meanwhile: they only shrink it as long as beta times the square of a key's length is at most 2, which the rule asks for.

Shape legend: N chunks, C = 64 tokens of a chunk.
"""

from __future__ import annotations

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from kernels.delta_rule.delta_hopper_beside import add

NOTHING = tl.constexpr(126)
"""Bits by which a state of fp32 has decayed when nothing of it is left."""
LOOK = tl.constexpr(128)
"""Chunks whose decays are read at once."""


@gluon.constexpr_function
def look_layout(warps):
    """Decays of LOOK chunks in each warp."""
    return gl.BlockedLayout([4], [32], [warps], [0])


@gluon.jit
def reaching_chunks(g, n_first, n_last, C: gl.constexpr, REVERSE: gl.constexpr, WARPS: gl.constexpr, HALVES: gl.constexpr):
    """How many chunks at the end of a segment's walk reach what comes after it.

    The last of C numbers of each chunk of `g` is its log2 decay, or half of it (HALVES).
    """
    i, total = gl.arange(0, LOOK, look_layout(WARPS)), n_last - n_first + 1
    reaching, fall = total * 0, 0.0
    for at in range(0, total, LOOK):
        n = n_last - at - i
        if REVERSE:
            n = n_first + at + i
        inside = at + i < total
        whole = gl.load(g + n * C + C - 1, mask=inside, other=0.0)
        if HALVES:
            whole += whole
        after = fall + gl.associative_scan(whole, 0, add) - whole
        reaching += gl.sum((inside & (after > -NOTHING)).to(gl.int32), 0)
        fall += gl.sum(whole, 0)
    return gl.maximum(reaching, 1)


@gluon.jit
def reaching_at(rate, total, C: gl.constexpr):
    """The same of `total` chunks whose tokens all have one log2 decay."""
    return gl.minimum(total, (NOTHING / gl.maximum(-rate * C, 1e-6)).to(gl.int32) + 1)
