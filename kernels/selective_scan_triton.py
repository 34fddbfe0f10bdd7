"""Mamba's selective scan in Triton: time in tiles, one state element after the other.

A program owns one sequence and a block of channels. It walks the sequence in tiles of `TILE` tokens; within a tile it loops
over the N state elements, and for each of them scans the tile's tokens. So a tile of x, dt and y stays in registers while N
recurrences pass over it, and what lives in memory is the state at the tiles' borders, N / TILE of a [B, T, D, N] tensor.
Backward recomputes a tile's states from its border and runs the gradient's recurrence through it in reverse.

A warp spans 32 channels and a thread keeps a whole tile of time, so scans need no exchange between threads. This takes
loads of one element a thread, hence `do_not_specialize`: a width known to be aligned would make them wider.

Exponentials bound it: B T D N of them forward and twice as many backward, at 16 a clock and SM.

Shape legend: B batch, T time, D channels, N state size, M members (each B / M sequences), L tile, C channels of a program.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._entry import entry
from kernels.scan_operator import TILE

LOG2_E = tl.constexpr(1.4426950408889634)
CHANNELS = 32
SIZES = ("n_tokens", "width", "n_states", "n_tiles", "n_sequences", "sequences_per_member")


@triton.jit
def then(a_1, x_1, a_2, x_2):
    """One map h -> a_1 h + x_1, then h -> a_2 h + x_2."""
    return a_1 * a_2, a_2 * x_1 + x_2


@entry(do_not_specialize=SIZES)
def selective_scan_forward(
    x_ptr, dt_ptr, rate_ptr, b_ptr, c_ptr, y_ptr, states_ptr,
    n_tokens, width, n_states, n_tiles, sequences_per_member,
    TILE: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Outputs, and the state after every tile; the caller has put the initial one before the first."""
    n_blocks = tl.cdiv(width, CHANNELS)
    sequence = (tl.program_id(0) // n_blocks).to(tl.int64)
    channel_C = tl.program_id(0) % n_blocks * CHANNELS + tl.arange(0, CHANNELS)
    inside_C = channel_C < width
    rate_ptr += sequence // sequences_per_member * n_states * width + channel_C
    states_ptr += sequence * (n_tiles + 1) * n_states * width + channel_C
    read_ptr = sequence * n_states * n_tiles * TILE
    row_L = tl.arange(0, TILE)
    for tile in range(n_tiles):
        token_L = tile * TILE + row_L
        place_LC = (sequence * n_tokens + token_L[:, None]) * width + channel_C[None, :]
        inside_LC = (token_L[:, None] < n_tokens) & inside_C[None, :]
        # past the end dt is 0: a factor of 1 and no input carry the state on
        dt_LC = tl.load(dt_ptr + place_LC, mask=inside_LC, other=0.0).to(tl.float32)
        u_LC = dt_LC * tl.load(x_ptr + place_LC, mask=inside_LC, other=0.0).to(tl.float32)
        y_LC = tl.zeros([TILE, CHANNELS], tl.float32)
        for n in range(n_states):
            start_C = tl.load(states_ptr + n * width, mask=inside_C, other=0.0)
            rate_C = tl.load(rate_ptr + n * width, mask=inside_C, other=0.0)
            offset_L = read_ptr + n * n_tiles * TILE + token_L
            b_L = tl.load(b_ptr + offset_L).to(tl.float32)
            c_L = tl.load(c_ptr + offset_L).to(tl.float32)
            a_LC = tl.exp2(dt_LC * (rate_C * -LOG2_E)[None, :])
            enters_LC = tl.where(row_L[:, None] == 0, a_LC * start_C[None, :], 0.0)
            _, h_LC = tl.associative_scan((a_LC, u_LC * b_L[:, None] + enters_LC), 0, then)
            y_LC += h_LC * c_L[:, None]
            end_C = tl.sum(tl.where(row_L[:, None] == TILE - 1, h_LC, 0.0), axis=0)
            tl.store(states_ptr + (n_states + n) * width, end_C, mask=inside_C)
        tl.store(y_ptr + place_LC, y_LC.to(y_ptr.dtype.element_ty), mask=inside_LC)
        states_ptr += n_states.to(tl.int64) * width
        # the next tile reads what other threads may have stored
        tl.debug_barrier()


@entry(do_not_specialize=SIZES)
def selective_scan_backward(
    dy_ptr, x_ptr, dt_ptr, rate_ptr, b_ptr, c_ptr, states_ptr,
    dx_ptr, ddt_ptr, drate_ptr, db_ptr, dc_ptr, dstate_ptr,
    n_tokens, width, n_states, n_tiles, n_sequences, sequences_per_member,
    TILE: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Gradients, tile by tile from the end.

    `dstate` holds the gradient of the state after the tile at hand: the final state's at first, the initial one's at last.
    `drate` is accumulated for each sequence, `db` and `dc` are left as one part for each block of channels.
    """
    n_blocks = tl.cdiv(width, CHANNELS)
    sequence = (tl.program_id(0) // n_blocks).to(tl.int64)
    block = tl.program_id(0) % n_blocks
    channel_C = block * CHANNELS + tl.arange(0, CHANNELS)
    inside_C = channel_C < width
    rate_ptr += sequence // sequences_per_member * n_states * width + channel_C
    drate_ptr += sequence * n_states * width + channel_C
    dstate_ptr += sequence * n_states * width + channel_C
    states_ptr += (sequence * (n_tiles + 1) + n_tiles) * n_states * width + channel_C
    read_ptr = sequence * n_states * n_tiles * TILE
    part_ptr = (block * n_sequences + sequence) * n_states * n_tiles * TILE
    row_L = tl.arange(0, TILE)
    for back in range(n_tiles):
        states_ptr -= n_states.to(tl.int64) * width
        token_L = (n_tiles - 1 - back) * TILE + row_L
        place_LC = (sequence * n_tokens + token_L[:, None]) * width + channel_C[None, :]
        inside_LC = (token_L[:, None] < n_tokens) & inside_C[None, :]
        has_next_LC = (token_L[:, None] < n_tokens - 1) & inside_C[None, :]
        dt_LC = tl.load(dt_ptr + place_LC, mask=inside_LC, other=0.0).to(tl.float32)
        next_dt_LC = tl.load(dt_ptr + place_LC + width, mask=has_next_LC, other=0.0).to(tl.float32)
        x_LC = tl.load(x_ptr + place_LC, mask=inside_LC, other=0.0).to(tl.float32)
        dy_LC = tl.load(dy_ptr + place_LC, mask=inside_LC, other=0.0).to(tl.float32)
        u_LC = dt_LC * x_LC
        du_LC = tl.zeros([TILE, CHANNELS], tl.float32)
        decayed_LC = tl.zeros([TILE, CHANNELS], tl.float32)
        for n in range(n_states):
            start_C = tl.load(states_ptr + n * width, mask=inside_C, other=0.0)
            after_C = tl.load(dstate_ptr + n * width, mask=inside_C, other=0.0)
            rate_C = tl.load(rate_ptr + n * width, mask=inside_C, other=0.0)
            offset_L = n * n_tiles * TILE + token_L
            b_L = tl.load(b_ptr + read_ptr + offset_L).to(tl.float32)
            c_L = tl.load(c_ptr + read_ptr + offset_L).to(tl.float32)
            a_LC = tl.exp2(dt_LC * (rate_C * -LOG2_E)[None, :])
            next_a_LC = tl.exp2(next_dt_LC * (rate_C * -LOG2_E)[None, :])
            written_LC = u_LC * b_L[:, None]
            enters_LC = tl.where(row_L[:, None] == 0, a_LC * start_C[None, :], 0.0)
            _, h_LC = tl.associative_scan((a_LC, written_LC + enters_LC), 0, then)
            leaves_LC = tl.where(row_L[:, None] == TILE - 1, after_C[None, :], 0.0)
            # flips inside of a thread cost nothing, whereas a scan with reverse=True exchanges values between threads
            later_LC = tl.flip(dy_LC * c_L[:, None] + leaves_LC, 0)
            dh_LC = tl.flip(tl.associative_scan((tl.flip(next_a_LC, 0), later_LC), 0, then)[1], 0)
            # the gradient of log a_t is dh_t a_t h_{t-1}, and a_t h_{t-1} is what was not written at t
            dlog_LC = dh_LC * (h_LC - written_LC)
            du_LC += dh_LC * b_L[:, None]
            decayed_LC += dlog_LC * rate_C[None, :]
            drate_C = tl.load(drate_ptr + n * width, mask=inside_C, other=0.0) - tl.sum(dlog_LC * dt_LC, axis=0)
            tl.store(drate_ptr + n * width, drate_C, mask=inside_C)
            tl.store(dstate_ptr + n * width, tl.sum(tl.where(row_L[:, None] == 0, a_LC * dh_LC, 0.0), axis=0), mask=inside_C)
            tl.store(db_ptr + part_ptr + offset_L, tl.sum(dh_LC * u_LC, axis=1))
            tl.store(dc_ptr + part_ptr + offset_L, tl.sum(h_LC * dy_LC, axis=1))
        tl.store(dx_ptr + place_LC, (du_LC * dt_LC).to(dx_ptr.dtype.element_ty), mask=inside_LC)
        tl.store(ddt_ptr + place_LC, (du_LC * x_LC - decayed_LC).to(ddt_ptr.dtype.element_ty), mask=inside_LC)
        # the next tile reads what other threads may have stored
        tl.debug_barrier()


def forward(
    x_BTD: Tensor, dt_BTD: Tensor, rate_MDN: Tensor, b_BTN: Tensor, c_BTN: Tensor, start_BDN: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs in the dtype of x; the final state [B, D, N]; the states at the borders of tiles [B, tiles + 1, N, D]; fp32."""
    batch, length, width = x_BTD.shape
    n_states, n_tiles = rate_MDN.shape[-1], -(-length // TILE)
    states_BSND = x_BTD.new_empty(batch, n_tiles + 1, n_states, width, dtype=torch.float32)
    states_BSND[:, 0] = 0.0 if start_BDN is None else start_BDN.mT
    y_BTD = x_BTD.new_empty(batch, length, width)
    selective_scan_forward[(batch * -(-width // CHANNELS),)](
        x_BTD.contiguous(),
        dt_BTD.contiguous(),
        _state_first(rate_MDN),
        _time_last(b_BTN),
        _time_last(c_BTN),
        y_BTD,
        states_BSND,
        length,
        width,
        n_states,
        n_tiles,
        batch // rate_MDN.shape[0],
        TILE=TILE,
        CHANNELS=CHANNELS,
        num_warps=1,
    )
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, dt, rate, b, c and the initial state; each in the dtype of its tensor, the last one in fp32."""
    batch, length, width = x_BTD.shape
    members, _, n_states = rate_MDN.shape
    n_tiles, n_blocks = -(-length // TILE), -(-width // CHANNELS)
    dx_BTD, ddt_BTD = x_BTD.new_empty(batch, length, width), dt_BTD.new_empty(batch, length, width)
    drate_BND = x_BTD.new_zeros(batch, n_states, width, dtype=torch.float32)
    dstate_BND = torch.zeros_like(drate_BND)
    if dfinal_BDN is not None:
        dstate_BND.copy_(dfinal_BDN.mT)
    db_PBNT, dc_PBNT = (x_BTD.new_empty(n_blocks, batch, n_states, n_tiles * TILE, dtype=torch.float32) for _ in range(2))
    selective_scan_backward[(batch * n_blocks,)](
        dy_BTD.contiguous(),
        x_BTD.contiguous(),
        dt_BTD.contiguous(),
        _state_first(rate_MDN),
        _time_last(b_BTN),
        _time_last(c_BTN),
        states_BSND.contiguous(),
        dx_BTD,
        ddt_BTD,
        drate_BND,
        db_PBNT,
        dc_PBNT,
        dstate_BND,
        length,
        width,
        n_states,
        n_tiles,
        batch,
        batch // members,
        TILE=TILE,
        CHANNELS=CHANNELS,
        num_warps=1,
    )
    drate_MDN = drate_BND.unflatten(0, (members, -1)).sum(1).mT
    db_BTN, dc_BTN = (part.sum(0)[..., :length].mT for part in (db_PBNT, dc_PBNT))
    return (
        dx_BTD,
        ddt_BTD,
        drate_MDN.to(rate_MDN.dtype).contiguous(),
        db_BTN.to(b_BTN.dtype).contiguous(),
        dc_BTN.to(c_BTN.dtype).contiguous(),
        dstate_BND.mT.contiguous(),
    )


def _state_first(rate_MDN: Tensor) -> Tensor:
    """[M, N, D] in fp32: a warp reads 32 channels of one state element."""
    return rate_MDN.mT.to(torch.float32).contiguous()


def _time_last(b_BTN: Tensor) -> Tensor:
    """[B, N, T], zeros up to a whole number of tiles: a thread reads one state element's tile of time."""
    batch, length, n_states = b_BTN.shape
    padded_BNT = b_BTN.new_zeros(batch, n_states, -(-length // TILE) * TILE)
    padded_BNT[..., :length] = b_BTN.mT
    return padded_BNT
