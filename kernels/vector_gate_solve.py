"""The coupling of a chunk of the delta rule, H = M (I + beta M)^-1; see `kernels.delta_triton`.

Shape legend: C tokens of a chunk.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels._entry import entry
from kernels.delta_coupling_triton import S, _diagonal, _store_block
from kernels.vector_gate_rows import SIZES
from kernels.vector_gate_tree import paired


@triton.jit
def coupling(m_CC, beta_C, token_C, LEVELS: tl.constexpr, PRECISION: tl.constexpr, HALF: tl.constexpr):
    """H of a strictly lower M, by merging neighbouring blocks of 1, 2, 4, ... tokens; C = 2^LEVELS.

    Two blocks that are solved leave H_21 = (I - H_22 beta_2) M_21 (I - beta_1 H_11), which is as stable as substitution row by
    row. Only corrections to M are rounded.
    """
    h_CC = tl.where(paired(token_C[:, None], token_C[None, :], 1), m_CC, 0.0)
    for level in tl.static_range(2, LEVELS + 1):
        lower_CC = tl.where(paired(token_C[:, None], token_C[None, :], level), m_CC, 0.0)
        if HALF:
            h16_CC = h_CC.to(tl.float16)
            lower_CC -= tl.dot(h16_CC, (beta_C[:, None] * lower_CC).to(tl.float16))
            lower_CC -= tl.dot((lower_CC * beta_C[None, :]).to(tl.float16), h16_CC)
        else:
            lower_CC -= tl.dot(h_CC, beta_C[:, None] * lower_CC, input_precision=PRECISION)
            lower_CC -= tl.dot(lower_CC * beta_C[None, :], h_CC, input_precision=PRECISION)
        h_CC += lower_CC
    return h_CC


@entry(do_not_specialize=SIZES)
def solve_kernel(
    beta, systems, couplings, length: tl.int32, heads: tl.int32, C: tl.constexpr, MERGE: tl.constexpr, PRECISION: tl.constexpr
):
    """Grid: (B * H * N,), one warp a chunk. systems holds M transposed, [B, H, N, C, C]; couplings gets H."""
    BLOCKS: tl.constexpr = C // S
    chunks = tl.cdiv(length, C)
    block = tl.program_id(0).to(tl.int64)
    head_index, n = block // chunks, tl.program_id(0) % chunks
    batch, head = head_index // heads, head_index % heads
    i = tl.arange(0, S) + tl.minimum(length, 0)
    systems += block * C * C
    couplings += block * C * C
    turned, betas = (), ()
    for row in tl.static_range(BLOCKS):
        t_S = n * C + row * S + i
        beta_S = tl.load(beta + (batch * length + t_S) * heads + head, mask=t_S < length, other=0.0).to(tl.float32)
        betas = betas + (beta_S,)  # noqa: RUF005
        for col in tl.static_range(row + 1):
            x_SS = tl.load(systems + (col * S * C + row * S) + i[:, None] * C + i[None, :])
            turned = turned + (x_SS,)  # noqa: RUF005
    solved, transposed = (), ()
    for row in tl.static_range(BLOCKS):
        xt_SS = turned[row * (row + 1) // 2 + row].to(tl.float32)
        a_SS, h_SS, ht_SS = _diagonal(tl.trans(xt_SS), xt_SS, betas[row], i, MERGE, PRECISION)
        _store_block(couplings, h_SS, row, row, C)
        solved, transposed = solved + (a_SS,), transposed + (ht_SS,)  # noqa: RUF005
    for row in tl.static_range(1, BLOCKS):
        left = (solved[row],)
        for back in tl.static_range(1, row + 1):
            p_SS = tl.zeros([S, S], tl.float32)
            for step in tl.static_range(back):
                xt_SS = turned[(row - step) * (row - step + 1) // 2 + row - back]
                p_SS = tl.dot(left[step], tl.trans(xt_SS).to(MERGE), p_SS, input_precision=PRECISION)
            minus_S = -betas[row - back][None, :]
            p_SS = tl.dot((p_SS * minus_S).to(MERGE), tl.trans(transposed[row - back]).to(MERGE), p_SS, input_precision=PRECISION)
            _store_block(couplings, p_SS, row, row - back, C)
            _store_block(couplings, tl.zeros([S, S], tl.float32), row - back, row, C)
            left = left + ((p_SS * minus_S).to(MERGE),)  # noqa: RUF005
