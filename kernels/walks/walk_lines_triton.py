"""Scalar log decays as the Hopper walks read them: a line of cumulated ones for each head and chunk.

Shape legend: B batch, T time, H heads, N chunks of C tokens.
"""

from __future__ import annotations

import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from kernels._entry import entry
from kernels.walks.walk_triton import LOG2_E


@entry
def lines_kernel(
    gate, out, length: tl.int32, heads: tl.int32, chunks: tl.int32, C: tl.constexpr, HEADS: tl.constexpr, LET: tl.constexpr
):  # fmt: skip
    """Log2 decays [B, H, N * C] of log decays [B, T, H], summed from the start of each chunk, less half of the chunk's.

    Padding does not decay. LET has the next kernel start beside this one, if it is launched so.

    Grid: (B * N * blocks of HEADS heads,).
    """
    if LET:
        gdc_launch_dependents()
    blocks = tl.cdiv(heads, HEADS)
    block, rest = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    chunk, wide = rest % chunks, (rest // chunks).to(tl.int64)
    head_1H = (block * HEADS + tl.arange(0, HEADS))[None, :]
    token_C1 = (chunk * C + tl.arange(0, C))[:, None]
    inside_CH = (token_C1 < length) & (head_1H < heads)
    step_CH = tl.load(gate + (wide * length + token_C1) * heads + head_1H, mask=inside_CH, other=0.0) * LOG2_E
    line_CH = tl.cumsum(step_CH, 0) - 0.5 * tl.sum(step_CH, 0)[None, :]
    tl.store(out + (wide * heads + head_1H) * chunks * C + token_C1, line_CH, mask=(head_1H < heads) & (token_C1 >= 0))
