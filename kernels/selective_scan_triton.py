"""Mamba's selective scan in Triton: time in tiles, one state element after the other.

A program owns one sequence and a block of channels. It walks the sequence in tiles of `TILE` tokens; within a tile it loops
over the N state elements, and for each of them scans the tile's tokens. So a tile of x, dt and y stays in registers while N
recurrences pass over it, and what lives in memory is the state at the tiles' borders, N / TILE of a [B, T, D, N] tensor.
Backward recomputes a tile's states from its border and runs the gradient's recurrence through it in reverse.

A warp spans 32 channels and a thread keeps a whole tile of time, so scans need no exchange between threads. This takes
loads of one element a thread, hence `do_not_specialize`: a width known to be aligned would make them wider.

Exponentials bound it: B T D N of them in each pass, at 16 a clock and SM.

Shape legend: B batch, T time, D channels, N state size, M members (each B / M sequences), L tile, C channels of a program.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._entry import entry
from kernels._members import even_rows
from kernels.scan_operator import TILE
from kernels.scan_segments_triton import then

LOG2_E = tl.constexpr(1.4426950408889634)
CHANNELS = 32
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


@entry(do_not_specialize=SIZES)
def selective_scan_forward(
    x_ptr, dt_ptr, rate_ptr, b_ptr, c_ptr, bias_ptr, skip_ptr, gate_ptr, y_ptr, states_ptr,
    gate_stride, n_tokens, width, n_states, n_tiles, sequences_per_member,
    GATED: tl.constexpr, TILE: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Outputs, and the state after every tile; the caller has put the initial one before the first."""
    n_blocks = tl.cdiv(width, CHANNELS)
    sequence = (tl.program_id(0) // n_blocks).to(tl.int64)
    channel_C = tl.program_id(0) % n_blocks * CHANNELS + tl.arange(0, CHANNELS)
    inside_C = channel_C < width
    rate_ptr += sequence // sequences_per_member * n_states * width + channel_C
    states_ptr += sequence * (n_tiles + 1) * n_states * width + channel_C
    own_C = sequence // sequences_per_member * width + channel_C
    first = sequence * n_tokens * width
    x_ptr, dt_ptr, y_ptr = x_ptr + first, dt_ptr + first, y_ptr + first
    gate_ptr += sequence * n_tokens * gate_stride
    read_ptr = sequence * n_states * n_tiles * TILE
    row_L = tl.arange(0, TILE)
    for tile in range(n_tiles):
        token_L = tile * TILE + row_L
        place_LC = token_L[:, None] * width + channel_C[None, :]
        inside_LC = (token_L[:, None] < n_tokens) & inside_C[None, :]
        dt_LC = _time_steps(dt_ptr, place_LC, inside_LC, bias_ptr + own_C, inside_C, GATED)
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
        if GATED:
            skip_C = tl.load(skip_ptr + own_C, mask=inside_C, other=0.0).to(tl.float32)
            y_LC += skip_C[None, :] * tl.load(x_ptr + place_LC, mask=inside_LC, other=0.0).to(tl.float32)
            gate_LC = token_L[:, None] * gate_stride + channel_C[None, :]
            z_LC = tl.load(gate_ptr + gate_LC, mask=inside_LC, other=0.0).to(tl.float32)
            y_LC *= z_LC * tl.sigmoid(z_LC)
        tl.store(y_ptr + place_LC, y_LC.to(y_ptr.dtype.element_ty), mask=inside_LC)
        states_ptr += n_states.to(tl.int64) * width
        # the next tile reads what other threads may have stored
        tl.debug_barrier()


@triton.jit
def _then_back(a_1, e_1, g_1, p_1, a_2, e_2, g_2, p_2):
    """One map e -> a_1 (x_1 + e), then the next; beside it g, the sum x + e that enters the last of the maps."""
    return a_1 * a_2, e_2 + a_2 * e_1, g_2 + p_2 * e_1, a_1 * p_2


@triton.jit
def _over_channels(x_LC, ones, DOTS: tl.constexpr):
    """Sums over channels: by a product with ones in TF32, which is exact enough for 16 bits, or by exchanges."""
    return tl.max(tl.dot(x_LC, ones, input_precision="tf32"), axis=1) if DOTS else tl.sum(x_LC, axis=1)


@entry(do_not_specialize=SIZES)
def selective_scan_backward(  # noqa: PLR0915 - one loop, whose values live in registers
    dy_ptr, x_ptr, dt_ptr, rate_ptr, b_ptr, c_ptr, bias_ptr, skip_ptr, gate_ptr, states_ptr,
    dx_ptr, ddt_ptr, drate_ptr, db_ptr, dc_ptr, dgate_ptr, parts_ptr, dstate_ptr,
    gate_stride, n_tokens, width, n_states, n_tiles, n_sequences, sequences_per_member,
    GATED: tl.constexpr, TILE: tl.constexpr, CHANNELS: tl.constexpr, DOTS: tl.constexpr,
):  # fmt: skip
    """Gradients, tile by tile from the end.

    `dstate` holds the gradient of the state after the tile at hand: the final state's at first, the initial one's at last.
    `drate` is accumulated for each sequence, `db` and `dc` are left as one part for each block of channels. What the next
    state element needs is loaded before this one is computed.
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
    ones = tl.full([CHANNELS, 16], 1.0, tl.float32)
    own_C = sequence // sequences_per_member * width + channel_C
    first = sequence * n_tokens * width
    x_ptr, dt_ptr, dy_ptr = x_ptr + first, dt_ptr + first, dy_ptr + first
    dx_ptr, ddt_ptr, dgate_ptr = dx_ptr + first, ddt_ptr + first, dgate_ptr + first
    gate_ptr += sequence * n_tokens * gate_stride
    dbias_C, dskip_C = tl.zeros([CHANNELS], tl.float32), tl.zeros([CHANNELS], tl.float32)
    if GATED:
        skip_C = tl.load(skip_ptr + own_C, mask=inside_C, other=0.0).to(tl.float32)
    for back in range(n_tiles):
        states_ptr -= n_states.to(tl.int64) * width
        token_L = (n_tiles - 1 - back) * TILE + row_L
        place_LC = token_L[:, None] * width + channel_C[None, :]
        inside_LC = (token_L[:, None] < n_tokens) & inside_C[None, :]
        dt_LC = _time_steps(dt_ptr, place_LC, inside_LC, bias_ptr + own_C, inside_C, GATED)
        u_LC = dt_LC * tl.load(x_ptr + place_LC, mask=inside_LC, other=0.0).to(tl.float32)
        dy_LC = tl.load(dy_ptr + place_LC, mask=inside_LC, other=0.0).to(tl.float32)
        if GATED:
            gate_LC = token_L[:, None] * gate_stride + channel_C[None, :]
            z_LC = tl.load(gate_ptr + gate_LC, mask=inside_LC, other=0.0).to(tl.float32)
            dy_LC *= z_LC * tl.sigmoid(z_LC)
            y_LC = tl.zeros([TILE, CHANNELS], tl.float32)
        du_LC = tl.zeros([TILE, CHANNELS], tl.float32)
        decayed_LC = tl.zeros([TILE, CHANNELS], tl.float32)
        start_C = tl.load(states_ptr, mask=inside_C, other=0.0)
        after_C = tl.load(dstate_ptr, mask=inside_C, other=0.0)
        rate_C = tl.load(rate_ptr, mask=inside_C, other=0.0)
        sum_C = tl.load(drate_ptr, mask=inside_C, other=0.0)
        b_L = tl.load(b_ptr + read_ptr + token_L)
        c_L = tl.load(c_ptr + read_ptr + token_L)
        for n in range(n_states):
            more = tl.minimum(n + 1, n_states - 1)
            next_start_C = tl.load(states_ptr + more * width, mask=inside_C, other=0.0)
            next_after_C = tl.load(dstate_ptr + more * width, mask=inside_C, other=0.0)
            next_rate_C = tl.load(rate_ptr + more * width, mask=inside_C, other=0.0)
            next_sum_C = tl.load(drate_ptr + more * width, mask=inside_C, other=0.0)
            next_b_L = tl.load(b_ptr + read_ptr + more * n_tiles * TILE + token_L)
            next_c_L = tl.load(c_ptr + read_ptr + more * n_tiles * TILE + token_L)
            b_L1, c_L1 = b_L.to(tl.float32)[:, None], c_L.to(tl.float32)[:, None]
            a_LC = tl.exp2(dt_LC * (rate_C * -LOG2_E)[None, :])
            written_LC = u_LC * b_L1
            enters_LC = tl.where(row_L[:, None] == 0, a_LC * start_C[None, :], 0.0)
            _, h_LC = tl.associative_scan((a_LC, written_LC + enters_LC), 0, then)
            # e_t = a_t dh_t is what reaches h_{t-1}: it needs the same exponentials as the states, where a recurrence of dh_t
            # would need those of the next token. Flips inside of a thread cost nothing, unlike a scan with reverse=True.
            leaves_LC = tl.where(row_L[:, None] == TILE - 1, after_C[None, :], 0.0)
            read_LC, late_a_LC = tl.flip(dy_LC * c_L1 + leaves_LC, 0), tl.flip(a_LC, 0)
            _, e_LC, late_dh_LC, _ = tl.associative_scan(
                (late_a_LC, late_a_LC * read_LC, read_LC, tl.full([TILE, CHANNELS], 1.0, tl.float32)), 0, _then_back
            )
            dh_LC = tl.flip(late_dh_LC, 0)
            # the gradient of log a_t is dh_t a_t h_{t-1}, and a_t h_{t-1} is what was not written at t
            dlog_LC = dh_LC * (h_LC - written_LC)
            if GATED:
                y_LC += h_LC * c_L1
            du_LC += dh_LC * b_L1
            decayed_LC += dlog_LC * rate_C[None, :]
            tl.store(drate_ptr + n * width, sum_C - tl.sum(dlog_LC * dt_LC, axis=0), mask=inside_C)
            tl.store(dstate_ptr + n * width, tl.sum(tl.where(row_L[:, None] == TILE - 1, e_LC, 0.0), axis=0), mask=inside_C)
            tl.store(db_ptr + part_ptr + n * n_tiles * TILE + token_L, _over_channels(dh_LC * u_LC, ones, DOTS))
            tl.store(dc_ptr + part_ptr + n * n_tiles * TILE + token_L, _over_channels(h_LC * dy_LC, ones, DOTS))
            start_C, after_C, rate_C, sum_C, b_L, c_L = next_start_C, next_after_C, next_rate_C, next_sum_C, next_b_L, next_c_L
        x_LC = tl.load(x_ptr + place_LC, mask=inside_LC, other=0.0).to(tl.float32)  # again: registers are what is short
        dx_LC, ddt_LC = du_LC * dt_LC, du_LC * x_LC - decayed_LC
        if GATED:
            dx_LC += skip_C[None, :] * dy_LC
            y_LC += skip_C[None, :] * x_LC
            dskip_C += tl.sum(dy_LC * x_LC, axis=0)
            raw_LC = tl.load(dt_ptr + place_LC, mask=inside_LC, other=0.0).to(tl.float32)
            bias_C = tl.load(bias_ptr + own_C, mask=inside_C, other=0.0).to(tl.float32)
            ddt_LC = tl.where(inside_LC, ddt_LC * tl.sigmoid(raw_LC + bias_C[None, :]), 0.0)
            dbias_C += tl.sum(ddt_LC, axis=0)
            z_LC = tl.load(gate_ptr + gate_LC, mask=inside_LC, other=0.0).to(tl.float32)
            open_LC = tl.sigmoid(z_LC)
            dgate_LC = tl.load(dy_ptr + place_LC, mask=inside_LC, other=0.0).to(tl.float32) * y_LC
            dgate_LC *= open_LC * (1.0 + z_LC * (1.0 - open_LC))
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
    selective_scan_forward[(batch * -(-width // CHANNELS),)](
        x_BTD, dt_BTD.contiguous(), _state_first(rate_MDN), _time_last(b_BTN), _time_last(c_BTN), *around,
        y_BTD, states_BSND, stride, length, width, n_states, n_tiles, batch // rate_MDN.shape[0],
        GATED=gate is not None, TILE=TILE, CHANNELS=CHANNELS, num_warps=1,
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
    db_PBNT, dc_PBNT = (x_BTD.new_empty(n_blocks, batch, n_states, n_tiles * TILE, dtype=torch.float32) for _ in range(2))
    dgate_BTD = dx_BTD if gate is None else gate.gate_BTD.new_empty(batch, length, width)
    parts_B2D = drate_BND if gate is None else x_BTD.new_empty(batch, 2, width, dtype=torch.float32)
    x_BTD = x_BTD.contiguous()
    around, stride = _around(gate, x_BTD)
    selective_scan_backward[(batch * n_blocks,)](
        dy_BTD.contiguous(), x_BTD, dt_BTD.contiguous(), _state_first(rate_MDN), _time_last(b_BTN), _time_last(c_BTN), *around,
        states_BSND.contiguous(), dx_BTD, ddt_BTD, drate_BND, db_PBNT, dc_PBNT, dgate_BTD, parts_B2D, dstate_BND,
        stride, length, width, n_states, n_tiles, batch, batch // members,
        GATED=gate is not None, TILE=TILE, CHANNELS=CHANNELS, DOTS=b_BTN.dtype != torch.float32, num_warps=1,
    )  # fmt: skip
    drate_MDN = drate_BND.unflatten(0, (members, -1)).sum(1).mT
    db_BTN, dc_BTN = (part.sum(0)[..., :length].mT for part in (db_PBNT, dc_PBNT))
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


def _time_last(b_BTN: Tensor) -> Tensor:
    """[B, N, T], zeros up to a whole number of tiles: a thread reads one state element's tile of time."""
    batch, length, n_states = b_BTN.shape
    padded_BNT = b_BTN.new_zeros(batch, n_states, -(-length // TILE) * TILE)
    padded_BNT[..., :length] = b_BTN.mT
    return padded_BNT
