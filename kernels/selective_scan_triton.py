"""Mamba's selective scan: the gradient's kernel in Triton, and the launches of both passes.

The forward kernel is `kernels.selective_scan_gluon`. Backward, a program owns one sequence and a block of channels. It goes
through the sequence in tiles of `TILE` tokens from the end; within a tile it loops over the N state elements, recomputes each
from the tile's border and runs the gradient's recurrence back through it (`kernels.selective_scan_rows`). So a tile of dt, u and
dy stays in registers while N recurrences pass over it, and what lives in memory is the state at the tiles' borders, N / TILE of a
[B, T, D, N] tensor.

A warp spans 32 channels and a thread keeps a whole tile of time, so recurrences need no exchange between threads. This takes
loads of one element a thread, hence `do_not_specialize`: a width known to be aligned would make them wider.

Shape legend: B batch, T time, D channels, N state size, M members (each B / M sequences), L tile, C channels of a program.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import selective_scan_gluon
from kernels._entry import entry
from kernels._members import even_rows
from kernels.scan_operator import TILE
from kernels.selective_scan_rows import over_channels, replay, reverse, spread, stack, unstack

LOG2_E = tl.constexpr(1.4426950408889634)
CHANNELS = 32
WARPS = 2
"""Warps of a forward program, of 32 channels each, unless there are fewer channels."""
ASK = 0 if triton.knobs.runtime.interpret else 4
WIDE = True
NARROW_PARTS = False
PACKED = False
SIZES = ("gate_stride", "n_tokens", "width", "n_states", "n_tiles", "n_sequences", "sequences_per_member")


@triton.jit
def _time_steps(dt_ptr, place_LC, inside_LC, bias_ptr_C, inside_C, GATED: tl.constexpr):
    """A tile of dt, which of a gated scan is softplus(dt + bias); past the end 0: a factor of 1 and no input carry the state on."""
    dt_LC = tl.load(dt_ptr + place_LC, mask=inside_LC, other=0.0).to(tl.float32)
    if GATED:
        raw_LC = dt_LC + tl.load(bias_ptr_C, mask=inside_C, other=0.0).to(tl.float32)[None, :]
        grown_LC = tl.exp2(raw_LC * LOG2_E)
        one_LC = 1.0 + grown_LC
        # log(1 + e), exact for small e too (Higham 2002, section 1.14.1)
        dt_LC = tl.where(one_LC == 1.0, grown_LC, tl.log(one_LC) * (grown_LC / (one_LC - 1.0)))
        dt_LC = tl.where(inside_LC, tl.where(raw_LC > 20.0, raw_LC, dt_LC), 0.0)
    return dt_LC


@triton.jit
def _of_state(states_ptr, dstate_ptr, rate_ptr, drate_ptr, b_ptr, c_ptr, n, width, row, token_L, inside_C):
    """What a tile needs of a state element: its start, the gradient behind the tile, rate, gradient of the rate so far, b and c."""
    return (
        tl.load(states_ptr + n * width, mask=inside_C, other=0.0),
        tl.load(dstate_ptr + n * width, mask=inside_C, other=0.0),
        tl.load(rate_ptr + n * width, mask=inside_C, other=0.0),
        tl.load(drate_ptr + n * width, mask=inside_C, other=0.0),
        tl.load(b_ptr + n * row + token_L),
        tl.load(c_ptr + n * row + token_L),
    )


@triton.jit
def _ask(ptr):
    """Asks the cache of this SM for lines that will be read later; costs no register."""
    tl.inline_asm_elementwise("prefetch.global.L1 [$1]; mov.u32 $0, 0;", "=r,l", [ptr], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def _ask_l2(ptr):
    tl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [ptr], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def _opened(gate_ptr, place_LC, inside_LC):
    """What the outputs are multiplied with, SiLU(z), and its derivative."""
    z_LC = tl.load(gate_ptr + place_LC, mask=inside_LC, other=0.0).to(tl.float32)
    open_LC = tl.sigmoid(z_LC)
    return z_LC * open_LC, open_LC * (1.0 + z_LC * (1.0 - open_LC))


@entry(do_not_specialize=SIZES)
def selective_scan_backward(  # noqa: PLR0915 - one loop, whose values live in registers
    dy_ptr, x_ptr, dt_ptr, rate_ptr, b_ptr, c_ptr, bias_ptr, skip_ptr, gate_ptr, states_ptr,
    dx_ptr, ddt_ptr, drate_ptr, db_ptr, dc_ptr, dgate_ptr, parts_ptr, dstate_ptr,
    gate_stride, n_tokens, width, n_states, n_tiles, n_sequences, sequences_per_member,
    GATED: tl.constexpr, TILE: tl.constexpr, CHANNELS: tl.constexpr, DOTS: tl.constexpr, ASK: tl.constexpr, PACKED: tl.constexpr = False,
):  # fmt: skip
    """Gradients, tile by tile from the end.

    `dstate` holds the gradient of the state after the tile at hand: the final state's at first, the initial one's at last.
    `drate` is accumulated for each sequence, `db` and `dc` are left as one part for each block of channels. Sums over
    channels are made one state element late, so that nothing waits for them.
    """
    n_blocks = tl.cdiv(width, CHANNELS)
    sequence, block = (tl.program_id(0) // n_blocks).to(tl.int64), tl.program_id(0) % n_blocks
    channel_C = block * CHANNELS + tl.arange(0, CHANNELS)
    inside_C = channel_C < width
    own_C = sequence // sequences_per_member * width + channel_C
    rate_ptr += sequence // sequences_per_member * n_states * width + channel_C
    drate_ptr += sequence * n_states * width + channel_C
    dstate_ptr += sequence * n_states * width + channel_C
    states_ptr += (sequence * (n_tiles + 1) + n_tiles) * n_states * width + channel_C
    row = n_tiles * TILE
    b_ptr, c_ptr = b_ptr + sequence * n_states * row, c_ptr + sequence * n_states * row
    db_ptr += (block * n_sequences + sequence) * n_states * row
    dc_ptr += (block * n_sequences + sequence) * n_states * row
    first = sequence * n_tokens * width
    x_ptr, dt_ptr, dy_ptr = x_ptr + first, dt_ptr + first, dy_ptr + first
    dx_ptr, ddt_ptr, dgate_ptr = dx_ptr + first, ddt_ptr + first, dgate_ptr + first
    gate_ptr += sequence * n_tokens * gate_stride
    dbias_C, dskip_C = tl.zeros([CHANNELS], tl.float32), tl.zeros([CHANNELS], tl.float32)
    SUMMED: tl.constexpr = tl.bfloat16 if DOTS else tl.float32
    for back in range(n_tiles):
        states_ptr -= n_states.to(tl.int64) * width
        token_L = (n_tiles - 1 - back) * TILE + tl.arange(0, TILE)
        place_LC, gate_LC = token_L[:, None] * width + channel_C[None, :], token_L[:, None] * gate_stride + channel_C[None, :]
        inside_LC = (token_L[:, None] < n_tokens) & inside_C[None, :]
        dt_LC = _time_steps(dt_ptr, place_LC, inside_LC, bias_ptr + own_C, inside_C, GATED)
        u_LC = dt_LC * tl.load(x_ptr + place_LC, mask=inside_LC, other=0.0).to(tl.float32)
        dy_LC = tl.load(dy_ptr + place_LC, mask=inside_LC, other=0.0).to(tl.float32)
        if GATED:
            dy_LC *= _opened(gate_ptr, gate_LC, inside_LC)[0]
        elif PACKED:  # a one that the compiler does not know, so that it keeps both dtypes instead of converting again
            dy_LC *= tl.minimum(n_tokens, 1).to(tl.float32)
        if ASK:
            start = block * CHANNELS
            gap = tl.where(back + 1 < n_tiles, n_states, 0)
            element = tl.minimum(tl.arange(0, 32), n_states - 1)
            before_L = tl.maximum(token_L - TILE, 0) * width + start
            if ASK == 2:
                _ask_l2(states_ptr + (element - gap).to(tl.int64) * width - tl.arange(0, CHANNELS))
            else:
                _ask(states_ptr + (element - gap).to(tl.int64) * width - tl.arange(0, CHANNELS))
            if ASK >= 3:
                _ask(dt_ptr + before_L)
                _ask(x_ptr + before_L)
                _ask(dy_ptr + before_L)
            if ASK >= 4:
                first_token = tl.maximum((n_tiles - 2 - back) * TILE, 0)
                _ask(b_ptr + element * row + first_token)
                _ask(c_ptr + element * row + first_token)
        du_LC, decayed_LC, y_LC = tl.zeros_like(dt_LC), tl.zeros_like(dt_LC), tl.zeros_like(dt_LC)
        dt, u, dy = unstack(dt_LC, TILE, CHANNELS), unstack(u_LC, TILE, CHANNELS), unstack(dy_LC, TILE, CHANNELS)
        u16_LC, dy16_LC = u_LC.to(SUMMED), dy_LC.to(SUMMED)
        wrote_LC, read_LC = tl.zeros([TILE, CHANNELS], SUMMED), tl.zeros([TILE, CHANNELS], SUMMED)
        for n in range(n_states):
            db_L, dc_L = over_channels(wrote_LC, TILE, CHANNELS, DOTS), over_channels(read_LC, TILE, CHANNELS, DOTS)
            start_C, after_C, rate_C, sum_C, b_L, c_L = _of_state(
                states_ptr, dstate_ptr, rate_ptr, drate_ptr, b_ptr, c_ptr, n, width, row, token_L, inside_C
            )
            factors, states = replay(start_C, rate_C * -LOG2_E, dt, u, spread(b_L, TILE, CHANNELS), TILE)
            dhs, dlogs, e_C, drate_C = reverse(after_C, factors, states, dt, dy, spread(c_L, TILE, CHANNELS), TILE)
            h_LC, dh_LC = stack(states[1:], TILE, CHANNELS), stack(dhs, TILE, CHANNELS)
            if GATED:
                y_LC += h_LC * c_L.to(tl.float32)[:, None]
            du_LC += dh_LC * b_L.to(tl.float32)[:, None]
            decayed_LC += stack(dlogs, TILE, CHANNELS) * rate_C[None, :]
            tl.store(drate_ptr + n * width, sum_C - drate_C, mask=inside_C)
            tl.store(dstate_ptr + n * width, e_C, mask=inside_C)
            summed = (token_L >= 0) & (n > 0)
            tl.store(db_ptr + (n - 1) * row + token_L, db_L, mask=summed)
            tl.store(dc_ptr + (n - 1) * row + token_L, dc_L, mask=summed)
            if PACKED:
                wrote_LC, read_LC = dh_LC.to(SUMMED) * u16_LC, h_LC.to(SUMMED) * dy16_LC
            else:
                wrote_LC, read_LC = (dh_LC * u_LC).to(SUMMED), (h_LC * dy_LC).to(SUMMED)
        last = (n_states - 1) * row
        tl.store(db_ptr + last + token_L, over_channels(wrote_LC, TILE, CHANNELS, DOTS))
        tl.store(dc_ptr + last + token_L, over_channels(read_LC, TILE, CHANNELS, DOTS))
        x_LC = tl.load(x_ptr + place_LC, mask=inside_LC, other=0.0).to(tl.float32)  # again: registers are what is short
        dx_LC, ddt_LC = du_LC * dt_LC, du_LC * x_LC - decayed_LC
        if GATED:
            skip_C = tl.load(skip_ptr + own_C, mask=inside_C, other=0.0).to(tl.float32)
            dx_LC += skip_C[None, :] * dy_LC
            y_LC += skip_C[None, :] * x_LC
            dskip_C += tl.sum(dy_LC * x_LC, axis=0)
            raw_LC = tl.load(dt_ptr + place_LC, mask=inside_LC, other=0.0).to(tl.float32)
            bias_C = tl.load(bias_ptr + own_C, mask=inside_C, other=0.0).to(tl.float32)
            ddt_LC = tl.where(inside_LC, ddt_LC * tl.sigmoid(raw_LC + bias_C[None, :]), 0.0)
            dbias_C += tl.sum(ddt_LC, axis=0)
            dgate_LC = tl.load(dy_ptr + place_LC, mask=inside_LC, other=0.0).to(tl.float32) * y_LC
            dgate_LC *= _opened(gate_ptr, gate_LC, inside_LC)[1]
            tl.store(dgate_ptr + place_LC, dgate_LC.to(dgate_ptr.dtype.element_ty), mask=inside_LC)
        tl.store(dx_ptr + place_LC, dx_LC.to(dx_ptr.dtype.element_ty), mask=inside_LC)
        tl.store(ddt_ptr + place_LC, ddt_LC.to(ddt_ptr.dtype.element_ty), mask=inside_LC)
        # the next tile reads what other threads may have stored
        tl.debug_barrier()
    if GATED:
        tl.store(parts_ptr + sequence * 2 * width + channel_C, dbias_C, mask=inside_C)
        tl.store(parts_ptr + (sequence * 2 + 1) * width + channel_C, dskip_C, mask=inside_C)


class Gate(NamedTuple):
    """What surrounds a scan in Mamba's block, for members with parameters of their own.

    Args:
        bias_MD: of the time steps, before their softplus.
        skip_MD: the inputs' share in the outputs.
        gate_BTD: its SiLU multiplies the outputs.
    """

    bias_MD: Tensor
    skip_MD: Tensor
    gate_BTD: Tensor


def gate_of(bias_MD: Tensor | None, skip_MD: Tensor | None, gate_BTD: Tensor | None) -> Gate | None:
    """All three or nothing."""
    return None if bias_MD is None or skip_MD is None or gate_BTD is None else Gate(bias_MD, skip_MD, gate_BTD)


def forward(
    x_BTD: Tensor, dt_BTD: Tensor, rate_MDN: Tensor, b_BTN: Tensor, c_BTN: Tensor, start_BDN: Tensor | None, gate: Gate | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs in the dtype of x; the final state [B, D, N]; the states at the borders of tiles [B, tiles + 1, N, D]; fp32."""
    batch, length, width = x_BTD.shape
    n_states, n_tiles = rate_MDN.shape[-1], -(-length // TILE)
    states_BSND = x_BTD.new_empty(batch, n_tiles + 1, n_states, width, dtype=torch.float32)
    states_BSND[:, 0] = 0.0 if start_BDN is None else start_BDN.mT
    y_BTD = x_BTD.new_empty(batch, length, width)
    x_BTD = x_BTD.contiguous()
    around, stride = _around(gate, x_BTD)
    padded, warps = triton.next_power_of_2(n_states), min(WARPS, triton.next_power_of_2(-(-width // CHANNELS)))
    channels = warps * selective_scan_gluon.channels_of_a_warp(padded)
    selective_scan_gluon.selective_scan_forward[(batch * -(-width // channels),)](
        x_BTD, dt_BTD.contiguous(), _state_first(rate_MDN), b_BTN.contiguous(), c_BTN.contiguous(), *around,
        y_BTD, states_BSND, stride, length, width, n_states, n_tiles, batch // rate_MDN.shape[0],
        GATED=gate is not None, N=padded, C=channels, L=TILE, WARPS=warps, num_warps=warps,
    )  # fmt: skip
    return y_BTD, states_BSND[:, -1].mT.clone(memory_format=torch.contiguous_format), states_BSND


def backward(
    dy_BTD: Tensor,
    dfinal_BDN: Tensor | None,
    x_BTD: Tensor,
    dt_BTD: Tensor,
    rate_MDN: Tensor,
    b_BTN: Tensor,
    c_BTN: Tensor,
    states_BSND: Tensor,
    gate: Gate | None,
) -> tuple[Tensor, ...]:
    """See `kernels.scan_operator`; each gradient in the dtype of its tensor, that of the initial state in fp32."""
    batch, length, width = x_BTD.shape
    members, _, n_states = rate_MDN.shape
    n_tiles, n_blocks = -(-length // TILE), -(-width // CHANNELS)
    dx_BTD, ddt_BTD = x_BTD.new_empty(batch, length, width), dt_BTD.new_empty(batch, length, width)
    drate_BND = x_BTD.new_zeros(batch, n_states, width, dtype=torch.float32)
    dstate_BND = torch.zeros_like(drate_BND)
    if dfinal_BDN is not None:
        dstate_BND.copy_(dfinal_BDN.mT)
    db_PBNT, dc_PBNT = (x_BTD.new_empty(n_blocks, batch, n_states, n_tiles * TILE, dtype=torch.bfloat16 if NARROW_PARTS and b_BTN.dtype != torch.float32 else torch.float32) for _ in range(2))
    dgate_BTD = dx_BTD if gate is None else gate.gate_BTD.new_empty(batch, length, width)
    parts_B2D = drate_BND if gate is None else x_BTD.new_empty(batch, 2, width, dtype=torch.float32)
    x_BTD = x_BTD.contiguous()
    around, stride = _around(gate, x_BTD)
    selective_scan_backward[(batch * n_blocks,)](
        dy_BTD.contiguous(), x_BTD, dt_BTD.contiguous(), _state_first(rate_MDN), _time_last(b_BTN, wide=WIDE), _time_last(c_BTN, wide=WIDE), *around,
        states_BSND.contiguous(), dx_BTD, ddt_BTD, drate_BND, db_PBNT, dc_PBNT, dgate_BTD, parts_B2D, dstate_BND,
        stride, length, width, n_states, n_tiles, batch, batch // members,
        GATED=gate is not None, TILE=TILE, CHANNELS=CHANNELS, DOTS=b_BTN.dtype != torch.float32, ASK=ASK, PACKED=PACKED and b_BTN.dtype != torch.float32, num_warps=1,
    )  # fmt: skip
    drate_MDN = drate_BND.unflatten(0, (members, -1)).sum(1).mT
    db_BTN, dc_BTN = (part.sum(0, dtype=torch.float32)[..., :length].mT for part in (db_PBNT, dc_PBNT))
    found = (
        dx_BTD,
        ddt_BTD,
        drate_MDN.to(rate_MDN.dtype).contiguous(),
        db_BTN.to(b_BTN.dtype).contiguous(),
        dc_BTN.to(c_BTN.dtype).contiguous(),
        dstate_BND.mT.contiguous(),
    )
    if gate is None:
        return *found, *(x_BTD.new_empty(0) for _ in range(3))
    dbias_MD, dskip_MD = parts_B2D.unflatten(0, (members, -1)).sum(1).unbind(1)
    return *found, dbias_MD.to(gate.bias_MD.dtype, copy=True), dskip_MD.to(gate.skip_MD.dtype, copy=True), dgate_BTD


def _around(gate: Gate | None, x_BTD: Tensor) -> tuple[tuple[Tensor, Tensor, Tensor], int]:
    """The kernels' tensors of a gate, and the distance of its tokens; x in their places if there is none."""
    if gate is None:
        return (x_BTD, x_BTD, x_BTD), 0
    gate_BTD = even_rows(gate.gate_BTD)
    return (gate.bias_MD.contiguous(), gate.skip_MD.contiguous(), gate_BTD), gate_BTD.stride(1)


def _state_first(rate_MDN: Tensor) -> Tensor:
    """[M, N, D] in fp32: a warp reads 32 channels of one state element."""
    return rate_MDN.mT.to(torch.float32).contiguous()


def _time_last(b_BTN: Tensor, wide: bool = False) -> Tensor:
    """[B, N, T], zeros up to a whole number of tiles: a thread reads one state element's tile of time."""
    batch, length, n_states = b_BTN.shape
    padded_BNT = b_BTN.new_zeros(batch, n_states, -(-length // TILE) * TILE, dtype=torch.float32 if wide else b_BTN.dtype)
    padded_BNT[..., :length] = b_BTN.mT
    return padded_BNT
