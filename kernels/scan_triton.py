"""The elementwise scan h_t = a_t h_{t-1} + x_t in Triton: time in tiles that stay inside of a thread, see `selective_scan_triton`.

Bytes: forward reads a and x and writes h; backward reads dh, a and h and writes da and dx.

Shape legend: B batch, T time, D channels, L tokens and C channels of a tile.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from kernels._entry import entry
from kernels.scan_operator import TILE
from kernels.selective_scan_triton import CHANNELS, then


@entry(do_not_specialize=["n_tokens", "width"])
def scan_forward(
    a_ptr, x_ptr, start_ptr, h_ptr, n_tokens, width, START: tl.constexpr, TILE: tl.constexpr, CHANNELS: tl.constexpr
):  # fmt: skip
    """States of one sequence and a block of channels, tile by tile."""
    n_blocks = tl.cdiv(width, CHANNELS)
    sequence = (tl.program_id(0) // n_blocks).to(tl.int64)
    channel_C = tl.program_id(0) % n_blocks * CHANNELS + tl.arange(0, CHANNELS)
    inside_C = channel_C < width
    row_L = tl.arange(0, TILE)
    h_C = tl.zeros([CHANNELS], tl.float32)
    if START:
        h_C = tl.load(start_ptr + sequence * width + channel_C, mask=inside_C, other=0.0).to(tl.float32)
    for tile in range(tl.cdiv(n_tokens, TILE)):
        token_L = tile * TILE + row_L
        place_LC = (sequence * n_tokens + token_L[:, None]) * width + channel_C[None, :]
        inside_LC = (token_L[:, None] < n_tokens) & inside_C[None, :]
        a_LC = tl.load(a_ptr + place_LC, mask=inside_LC, other=1.0).to(tl.float32)
        x_LC = tl.load(x_ptr + place_LC, mask=inside_LC, other=0.0).to(tl.float32)
        enters_LC = tl.where(row_L[:, None] == 0, a_LC * h_C[None, :], 0.0)
        _, h_LC = tl.associative_scan((a_LC, x_LC + enters_LC), 0, then)
        tl.store(h_ptr + place_LC, h_LC.to(h_ptr.dtype.element_ty), mask=inside_LC)
        h_C = tl.sum(tl.where(row_L[:, None] == TILE - 1, h_LC, 0.0), axis=0)


@entry(do_not_specialize=["n_tokens", "width"])
def scan_backward(
    dh_ptr, a_ptr, h_ptr, start_ptr, da_ptr, dx_ptr, dstart_ptr,
    n_tokens, width, START: tl.constexpr, TILE: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """The gradient's recurrence g_t = dh_t + a_{t+1} g_{t+1} from the last tile to the first; dx = g, da_t = g_t h_{t-1}."""
    n_blocks = tl.cdiv(width, CHANNELS)
    sequence = (tl.program_id(0) // n_blocks).to(tl.int64)
    channel_C = tl.program_id(0) % n_blocks * CHANNELS + tl.arange(0, CHANNELS)
    inside_C = channel_C < width
    row_L = tl.arange(0, TILE)
    before_C = tl.zeros([CHANNELS], tl.float32)
    if START:
        before_C = tl.load(start_ptr + sequence * width + channel_C, mask=inside_C, other=0.0).to(tl.float32)
    g_C = tl.zeros([CHANNELS], tl.float32)
    n_tiles = tl.cdiv(n_tokens, TILE)
    for back in range(n_tiles):
        token_L = (n_tiles - 1 - back) * TILE + row_L
        token_L1 = token_L[:, None]
        place_LC = (sequence * n_tokens + token_L1) * width + channel_C[None, :]
        inside_LC = (token_L1 < n_tokens) & inside_C[None, :]
        has_next_LC = (token_L1 < n_tokens - 1) & inside_C[None, :]
        a_LC = tl.load(a_ptr + place_LC, mask=inside_LC, other=1.0).to(tl.float32)
        next_a_LC = tl.load(a_ptr + place_LC + width, mask=has_next_LC, other=1.0).to(tl.float32)
        dh_LC = tl.load(dh_ptr + place_LC, mask=inside_LC, other=0.0).to(tl.float32)
        last_h_LC = tl.load(h_ptr + place_LC - width, mask=inside_LC & (token_L1 > 0), other=0.0).to(tl.float32)
        last_h_LC = tl.where(token_L1 == 0, before_C[None, :], last_h_LC)
        leaves_LC = tl.where(row_L[:, None] == TILE - 1, g_C[None, :], 0.0)
        g_LC = tl.flip(tl.associative_scan((tl.flip(next_a_LC, 0), tl.flip(dh_LC + leaves_LC, 0)), 0, then)[1], 0)
        tl.store(dx_ptr + place_LC, g_LC.to(dx_ptr.dtype.element_ty), mask=inside_LC)
        tl.store(da_ptr + place_LC, (g_LC * last_h_LC).to(da_ptr.dtype.element_ty), mask=inside_LC)
        g_C = tl.sum(tl.where(row_L[:, None] == 0, a_LC * g_LC, 0.0), axis=0)
    tl.store(dstart_ptr + sequence * width + channel_C, g_C, mask=inside_C)


def forward(a_BTD: Tensor, x_BTD: Tensor, start_BD: Tensor | None) -> Tensor:
    """States [B, T, D] in the dtype of x."""
    batch, length, width = x_BTD.shape
    h_BTD = x_BTD.new_empty(batch, length, width)
    n_programs = batch * -(-width // CHANNELS)
    if n_programs:
        scan_forward[(n_programs,)](
            a_BTD.contiguous(),
            x_BTD.contiguous(),
            h_BTD if start_BD is None else start_BD.contiguous(),
            h_BTD,
            length,
            width,
            START=start_BD is not None,
            TILE=TILE,
            CHANNELS=CHANNELS,
            num_warps=1,
        )
    return h_BTD


def backward(dh_BTD: Tensor, a_BTD: Tensor, h_BTD: Tensor, start_BD: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a and x [B, T, D] in their dtypes, and of the initial state [B, D] in fp32."""
    batch, length, width = h_BTD.shape
    da_BTD, dx_BTD = a_BTD.new_empty(batch, length, width), h_BTD.new_empty(batch, length, width)
    dstart_BD = h_BTD.new_empty(batch, width, dtype=torch.float32)
    n_programs = batch * -(-width // CHANNELS)
    if n_programs:
        scan_backward[(n_programs,)](
            dh_BTD.contiguous(),
            a_BTD.contiguous(),
            h_BTD.contiguous(),
            dstart_BD if start_BD is None else start_BD.contiguous(),
            da_BTD,
            dx_BTD,
            dstart_BD,
            length,
            width,
            START=start_BD is not None,
            TILE=TILE,
            CHANNELS=CHANNELS,
            num_warps=1,
        )
    return da_BTD, dx_BTD, dstart_BD
