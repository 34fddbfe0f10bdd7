"""The gradient of Mamba's selective scan in Triton.

A program owns one sequence and a block of channels. It goes through the sequence in tiles of `TILE` tokens from the end; within a
tile it loops over the N state elements, recomputes each from the tile's border and runs the gradient's recurrence back through it
(`selective_scan_rows`). So a tile of dt, u and dy stays in registers while N recurrences pass over it, and what lives in
memory is the state at the tiles' borders, N / TILE of a [B, T, D, N] tensor.

A warp spans 32 channels and a thread keeps a whole tile of time, so recurrences need no exchange between threads. This takes
loads of one element a thread, hence `do_not_specialize`: a width known to be aligned would make them wider. Registers let two
warps run on a scheduler, too few to wait for memory, so a tile asks for everything that the next one will read.

Shape legend: B batch, T time, D channels, N state size, M members (each B / M sequences), L tile, C channels of a program.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels._entry import entry
from kernels.scans.selective_scan_rows import log_1p, over_channels, replay, reverse, spread, stack, unstack

LOG2_E = tl.constexpr(1.4426950408889634)
SIZES = ("gate_stride", "n_tokens", "width", "n_states", "n_tiles", "n_sequences", "sequences_per_member")
AT_ONCE = tl.constexpr(16)
"""State elements that are turned at once, before and after the walk."""


@triton.jit
def _time_steps(dt_ptr, place_LC, inside_LC, bias_ptr_C, inside_C, GATED: tl.constexpr):
    """A tile of dt, which of a gated scan is softplus(dt + bias); past the end 0: a factor of 1 and no input carry the state on."""
    dt_LC = tl.load(dt_ptr + place_LC, mask=inside_LC, other=0.0).to(tl.float32)
    if GATED:
        raw_LC = dt_LC + tl.load(bias_ptr_C, mask=inside_C, other=0.0).to(tl.float32)[None, :]
        dt_LC = tl.maximum(raw_LC, 0.0) + log_1p(tl.exp2(-tl.abs(raw_LC) * LOG2_E))
        dt_LC = tl.where(inside_LC, dt_LC, 0.0)
    return dt_LC


@triton.jit
def _of_state(states_ptr, dstate_ptr, rate_ptr, drate_ptr, n, width, inside_C):
    """Of a state element: its start in this tile, the gradient behind the tile, its rate, and the gradient of the rate so far."""
    return (
        tl.load(states_ptr + n * width, mask=inside_C, other=0.0),
        tl.load(dstate_ptr + n * width, mask=inside_C, other=0.0),
        tl.load(rate_ptr + n * width, mask=inside_C, other=0.0),
        tl.load(drate_ptr + n * width, mask=inside_C, other=0.0),
    )


@triton.jit
def _opened(gate_ptr, place_LC, inside_LC):
    """What the outputs are multiplied with, SiLU(z), and its derivative."""
    z_LC = tl.load(gate_ptr + place_LC, mask=inside_LC, other=0.0).to(tl.float32)
    open_LC = tl.sigmoid(z_LC)
    return z_LC * open_LC, open_LC * (1.0 + z_LC * (1.0 - open_LC))


@triton.jit
def _ask(ptr):
    """Asks the cache of this SM for the lines at these addresses, which costs no registers."""
    tl.inline_asm_elementwise("prefetch.global.L1 [$1]; mov.u32 $0, 0;", "=r,l", [ptr], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def _ask_for_tile(
    dy_ptr, x_ptr, dt_ptr, gate_ptr, states_ptr, b_ptr, c_ptr, tile, start, gate_stride, width, n_states, row,
    GATED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """What a tile reads, some steps ahead; of the state elements the first 32, one for each lane."""
    if tile >= 0:
        token_L = tile * TILE + tl.arange(0, TILE)
        place_L = token_L * width + start
        _ask(dy_ptr + place_L)
        _ask(x_ptr + place_L)
        _ask(dt_ptr + place_L)
        if GATED:
            _ask(gate_ptr + token_L * gate_stride + start)
        element = tl.minimum(tl.arange(0, 32), n_states - 1)
        _ask(states_ptr + (element - n_states).to(tl.int64) * width)
        _ask(b_ptr + element * row + tile * TILE)
        _ask(c_ptr + element * row + tile * TILE)


@triton.jit
def _begin(
    rate_ptr, final_ptr, kept_ptr, drate_ptr, dstate_ptr, own_C, sequence, channel_C, inside_C, width, n_states, FINAL: tl.constexpr
):  # fmt: skip
    """Turns the rates and the final state's gradient, [D, N] in memory, to [N, D], where lanes read neighbours."""
    for first in range(0, n_states, AT_ONCE):
        n = first + tl.arange(0, AT_ONCE)
        inside_NC = (n < n_states)[:, None] & inside_C[None, :]
        place_NC, zeros_NC = n[:, None] * width, tl.zeros([AT_ONCE, channel_C.shape[0]], tl.float32)
        rate_NC = tl.load(rate_ptr + own_C[None, :] * n_states + n[:, None], mask=inside_NC, other=0.0).to(tl.float32)
        dfinal_NC = zeros_NC
        if FINAL:
            dfinal_NC = tl.load(
                final_ptr + (sequence * width + channel_C)[None, :] * n_states + n[:, None], mask=inside_NC, other=0.0
            )
        tl.store(kept_ptr[None, :] + place_NC, rate_NC, mask=inside_NC)
        tl.store(drate_ptr[None, :] + place_NC, zeros_NC, mask=inside_NC)
        tl.store(dstate_ptr[None, :] + place_NC, dfinal_NC.to(tl.float32), mask=inside_NC)
    tl.debug_barrier()


@triton.jit
def _end(dstate_ptr, dstart_ptr, sequence, channel_C, inside_C, width, n_states):
    """Turns the initial state's gradient back."""
    for first in range(0, n_states, AT_ONCE):
        n = first + tl.arange(0, AT_ONCE)
        inside_NC = (n < n_states)[:, None] & inside_C[None, :]
        dstart_NC = tl.load(dstate_ptr[None, :] + n[:, None] * width, mask=inside_NC, other=0.0)
        tl.store(dstart_ptr + (sequence * width + channel_C)[None, :] * n_states + n[:, None], dstart_NC, mask=inside_NC)


@triton.jit
def _walk_states(
    dt_LC, u_LC, dy_LC, states_ptr, dstate_ptr, rate_ptr, drate_ptr, b_ptr, c_ptr, db_ptr, dc_ptr,
    n_states, width, row, token_L, inside_C,
    GATED: tl.constexpr, TILE: tl.constexpr, CHANNELS: tl.constexpr, DOTS: tl.constexpr,
):  # fmt: skip
    """All recurrences of a tile: gradients of u, the sums of the gradients of log decays times their rates, and the outputs.

    Sums over channels are made one state element late, so that nothing waits for them. In 16 bit their factors are rounded before
    they are multiplied, two at a time.
    """
    SUMMED: tl.constexpr = tl.bfloat16 if DOTS else tl.float32
    du_LC, decayed_LC, y_LC = tl.zeros_like(dt_LC), tl.zeros_like(dt_LC), tl.zeros_like(dt_LC)
    dt, u, dy = unstack(dt_LC, TILE, CHANNELS), unstack(u_LC, TILE, CHANNELS), unstack(dy_LC, TILE, CHANNELS)
    narrow_u_LC, narrow_dy_LC = u_LC.to(SUMMED), dy_LC.to(SUMMED)
    wrote_LC, read_LC = tl.zeros([TILE, CHANNELS], SUMMED), tl.zeros([TILE, CHANNELS], SUMMED)
    coming = _of_state(states_ptr, dstate_ptr, rate_ptr, drate_ptr, 0, width, inside_C)
    for n in range(n_states):
        db_L, dc_L = over_channels(wrote_LC, TILE, CHANNELS, DOTS), over_channels(read_LC, TILE, CHANNELS, DOTS)
        start_C, after_C, rate_C, sum_C = coming
        coming = _of_state(states_ptr, dstate_ptr, rate_ptr, drate_ptr, n + 1, width, inside_C & (n + 1 < n_states))
        b_L, c_L = tl.load(b_ptr + n * row + token_L), tl.load(c_ptr + n * row + token_L)
        factors, states = replay(start_C, rate_C * -LOG2_E, dt, u, spread(b_L, TILE, CHANNELS), TILE, not DOTS)
        dhs, dlogs, e_C, drate_C = reverse(after_C, factors, states, dt, dy, spread(c_L, TILE, CHANNELS), TILE)
        h_LC, dh_LC = stack(states[1:], TILE, CHANNELS), stack(dhs, TILE, CHANNELS)
        if GATED:
            y_LC += h_LC * c_L[:, None]
        du_LC += dh_LC * b_L[:, None]
        decayed_LC += stack(dlogs, TILE, CHANNELS) * rate_C[None, :]
        tl.store(drate_ptr + n * width, sum_C - drate_C, mask=inside_C)
        tl.store(dstate_ptr + n * width, e_C, mask=inside_C)
        summed = (token_L >= 0) & (n > 0)
        tl.store(db_ptr + (n - 1) * row + token_L, db_L.to(db_ptr.dtype.element_ty), mask=summed)
        tl.store(dc_ptr + (n - 1) * row + token_L, dc_L.to(dc_ptr.dtype.element_ty), mask=summed)
        wrote_LC, read_LC = dh_LC.to(SUMMED) * narrow_u_LC, h_LC.to(SUMMED) * narrow_dy_LC
    last = (n_states - 1) * row
    tl.store(db_ptr + last + token_L, over_channels(wrote_LC, TILE, CHANNELS, DOTS))
    tl.store(dc_ptr + last + token_L, over_channels(read_LC, TILE, CHANNELS, DOTS))
    return du_LC, decayed_LC, y_LC


@triton.jit
def _around(
    ddt_LC, dy_LC, x_LC, y_LC, dy_ptr, dt_ptr, bias_ptr_C, skip_ptr_C, gate_ptr, dgate_ptr, place_LC, gate_LC, inside_LC, inside_C
):  # fmt: skip
    """The gradient of raw time steps, the skip's share in that of x, sums for bias and skip; stores the gradient of the gate."""
    skip_C = tl.load(skip_ptr_C, mask=inside_C, other=0.0).to(tl.float32)
    raw_LC = tl.load(dt_ptr + place_LC, mask=inside_LC, other=0.0).to(tl.float32)
    bias_C = tl.load(bias_ptr_C, mask=inside_C, other=0.0).to(tl.float32)
    ddt_LC = tl.where(inside_LC, ddt_LC * tl.sigmoid(raw_LC + bias_C[None, :]), 0.0)
    dgate_LC = tl.load(dy_ptr + place_LC, mask=inside_LC, other=0.0).to(tl.float32) * (y_LC + skip_C[None, :] * x_LC)
    dgate_LC *= _opened(gate_ptr, gate_LC, inside_LC)[1]
    tl.store(dgate_ptr + place_LC, dgate_LC.to(dgate_ptr.dtype.element_ty), mask=inside_LC)
    return ddt_LC, skip_C[None, :] * dy_LC, tl.sum(ddt_LC, axis=0), tl.sum(dy_LC * x_LC, axis=0)


@entry(do_not_specialize=SIZES)
def selective_scan_backward(
    dy_ptr, x_ptr, dt_ptr, rate_ptr, b_ptr, c_ptr, bias_ptr, skip_ptr, gate_ptr, states_ptr, final_ptr,
    dx_ptr, ddt_ptr, drate_ptr, db_ptr, dc_ptr, dgate_ptr, parts_ptr, dstart_ptr, kept_ptr, dstate_ptr,
    gate_stride, n_tokens, width, n_states, n_tiles, n_sequences, sequences_per_member,
    GATED: tl.constexpr, FINAL: tl.constexpr, TILE: tl.constexpr, CHANNELS: tl.constexpr, DOTS: tl.constexpr, ASK: tl.constexpr,
):  # fmt: skip
    """Gradients, tile by tile from the end. Grid: (B * blocks of channels,).

    Rates and the gradient of the final state are [D, N], that of the initial one is; `kept`, `drate` and `dstate` [B, N, D] are a
    program's own: rates, the sum of their gradient so far, and the gradient of the state behind the tile at hand. `db` and `dc` are
    left as one part for each block of channels.
    """
    n_blocks = tl.cdiv(width, CHANNELS)
    sequence, block = (tl.program_id(0) // n_blocks).to(tl.int64), tl.program_id(0) % n_blocks
    channel_C = block * CHANNELS + tl.arange(0, CHANNELS)
    inside_C = channel_C < width
    own_C = sequence // sequences_per_member * width + channel_C
    mine_C = sequence * n_states * width + channel_C
    kept_ptr, drate_ptr, dstate_ptr = kept_ptr + mine_C, drate_ptr + mine_C, dstate_ptr + mine_C
    states_ptr += (sequence * (n_tiles + 1) + n_tiles) * n_states * width
    row = n_tiles * TILE
    b_ptr, c_ptr = b_ptr + sequence * n_states * row, c_ptr + sequence * n_states * row
    db_ptr += (block * n_sequences + sequence) * n_states * row
    dc_ptr += (block * n_sequences + sequence) * n_states * row
    first = sequence * n_tokens * width
    x_ptr, dt_ptr, dy_ptr = x_ptr + first, dt_ptr + first, dy_ptr + first
    dx_ptr, ddt_ptr, dgate_ptr = dx_ptr + first, ddt_ptr + first, dgate_ptr + first
    gate_ptr += sequence * n_tokens * gate_stride
    dbias_C, dskip_C = tl.zeros([CHANNELS], tl.float32), tl.zeros([CHANNELS], tl.float32)
    _begin(rate_ptr, final_ptr, kept_ptr, drate_ptr, dstate_ptr, own_C, sequence, channel_C, inside_C, width, n_states, FINAL)
    for back in range(n_tiles):
        states_ptr -= n_states.to(tl.int64) * width
        tile = n_tiles - 1 - back
        if ASK:
            _ask_for_tile(
                dy_ptr, x_ptr, dt_ptr, gate_ptr, states_ptr + block * CHANNELS, b_ptr, c_ptr, tile - 1, block * CHANNELS,
                gate_stride, width, n_states, row, GATED, TILE,
            )  # fmt: skip
        token_L = tile * TILE + tl.arange(0, TILE)
        place_LC, gate_LC = token_L[:, None] * width + channel_C[None, :], token_L[:, None] * gate_stride + channel_C[None, :]
        inside_LC = (token_L[:, None] < n_tokens) & inside_C[None, :]
        dt_LC = _time_steps(dt_ptr, place_LC, inside_LC, bias_ptr + own_C, inside_C, GATED)
        u_LC = dt_LC * tl.load(x_ptr + place_LC, mask=inside_LC, other=0.0).to(tl.float32)
        dy_LC = tl.load(dy_ptr + place_LC, mask=inside_LC, other=0.0).to(tl.float32)
        if GATED:
            dy_LC *= _opened(gate_ptr, gate_LC, inside_LC)[0]
        if not GATED:  # times one, which the compiler does not know: it then keeps both dtypes of dy and converts once
            dy_LC *= tl.minimum(n_tokens, 1).to(tl.float32)
        du_LC, decayed_LC, y_LC = _walk_states(
            dt_LC, u_LC, dy_LC, states_ptr + channel_C, dstate_ptr, kept_ptr, drate_ptr, b_ptr, c_ptr, db_ptr, dc_ptr, n_states,
            width, row, token_L, inside_C, GATED, TILE, CHANNELS, DOTS,
        )  # fmt: skip
        x_LC = tl.load(x_ptr + place_LC, mask=inside_LC, other=0.0).to(tl.float32)  # again: registers are what is short
        dx_LC, ddt_LC = du_LC * dt_LC, du_LC * x_LC - decayed_LC
        if GATED:
            ddt_LC, skipped_LC, tile_dbias_C, tile_dskip_C = _around(
                ddt_LC, dy_LC, x_LC, y_LC, dy_ptr, dt_ptr, bias_ptr + own_C, skip_ptr + own_C, gate_ptr, dgate_ptr, place_LC,
                gate_LC, inside_LC, inside_C,
            )  # fmt: skip
            dx_LC += skipped_LC
            dbias_C += tile_dbias_C
            dskip_C += tile_dskip_C
        tl.store(dx_ptr + place_LC, dx_LC.to(dx_ptr.dtype.element_ty), mask=inside_LC)
        tl.store(ddt_ptr + place_LC, ddt_LC.to(ddt_ptr.dtype.element_ty), mask=inside_LC)
        # the next tile reads what other threads may have stored
        tl.debug_barrier()
    _end(dstate_ptr, dstart_ptr, sequence, channel_C, inside_C, width, n_states)
    if GATED:
        tl.store(parts_ptr + sequence * 2 * width + channel_C, dbias_C, mask=inside_C)
        tl.store(parts_ptr + (sequence * 2 + 1) * width + channel_C, dskip_C, mask=inside_C)
