"""The coupling of a chunk of the delta rule, H = M (I + beta M)^-1, one warp a chunk; see `delta_coupling_triton`.

Shape legend: B batch, T time, H heads, N chunks, C tokens of a chunk, S = 16 tokens of a block.
"""

from __future__ import annotations

import triton.language as tl

from kernels._entry import entry
from kernels.delta_rule.delta_coupling_triton import S, _diagonal, _store_block
from kernels.vector_gates.vector_gate_rows import SIZES, hidden


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
    i = hidden(tl.arange(0, S), length)
    systems += block * C * C
    couplings += block * C * C
    turned, betas = (), ()
    for row in tl.static_range(BLOCKS):
        t_S = n * C + row * S + i
        beta_S = tl.load(beta + (batch * length + t_S) * heads + head, mask=t_S < length, other=0.0).to(tl.float32)
        betas = betas + (beta_S,)
        for col in tl.static_range(row + 1):
            x_SS = tl.load(systems + (col * S * C + row * S) + i[:, None] * C + i[None, :])
            turned = turned + (x_SS,)
    solved, transposed = (), ()
    for row in tl.static_range(BLOCKS):
        xt_SS = turned[row * (row + 1) // 2 + row].to(tl.float32)
        a_SS, h_SS, ht_SS = _diagonal(tl.trans(xt_SS), xt_SS, betas[row], i, MERGE, PRECISION)
        _store_block(couplings, h_SS, row, row, C)
        solved, transposed = solved + (a_SS,), transposed + (ht_SS,)
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
            left = left + ((p_SS * minus_S).to(MERGE),)
