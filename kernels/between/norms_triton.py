"""Backward of one layer norm, or of two in a row around a residual, in Triton: one launch, and a sum over its parts.

A program walks over tiles of whole rows of one member and adds up the parameters' gradients in registers, so that nothing is read
twice. With x1 = (r - mean) / std, s = r + x1 w1 + b1 and x2 that of s, the gradients are
    ds' = ds + N(dy w2, x2) / std_s,    dr = ds' + N(ds' w1, x1) / std_r,    N(g, x) = g - mean(g) - x mean(g x),
and the sums over rows of dy x2, dy, ds' x1 and ds'.

Bytes: reads r and dy, writes dr; ds is read where it is not zero.

Shape legend: M members, N rows of a member, D width; L rows of a tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._entry import entry

TILE_ELEMENTS = 1024
"""Of a tile; a thread of the four warps holds eight of each."""
ROWS = 128
"""Rows of a program."""
WARPS = 4
SIZES = ("n_rows", "n_tokens", "n_places")


@triton.jit
def _normalize(x_LD, inside_D, width, eps):
    """Rows of zero mean and unit variance, and one over their standard deviations."""
    mean_L = tl.sum(x_LD, axis=1) / width
    x_LD = tl.where(inside_D[None, :], x_LD - mean_L[:, None], 0.0)
    scale_L = tl.rsqrt(tl.sum(x_LD * x_LD, axis=1) / width + eps)
    return x_LD * scale_L[:, None], scale_L


@triton.jit
def _through(g_LD, x_LD, scale_L, width):
    """The gradient of what was normalised from that of its normal form x."""
    mean_L = tl.sum(g_LD, axis=1) / width
    along_L = tl.sum(g_LD * x_LD, axis=1) / width
    return (g_LD - mean_L[:, None] - x_LD * along_L[:, None]) * scale_L[:, None]


@entry(do_not_specialize=SIZES)
def norms_backward(
    ds_ptr, dpicked_ptr, place_ptr, dy_ptr, r_ptr, weight1_ptr, bias1_ptr, weight2_ptr, dr_ptr, parts_ptr,
    n_rows, n_tokens, n_places, width, eps,
    PAIR: tl.constexpr, PLACED: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS rows of one member."""
    n_parts = tl.cdiv(n_rows, ROWS)
    member = (tl.program_id(0) // n_parts).to(tl.int64)
    part = tl.program_id(0) % n_parts
    column_D = tl.arange(0, BLOCK)
    inside_D = column_D < width
    own = member * width + column_D
    weight1_D = tl.load(weight1_ptr + own, mask=inside_D, other=0.0).to(tl.float32)
    if PAIR:
        bias1_D = tl.load(bias1_ptr + own, mask=inside_D, other=0.0).to(tl.float32)
        weight2_D = tl.load(weight2_ptr + own, mask=inside_D, other=0.0).to(tl.float32)
    none_LD = tl.zeros([TILE, BLOCK], tl.float32)
    dweight1_LD, dbias1_LD, dweight2_LD, dbias2_LD = none_LD, none_LD, none_LD, none_LD
    for start in range(0, ROWS, TILE):
        row_L = part * ROWS + start + tl.arange(0, TILE)
        inside_L = row_L < n_rows
        inside_LD = inside_L[:, None] & inside_D[None, :]
        place_LD = (member * n_rows + row_L)[:, None] * width + column_D[None, :]
        r_LD = tl.load(r_ptr + place_LD, mask=inside_LD, other=0.0).to(tl.float32)
        g_LD = tl.load(dy_ptr + place_LD, mask=inside_LD, other=0.0).to(tl.float32)
        x1_LD, scale1_L = _normalize(r_LD, inside_D, width, eps)
        if PLACED:
            found_L = tl.load(place_ptr + member * n_rows + row_L, mask=inside_L, other=n_places)
            sequence_L = (member * n_rows + row_L) // n_tokens
            source_LD = (sequence_L * n_places + found_L)[:, None] * width + column_D[None, :]
            found_LD = inside_LD & (found_L < n_places)[:, None]
            g_LD += tl.load(dpicked_ptr + source_LD, mask=found_LD, other=0.0).to(tl.float32)
        if PAIR:
            s_LD = tl.where(inside_D[None, :], r_LD + x1_LD * weight1_D[None, :] + bias1_D[None, :], 0.0)
            x2_LD, scale2_L = _normalize(s_LD, inside_D, width, eps)
            dweight2_LD += g_LD * x2_LD
            dbias2_LD += g_LD
            g_LD = _through(g_LD * weight2_D[None, :], x2_LD, scale2_L, width)
            if PLACED:
                g_LD += tl.load(ds_ptr + source_LD, mask=found_LD, other=0.0).to(tl.float32)
            else:
                g_LD += tl.load(ds_ptr + place_LD, mask=inside_LD, other=0.0).to(tl.float32)
        dweight1_LD += g_LD * x1_LD
        dbias1_LD += g_LD
        dr_LD = _through(g_LD * weight1_D[None, :], x1_LD, scale1_L, width)
        if PAIR:
            dr_LD += g_LD
        tl.store(dr_ptr + place_LD, dr_LD.to(dr_ptr.dtype.element_ty), mask=inside_LD)
    if PAIR:
        parts_ptr += (member * n_parts + part) * 4 * width + column_D
        tl.store(parts_ptr + 2 * width, tl.sum(dweight2_LD, axis=0), mask=inside_D)
        tl.store(parts_ptr + 3 * width, tl.sum(dbias2_LD, axis=0), mask=inside_D)
    else:
        parts_ptr += (member * n_parts + part) * 2 * width + column_D
    tl.store(parts_ptr, tl.sum(dweight1_LD, axis=0), mask=inside_D)
    tl.store(parts_ptr + width, tl.sum(dbias1_LD, axis=0), mask=inside_D)


def backward(
    ds: Tensor,
    dy_MND: Tensor,
    dpicked: Tensor,
    r_MND: Tensor,
    weight1_MD: Tensor,
    bias1_MD: Tensor,
    weight2_MD: Tensor | None,
    bias2_MD: Tensor | None,
    place_MBT: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """See `kernels.between.norms_operator`."""
    members, n_rows, width = r_MND.shape
    n_parts, n_parameters = triton.cdiv(n_rows, ROWS), 2 if weight2_MD is None else 4
    dr_MND = r_MND.new_empty(r_MND.shape)
    parts = r_MND.new_empty(members, n_parts, n_parameters, width, dtype=torch.float32)
    block = triton.next_power_of_2(width)
    n_tokens, n_places = (1, 1) if place_MBT is None else (place_MBT.shape[2], ds.shape[1] // place_MBT.shape[1])
    if parts.numel():
        norms_backward[(members * n_parts,)](
            ds.contiguous(), dpicked.contiguous(), dpicked if place_MBT is None else place_MBT.contiguous(),
            dy_MND.contiguous(), r_MND.contiguous(),
            weight1_MD.contiguous(), bias1_MD.contiguous(), weight1_MD if weight2_MD is None else weight2_MD.contiguous(),
            dr_MND, parts, n_rows, n_tokens, n_places, width, eps,
            PAIR=weight2_MD is not None, PLACED=place_MBT is not None, ROWS=ROWS, TILE=max(1, TILE_ELEMENTS // block), BLOCK=block,
            num_warps=WARPS,
        )  # fmt: skip
    return dr_MND, parts.sum(1)
