"""The coupling of a chunk of the delta rule, H = M (I + beta M)^-1; see `kernels.delta_triton`.

Shape legend: C tokens of a chunk.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.vector_gate_tree import paired


@triton.jit
def coupling(m_CC, beta_C, token_C, LEVELS: tl.constexpr, PRECISION: tl.constexpr):
    """H of a strictly lower M, by merging neighbouring blocks of 1, 2, 4, ... tokens; C = 2^LEVELS.

    Two blocks that are solved leave H_21 = (I - H_22 beta_2) M_21 (I - beta_1 H_11), which is as stable as substitution row by
    row. Only corrections to M are rounded.
    """
    h_CC = tl.where(paired(token_C[:, None], token_C[None, :], 1), m_CC, 0.0)
    for level in tl.static_range(2, LEVELS + 1):
        lower_CC = tl.where(paired(token_C[:, None], token_C[None, :], level), m_CC, 0.0)
        lower_CC -= tl.dot(h_CC, beta_C[:, None] * lower_CC, input_precision=PRECISION)
        lower_CC -= tl.dot(lower_CC * beta_C[None, :], h_CC, input_precision=PRECISION)
        h_CC += lower_CC
    return h_CC
