"""Mamba's selective scan: the gradient's kernel in Triton, and the launches of both passes.

The forward kernel is `kernels.selective_scan_gluon`. Backward, a program owns one sequence and a block of channels. It goes
through the sequence in tiles of `TILE` tokens from the end; within a tile it loops over the N state elements, recomputes each
from the tile's border and runs the gradient's recurrence back through it. So a tile of x, dt and dy stays in registers while N
recurrences pass over it, and what lives in memory is the state at the tiles' borders, N / TILE of a [B, T, D, N] tensor.

A warp spans 32 channels and a thread keeps a whole tile of time, whose rows are taken apart (`_unstack`): a recurrence is then
one multiply-add a token. This takes loads of one element a thread, hence `do_not_specialize`: a width known to be aligned would
make them wider.

Shape legend: B batch, T time, D channels, N state size, M members (each B / M sequences), L tile, C channels of a program.
"""

# ruff: noqa: RUF005 - Triton knows sums of tuples, but no unpacking into them
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import selective_scan_gluon
from kernels._entry import entry
from kernels.scan_operator import TILE

LOG2_E = tl.constexpr(1.4426950408889634)
CHANNELS = 32
WARPS = 4
"""Warps of a forward program, of 32 channels each, unless there are fewer channels."""
SIZES = ("n_tokens", "width", "n_states", "n_tiles", "n_sequences", "sequences_per_member")


@triton.jit
def _unstack(x, L: tl.constexpr, C: tl.constexpr):
    """The rows of [L, C], L being a power of two, as a tuple; where a thread holds all rows, only names for its registers."""
    if L == 1:
        rows = (tl.reshape(x, [C]),)
    else:
        even, odd = tl.split(tl.permute(tl.reshape(x, [L // 2, 2, C]), (0, 2, 1)))
        evens, odds = _unstack(even, L // 2, C), _unstack(odd, L // 2, C)
        rows = (evens[0], odds[0])
        for n in tl.static_range(1, L // 2):
            rows = rows + (evens[n], odds[n])
    return rows


@triton.jit
def _stack(rows, L: tl.constexpr, C: tl.constexpr):
    """[L, C] of L rows [C]."""
    if L == 1:
        x = tl.reshape(rows[0], [1, C])
    else:
        evens, odds = (rows[0],), (rows[1],)
        for n in tl.static_range(1, L // 2):
            evens, odds = evens + (rows[2 * n],), odds + (rows[2 * n + 1],)
        both = tl.join(_stack(evens, L // 2, C), _stack(odds, L // 2, C))
        x = tl.reshape(tl.permute(both, (0, 2, 1)), [L, C])
    return x


@triton.jit
def _spread(x_L, L: tl.constexpr, C: tl.constexpr):
    """A number for each token, as rows for all channels."""
    return _unstack(tl.broadcast_to(x_L.to(tl.float32)[:, None], [L, C]), L, C)


@triton.jit
def _over_channels(x_LC, L: tl.constexpr, C: tl.constexpr, DOTS: tl.constexpr):
    """Sums over channels, in 16 bit by a product whose right operand is what threads hold already.

    Tensor cores want rows of that operand in four neighbouring lanes and, there, in pairs of registers: with lanes and pairs of
    tokens as its rows nothing has to move. The left operand picks out the rows of a token.
    """
    if DOTS:
        k = tl.arange(0, 4 * L)
        pick_LK = (tl.arange(0, L)[:, None] == (k // 8 * 2 + k % 2)[None, :]).to(x_LC.dtype)
        x_KQ = tl.reshape(tl.permute(tl.reshape(x_LC, [L // 2, 2, C // 4, 4]), (0, 3, 1, 2)), [4 * L, C // 4])
        sums_L = tl.sum(tl.dot(pick_LK, x_KQ), axis=1)
    else:
        sums_L = tl.sum(x_LC, axis=1)
    return sums_L


@triton.jit
def _replay(h_C, slope_C, dt, u, b, L: tl.constexpr):
    """Factors of a tile's tokens; the state before each of them and after the last."""
    factors = (tl.exp2(dt[0] * slope_C),)
    states = (h_C, factors[0] * h_C + u[0] * b[0])
    for t in tl.static_range(1, L):
        factors = factors + (tl.exp2(dt[t] * slope_C),)
        states = states + (factors[t] * states[t] + u[t] * b[t],)
    return factors, states


@triton.jit
def _reverse(e_C, factors, states, dt, dy, c, L: tl.constexpr):
    """Gradients of the states and of the log factors, from the last token to the first; what reaches the state before the tile.

    e_t = a_t dh_t is what reaches h_{t-1}, and e_t h_{t-1} is the gradient of log a_t. Last comes that of the rate.
    """
    dh_C = dy[L - 1] * c[L - 1] + e_C
    e_C = factors[L - 1] * dh_C
    dhs, dlogs = (dh_C,), (e_C * states[L - 1],)
    drate_C = dlogs[0] * dt[L - 1]
    for back in tl.static_range(1, L):
        dh_C = dy[L - 1 - back] * c[L - 1 - back] + e_C
        e_C = factors[L - 1 - back] * dh_C
        dlog_C = e_C * states[L - 1 - back]
        drate_C += dlog_C * dt[L - 1 - back]
        dhs, dlogs = (dh_C,) + dhs, (dlog_C,) + dlogs
    return dhs, dlogs, e_C, drate_C


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


@entry(do_not_specialize=SIZES)
def selective_scan_backward(
    dy_ptr, x_ptr, dt_ptr, rate_ptr, b_ptr, c_ptr, states_ptr,
    dx_ptr, ddt_ptr, drate_ptr, db_ptr, dc_ptr, dstate_ptr,
    n_tokens, width, n_states, n_tiles, n_sequences, sequences_per_member,
    TILE: tl.constexpr, CHANNELS: tl.constexpr, DOTS: tl.constexpr,
):  # fmt: skip
    """Gradients, tile by tile from the end.

    `dstate` holds the gradient of the state after the tile at hand: the final state's at first, the initial one's at last.
    `drate` is accumulated for each sequence, `db` and `dc` are left as one part for each block of channels. What the next
    state element needs is loaded before this one is computed, and sums over channels are made one element later.
    """
    n_blocks = tl.cdiv(width, CHANNELS)
    sequence, block = (tl.program_id(0) // n_blocks).to(tl.int64), tl.program_id(0) % n_blocks
    channel_C = block * CHANNELS + tl.arange(0, CHANNELS)
    inside_C = channel_C < width
    rate_ptr += sequence // sequences_per_member * n_states * width + channel_C
    drate_ptr += sequence * n_states * width + channel_C
    dstate_ptr += sequence * n_states * width + channel_C
    states_ptr += (sequence * (n_tiles + 1) + n_tiles) * n_states * width + channel_C
    row = n_tiles * TILE
    b_ptr += sequence * n_states * row
    c_ptr += sequence * n_states * row
    db_ptr += (block * n_sequences + sequence) * n_states * row
    dc_ptr += (block * n_sequences + sequence) * n_states * row
    SUMMED: tl.constexpr = tl.bfloat16 if DOTS else tl.float32
    for back in range(n_tiles):
        states_ptr -= n_states.to(tl.int64) * width
        token_L = (n_tiles - 1 - back) * TILE + tl.arange(0, TILE)
        place_LC = (sequence * n_tokens + token_L[:, None]) * width + channel_C[None, :]
        inside_LC = (token_L[:, None] < n_tokens) & inside_C[None, :]
        dt_LC = tl.load(dt_ptr + place_LC, mask=inside_LC, other=0.0).to(tl.float32)
        x_LC = tl.load(x_ptr + place_LC, mask=inside_LC, other=0.0).to(tl.float32)
        dy_LC = tl.load(dy_ptr + place_LC, mask=inside_LC, other=0.0).to(tl.float32)
        u_LC, du_LC, decayed_LC = dt_LC * x_LC, tl.zeros_like(dt_LC), tl.zeros_like(dt_LC)
        dt, u, dy = _unstack(dt_LC, TILE, CHANNELS), _unstack(u_LC, TILE, CHANNELS), _unstack(dy_LC, TILE, CHANNELS)
        wrote_LC, read_LC = tl.zeros([TILE, CHANNELS], SUMMED), tl.zeros([TILE, CHANNELS], SUMMED)
        start_C, after_C, rate_C, sum_C, b_L, c_L = _of_state(
            states_ptr, dstate_ptr, rate_ptr, drate_ptr, b_ptr, c_ptr, 0, width, row, token_L, inside_C
        )
        for n in range(n_states):
            db_L, dc_L = _over_channels(wrote_LC, TILE, CHANNELS, DOTS), _over_channels(read_LC, TILE, CHANNELS, DOTS)
            more = tl.minimum(n + 1, n_states - 1)
            following = _of_state(states_ptr, dstate_ptr, rate_ptr, drate_ptr, b_ptr, c_ptr, more, width, row, token_L, inside_C)
            factors, states = _replay(start_C, rate_C * -LOG2_E, dt, u, _spread(b_L, TILE, CHANNELS), TILE)
            dhs, dlogs, e_C, drate_C = _reverse(after_C, factors, states, dt, dy, _spread(c_L, TILE, CHANNELS), TILE)
            dh_LC = _stack(dhs, TILE, CHANNELS)
            du_LC += dh_LC * b_L.to(tl.float32)[:, None]
            decayed_LC += _stack(dlogs, TILE, CHANNELS) * rate_C[None, :]
            tl.store(drate_ptr + n * width, sum_C - drate_C, mask=inside_C)
            tl.store(dstate_ptr + n * width, e_C, mask=inside_C)
            summed = (token_L >= 0) & (n > 0)
            tl.store(db_ptr + (n - 1) * row + token_L, db_L, mask=summed)
            tl.store(dc_ptr + (n - 1) * row + token_L, dc_L, mask=summed)
            wrote_LC = (dh_LC * u_LC).to(SUMMED)
            read_LC = (_stack(states[1:], TILE, CHANNELS) * dy_LC).to(SUMMED)
            start_C, after_C, rate_C, sum_C, b_L, c_L = following
        last = (n_states - 1) * row
        tl.store(db_ptr + last + token_L, _over_channels(wrote_LC, TILE, CHANNELS, DOTS))
        tl.store(dc_ptr + last + token_L, _over_channels(read_LC, TILE, CHANNELS, DOTS))
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
    padded, warps = triton.next_power_of_2(n_states), min(WARPS, triton.next_power_of_2(-(-width // CHANNELS)))
    channels = warps * selective_scan_gluon.channels_of_a_warp(padded)
    selective_scan_gluon.selective_scan_forward[(batch * -(-width // channels),)](
        x_BTD.contiguous(),
        dt_BTD.contiguous(),
        _state_first(rate_MDN),
        b_BTN.contiguous(),
        c_BTN.contiguous(),
        y_BTD,
        states_BSND,
        length,
        width,
        n_states,
        n_tiles,
        batch // rate_MDN.shape[0],
        N=padded,
        C=channels,
        L=TILE,
        WARPS=warps,
        num_warps=warps,
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
        DOTS=b_BTN.dtype != torch.float32,
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
