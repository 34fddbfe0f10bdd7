"""Backward of a residual stream and its RMS norm in Triton: one launch, and a sum over its parts.

A program walks over tiles of whole rows of one member and adds up the weight's gradient in registers, so that nothing is read
twice. With n = r rstd and g what comes back to the norm, from all positions and from the chosen ones, the gradients are
    dr = (g w - n mean(g w n)) rstd + ds,    dw = the sum over rows of g n.

Bytes: reads r and dy, writes dr. The next tile is on its way while one is computed.

Shape legend: M members, N rows of a member, D width, B sequences of a member, T time; L rows of a tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._entry import entry

TILE_ELEMENTS = 512
"""Of a tile; a thread of the two warps holds eight of each."""
ROWS = 128
"""Rows of a program."""
WARPS = 2


@triton.jit
def _tile(r_ptr, dy_ptr, place_ptr, member, row_L, column_D, n_rows, n_places, width):
    """A tile's rows of r and of dy, as they lie in memory, and their places among the chosen ones."""
    inside_L = row_L < n_rows
    inside_LD = inside_L[:, None] & (column_D < width)[None, :]
    at_L = member * n_rows + row_L
    at_LD = at_L[:, None] * width + column_D[None, :]
    r_LD = tl.load(r_ptr + at_LD, mask=inside_LD, other=0.0)
    return r_LD, tl.load(dy_ptr + at_LD, mask=inside_LD, other=0.0), tl.load(place_ptr + at_L, mask=inside_L, other=n_places)


@entry(do_not_specialize=("n_rows", "n_tokens", "n_places"))
def stream_norm_backward(
    ds_ptr, dy_ptr, dpicked_ptr, place_ptr, r_ptr, weight_ptr, dr_ptr, parts_ptr, n_rows, n_tokens, n_places, width, eps,
    ROWS: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS rows of one member."""
    n_parts = tl.cdiv(n_rows, ROWS)
    member, part = (tl.program_id(0) // n_parts).to(tl.int64), tl.program_id(0) % n_parts
    column_D = tl.arange(0, BLOCK)
    inside_D = column_D < width
    weight_D = tl.load(weight_ptr + member * width + column_D, mask=inside_D, other=0.0).to(tl.float32)
    dweight_LD = tl.zeros([TILE, BLOCK], tl.float32)
    row_L = part * ROWS + tl.arange(0, TILE)
    r_LD, dy_LD, place_L = _tile(r_ptr, dy_ptr, place_ptr, member, row_L, column_D, n_rows, n_places, width)
    for _ in range(0, ROWS, TILE):
        after = _tile(r_ptr, dy_ptr, place_ptr, member, row_L + TILE, column_D, n_rows, n_places, width)
        chosen_LD = (place_L < n_places)[:, None] & inside_D[None, :]
        at_L = member * n_rows + row_L
        source_LD = (at_L // n_tokens * n_places + place_L)[:, None] * width + column_D[None, :]
        ds_LD = tl.load(ds_ptr + source_LD, mask=chosen_LD, other=0.0).to(tl.float32)
        g_LD = dy_LD.to(tl.float32) + tl.load(dpicked_ptr + source_LD, mask=chosen_LD, other=0.0).to(tl.float32)
        r_LD = r_LD.to(tl.float32)
        scale_L1 = tl.rsqrt(tl.sum(r_LD * r_LD, axis=1) / width + eps)[:, None]
        n_LD = r_LD * scale_L1
        dweight_LD += g_LD * n_LD
        g_LD *= weight_D[None, :]
        along_L = tl.sum(g_LD * n_LD, axis=1) / width
        dr_LD = (g_LD - n_LD * along_L[:, None]) * scale_L1 + ds_LD
        inside_LD = (row_L < n_rows)[:, None] & inside_D[None, :]
        tl.store(dr_ptr + (at_L[:, None] * width + column_D[None, :]), dr_LD.to(dr_ptr.dtype.element_ty), mask=inside_LD)
        row_L += TILE
        r_LD, dy_LD, place_L = after
    tl.store(parts_ptr + (member * n_parts + part) * width + column_D, tl.sum(dweight_LD, axis=0), mask=inside_D)


def backward(
    ds_MSD: Tensor, dy_MND: Tensor, dpicked_MSD: Tensor, r_MND: Tensor, weight_MD: Tensor, place_MBT: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """See `kernels.between.stream_norm_operator`."""
    members, n_rows, width = r_MND.shape
    n_parts, block = triton.cdiv(n_rows, ROWS), triton.next_power_of_2(width)
    dr_MND, parts = r_MND.new_empty(r_MND.shape), r_MND.new_empty(members, n_parts, width, dtype=torch.float32)
    n_places = ds_MSD.shape[1] // place_MBT.shape[1]
    if parts.numel():
        stream_norm_backward[(members * n_parts,)](
            ds_MSD.contiguous(), dy_MND.contiguous(), dpicked_MSD.contiguous(), place_MBT.contiguous(),
            r_MND.contiguous(), weight_MD.contiguous(), dr_MND, parts, n_rows, place_MBT.shape[2], n_places, width, eps,
            ROWS=ROWS, TILE=max(1, TILE_ELEMENTS // block), BLOCK=block, num_warps=WARPS,
        )  # fmt: skip
    return dr_MND, parts.sum(1)
