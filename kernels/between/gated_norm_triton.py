"""Backward of an RMS norm of gated rows in Triton: one launch, and a sum over its parts.

A program walks over tiles of whole rows of one member and adds up the weight's gradient in registers, so that nothing is read
twice. With p = x silu(z), n = p rstd and q = dy w, the gradients are
    dp = (q - n mean(q n)) rstd,    dx = dp silu(z),    dz = dp x silu'(z),    dw = the sum over rows of dy n.

Bytes: reads x, z and dy, writes dx and dz. The next tile is on its way while one is computed.

Shape legend: M members, N rows of a member, D width; L rows of a tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._entry import entry
from kernels._members import even_rows

TILE_ELEMENTS = 512
"""Of a tile; a thread of an only warp holds sixteen of each, and sums over a row stay inside of the warp."""
ROWS = 64
"""Rows of a program."""
ONE_WARP, WARPS = 512, 4
"""The widest rows that a warp holds without spills, and warps of wider ones."""
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _tile(x_ptr, gate_ptr, dy_ptr, member, row_L, column_D, n_rows, gate_stride, width):
    """A tile's rows of x, of the gate and of dy, as they lie in memory."""
    inside_LD = (row_L < n_rows)[:, None] & (column_D < width)[None, :]
    row_L1 = (member * n_rows + row_L)[:, None]
    place_LD = row_L1 * width + column_D[None, :]
    x_LD = tl.load(x_ptr + place_LD, mask=inside_LD, other=0.0)
    z_LD = tl.load(gate_ptr + (row_L1 * gate_stride + column_D[None, :]), mask=inside_LD, other=0.0)
    return x_LD, z_LD, tl.load(dy_ptr + place_LD, mask=inside_LD, other=0.0)


@entry(do_not_specialize=("n_rows", "gate_stride", "dgate_stride"))
def gated_norm_backward(
    x_ptr, gate_ptr, dy_ptr, weight_ptr, dx_ptr, dgate_ptr, parts_ptr, n_rows, gate_stride, dgate_stride, width, eps,
    NORM: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS rows of one member; without NORM only the gate's.

    The gate's rows are UNIT * gate_stride apart, so that they are known to start on 16 bytes, those of its gradient likewise.
    """
    gate_stride, dgate_stride = gate_stride * UNIT, dgate_stride * UNIT
    n_parts = tl.cdiv(n_rows, ROWS)
    member, part = (tl.program_id(0) // n_parts).to(tl.int64), tl.program_id(0) % n_parts
    column_D = tl.arange(0, BLOCK)
    inside_D = column_D < width
    if NORM:
        weight_D = tl.load(weight_ptr + member * width + column_D, mask=inside_D, other=0.0).to(tl.float32)
    dweight_LD = tl.zeros([TILE, BLOCK], tl.float32)
    row_L = part * ROWS + tl.arange(0, TILE)
    x_LD, z_LD, dy_LD = _tile(x_ptr, gate_ptr, dy_ptr, member, row_L, column_D, n_rows, gate_stride, width)
    for _ in range(0, ROWS, TILE):
        after = _tile(x_ptr, gate_ptr, dy_ptr, member, row_L + TILE, column_D, n_rows, gate_stride, width)
        x_LD, z_LD, g_LD = x_LD.to(tl.float32), z_LD.to(tl.float32), dy_LD.to(tl.float32)
        open_LD = 1.0 / (1.0 + tl.exp2(z_LD * -LOG2_E))
        silu_LD = z_LD * open_LD
        if NORM:
            p_LD = x_LD * silu_LD
            scale_L = tl.rsqrt(tl.sum(p_LD * p_LD, axis=1) / width + eps)
            n_LD = p_LD * scale_L[:, None]
            dweight_LD += g_LD * n_LD
            g_LD *= weight_D[None, :]
            along_L = tl.sum(g_LD * n_LD, axis=1) / width
            g_LD = (g_LD - n_LD * along_L[:, None]) * scale_L[:, None]
        row_L1 = (member * n_rows + row_L)[:, None]
        place_LD = row_L1 * width + column_D[None, :]
        inside_LD = (row_L < n_rows)[:, None] & inside_D[None, :]
        dz_LD = g_LD * x_LD * (open_LD * (1.0 + z_LD * (1.0 - open_LD)))
        tl.store(dx_ptr + place_LD, (g_LD * silu_LD).to(dx_ptr.dtype.element_ty), mask=inside_LD)
        tl.store(dgate_ptr + (row_L1 * dgate_stride + column_D[None, :]), dz_LD.to(dgate_ptr.dtype.element_ty), mask=inside_LD)
        row_L += TILE
        x_LD, z_LD, dy_LD = after
    if NORM:
        tl.store(parts_ptr + (member * n_parts + part) * width + column_D, tl.sum(dweight_LD, axis=0), mask=inside_D)


def backward(
    dy_MND: Tensor, x_MND: Tensor, gate_MND: Tensor, weight_MD: Tensor | None, eps: float, *, out: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """See `kernels.between.gated_norm_operator`; the gate's gradient is written to even rows if given."""
    members, n_rows, width = x_MND.shape
    n_parts, block = triton.cdiv(n_rows, ROWS), triton.next_power_of_2(width)
    dx_MND, dgate_MND = x_MND.new_empty(x_MND.shape), gate_MND.new_empty(x_MND.shape) if out is None else out
    parts = x_MND.new_empty(members, n_parts, 0 if weight_MD is None else width, dtype=torch.float32)
    x_MND, dy_MND, gate_MND = x_MND.contiguous(), dy_MND.contiguous(), even_rows(gate_MND)
    unit = 8 if gate_MND.stride(1) % 8 == 0 and dgate_MND.stride(1) % 8 == 0 else 1
    if x_MND.numel():
        gated_norm_backward[(members * n_parts,)](
            x_MND, gate_MND, dy_MND, parts if weight_MD is None else weight_MD.contiguous(), dx_MND, dgate_MND, parts,
            n_rows, gate_MND.stride(1) // unit, dgate_MND.stride(1) // unit, width, eps,
            NORM=weight_MD is not None, UNIT=unit, ROWS=ROWS, TILE=max(1, TILE_ELEMENTS // block), BLOCK=block,
            num_warps=1 if block <= ONE_WARP else WARPS,
        )  # fmt: skip
    return dx_MND, dgate_MND, parts.sum(1)
