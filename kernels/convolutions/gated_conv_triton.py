"""Backward of the gated convolution in Triton: one launch for all that is elementwise, a sum over its parts, two products.

A program owns some tokens and channels of one sequence and walks over them in tiles; neighbours of a token are read again, from
the cache. With z = x W^T + b and c the filtered input, dz = dy c, dc = dy z, dx = dy + filter^T dc + dz W; the filter is
recomputed, and the product with W is added in place.

Bytes: the kernel reads dy, x and W x, and writes dz and its share of dx; the products read x once and dz twice, and add to dx.

Shape legend: M members, B sequences of all members together, T time, D channels, K taps, L tokens, C channels of a tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._entry import entry
from kernels.products import product_over_rows

TILE, CHANNELS, TOKENS, WARPS = 8, 64, 64, 4
LENGTHS = ("n_tokens", "sequences_per_member")


@triton.jit
def _store_sum(parts_ptr, place: tl.constexpr, sum_LC, width, inside_C):
    """One of the span's shares; a tap that does not exist has none."""
    if place >= 0:
        tl.store(parts_ptr + place * width, tl.sum(sum_LC, axis=0), mask=inside_C)


@triton.jit
def _from_later(
    dy_ptr, projected_ptr, taps_ptr, bias_C, token_L, channel_C, inside_C, none_LC, n_tokens, width, TAPS: tl.constexpr
):  # fmt: skip
    """What later tokens give to dx by the filter; dc and dy of the tokens themselves."""
    dx_LC, dc_LC, dy_LC = none_LC, none_LC, none_LC
    for ahead in tl.static_range(TAPS):
        later_LC = (token_L[:, None] + ahead) * width + channel_C[None, :]
        inside_LC = (token_L + ahead < n_tokens)[:, None] & inside_C[None, :]
        later_dy_LC = tl.load(dy_ptr + later_LC, mask=inside_LC, other=0.0).to(tl.float32)
        z_LC = tl.load(projected_ptr + later_LC, mask=inside_LC, other=0.0).to(tl.float32) + bias_C[None, :]
        tap_C = tl.load(taps_ptr + (TAPS - 1 - ahead) * width, mask=inside_C, other=0.0)
        dx_LC += later_dy_LC * z_LC * tap_C[None, :]
        if ahead == 0:
            dy_LC, dc_LC = later_dy_LC, later_dy_LC * z_LC
    return dx_LC, dc_LC, dy_LC


@entry(do_not_specialize=LENGTHS)
def gated_conv_backward(
    dy_ptr, x_ptr, projected_ptr, bias_ptr, taps_ptr, tap_bias_ptr, dz_ptr, dx_ptr, parts_ptr,
    n_tokens, width, sequences_per_member,
    TAPS: tl.constexpr, TOKENS: tl.constexpr, TILE: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Some tokens and channels: dz, dx without its product, and shares of the gradients of the taps, their bias and b."""
    n_spans, n_blocks = tl.cdiv(n_tokens, TOKENS), tl.cdiv(width, CHANNELS)
    span = (tl.program_id(0) // n_blocks).to(tl.int64)
    sequence = span // n_spans
    channel_C = tl.program_id(0) % n_blocks * CHANNELS + tl.arange(0, CHANNELS)
    inside_C = channel_C < width
    own = sequence // sequences_per_member * width + channel_C
    bias_C, tap_bias_C = (
        tl.load(bias_ptr + own, mask=inside_C, other=0.0).to(tl.float32),
        tl.load(tap_bias_ptr + own, mask=inside_C, other=0.0).to(tl.float32),
    )
    taps_ptr += sequence // sequences_per_member * TAPS * width + channel_C
    first = (span % n_spans).to(tl.int32) * TOKENS
    start = sequence * n_tokens * width
    dy_ptr, x_ptr, projected_ptr, dz_ptr, dx_ptr = (
        dy_ptr + start,
        x_ptr + start,
        projected_ptr + start,
        dz_ptr + start,
        dx_ptr + start,
    )
    none_LC = tl.zeros([TILE, CHANNELS], tl.float32)
    dtap_bias_LC, dbias_LC, dtap0_LC, dtap1_LC, dtap2_LC, dtap3_LC = none_LC, none_LC, none_LC, none_LC, none_LC, none_LC
    for step in range(0, TOKENS, TILE):
        token_L = first + step + tl.arange(0, TILE)
        dx_LC, dc_LC, dy_LC = _from_later(
            dy_ptr, projected_ptr, taps_ptr, bias_C, token_L, channel_C, inside_C, none_LC, n_tokens, width, TAPS
        )  # fmt: skip
        c_LC = none_LC + tap_bias_C[None, :]
        for back in tl.static_range(TAPS):
            source_L = token_L - back
            seen_LC = ((source_L >= 0) & (source_L < n_tokens))[:, None] & inside_C[None, :]
            x_LC = tl.load(x_ptr + source_L[:, None] * width + channel_C[None, :], mask=seen_LC, other=0.0).to(tl.float32)
            c_LC += x_LC * tl.load(taps_ptr + (TAPS - 1 - back) * width, mask=inside_C, other=0.0)[None, :]
            if back == 0:
                dtap0_LC += dc_LC * x_LC
            elif back == 1:
                dtap1_LC += dc_LC * x_LC
            elif back == 2:
                dtap2_LC += dc_LC * x_LC
            else:
                dtap3_LC += dc_LC * x_LC
        dz_LC = dy_LC * c_LC
        dtap_bias_LC, dbias_LC = dtap_bias_LC + dc_LC, dbias_LC + dz_LC
        place_LC = token_L[:, None] * width + channel_C[None, :]
        inside_LC = (token_L < n_tokens)[:, None] & inside_C[None, :]
        tl.store(dz_ptr + place_LC, dz_LC.to(dz_ptr.dtype.element_ty), mask=inside_LC)
        tl.store(dx_ptr + place_LC, (dy_LC + dx_LC).to(dx_ptr.dtype.element_ty), mask=inside_LC)
    parts_ptr += span * (TAPS + 2) * width + channel_C
    _store_sum(parts_ptr, TAPS + 1, dbias_LC, width, inside_C)
    _store_sum(parts_ptr, TAPS, dtap_bias_LC, width, inside_C)
    _store_sum(parts_ptr, TAPS - 1, dtap0_LC, width, inside_C)
    _store_sum(parts_ptr, TAPS - 2, dtap1_LC, width, inside_C)
    _store_sum(parts_ptr, TAPS - 3, dtap2_LC, width, inside_C)
    _store_sum(parts_ptr, TAPS - 4, dtap3_LC, width, inside_C)


def backward(
    dy_BTD: Tensor, x_BTD: Tensor, projected_BTD: Tensor, weight_MDD: Tensor, bias_MD: Tensor, taps_MKD: Tensor, tap_bias_MD: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """See `kernels.convolutions.gated_conv_operator`."""
    batch, length, width = x_BTD.shape
    members, taps, _ = taps_MKD.shape
    x_BTD = x_BTD.contiguous()
    dz_BTD, dx_BTD = (x_BTD.new_empty(x_BTD.shape) for _ in range(2))
    n_spans = batch * triton.cdiv(length, TOKENS)
    parts = x_BTD.new_empty(n_spans, taps + 2, width, dtype=torch.float32)
    gated_conv_backward[(n_spans * triton.cdiv(width, CHANNELS),)](
        dy_BTD.contiguous(), x_BTD, projected_BTD.contiguous(), bias_MD.contiguous(), taps_MKD.contiguous(),
        tap_bias_MD.contiguous(), dz_BTD, dx_BTD, parts, length, width, batch // members,
        TAPS=taps, TOKENS=TOKENS, TILE=TILE, CHANNELS=CHANNELS, num_warps=WARPS,
    )  # fmt: skip
    sums = parts.view(members, n_spans // members, taps + 2, width).sum(1)
    dx_MND, dz_MND, x_MND = (t.view(members, -1, width) for t in (dx_BTD, dz_BTD, x_BTD))
    torch.baddbmm(dx_MND, dz_MND, weight_MDD, out=dx_MND)
    return dx_BTD, product_over_rows(dz_MND, x_MND), sums
