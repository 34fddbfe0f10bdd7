"""The forward pass of Mamba's selective scan where channels are few: four lanes own one, a program a segment of time.

As `selective_scan_gluon`, with four times as many warps, for which what is read from the states is summed by tensor cores.

Shape legend: B batch, S segments, T time, D channels, N = 16 states, L tokens of a tile, C channels of a program.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from kernels._entry import entry
from kernels.scans.selective_scan_gluon import fetch, rows_of, shared_rows, sides_of, tile_buffers, time_steps
from kernels.scans.selective_scan_quads import (
    LOG2_E,
    STATES,
    entering,
    left_layout,
    opened,
    row_of_products,
    rows_layout,
    states_layout,
    sums_layout,
)


@gluon.jit
def walk(h_NC, slope_NC, dt, u, b, c, L: gl.constexpr, C: gl.constexpr, WARPS: gl.constexpr):
    """The states after a tile in shared memory, and what is read from them, [L, C]."""
    NC: gl.constexpr = states_layout(WARPS)
    c_LN = c.load(left_layout(WARPS)).to(gl.bfloat16)
    sums_LC = gl.zeros([L, C], gl.float32, sums_layout(WARPS))
    for t in gl.static_range(L):
        dt_1C, u_1C = dt.slice(t, 1, 0).load(NC), u.slice(t, 1, 0).load(NC)
        b_N1 = b.permute([1, 0]).slice(t, 1, 1).load(NC)
        h_NC = gl.fma(h_NC, gl.exp2(slope_NC * dt_1C), u_1C * b_N1)
        sums_LC = row_of_products(sums_LC, c_LN, h_NC.to(gl.bfloat16), t, sums_layout(WARPS))
    return h_NC, sums_LC


@entry(
    do_not_specialize=[
        "n_tokens",
        "n_tiles",
        "n_segments",
        "segment_tiles",
        "sequences_per_member",
        "state_stride",
        "channel_stride",
    ],
    gluon=True,
)
def quads_forward(
    x_ptr, dt_ptr, rate_ptr, b_ptr, c_ptr, bias_ptr, skip_ptr, gate_ptr, start_ptr, y_ptr, states_ptr, final_ptr,
    gate_stride, n_tokens, width, n_states, n_tiles, n_segments, segment_tiles, sequences_per_member, state_stride, channel_stride,
    GATED: gl.constexpr, KEEP: gl.constexpr, C: gl.constexpr, L: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Outputs, the last state and, if they are kept, the states at the borders of tiles. Grid: (B * S * blocks of channels,).

    Kept states are [N, D], rates and the last state [D, N]. The states that enter segments lie B * S after each other, with strides
    of state and channel, which are 0 where there are none.
    """
    NC: gl.constexpr = states_layout(WARPS)
    LC: gl.constexpr = rows_layout(C, WARPS)
    LN: gl.constexpr = rows_layout(STATES, WARPS)
    n_blocks = (width + C - 1) // C
    rest, start = gl.program_id(0) // n_blocks, gl.program_id(0) % n_blocks * C
    segment, sequence = rest % n_segments, (rest // n_segments).to(gl.int64)
    member, first_tile, all_states = sequence // sequences_per_member, segment * segment_tiles, n_states * width
    tiles = gl.minimum(segment_tiles, n_tiles - first_tile)
    x_ptr, dt_ptr = x_ptr + sequence * n_tokens * width, dt_ptr + sequence * n_tokens * width
    y_ptr += (sequence * n_tokens + first_tile * L) * width
    b_ptr, c_ptr = b_ptr + sequence * n_tokens * n_states, c_ptr + sequence * n_tokens * n_states
    gate_ptr += sequence * n_tokens * gate_stride
    states_ptr += (sequence * (n_tiles + 1) + first_tile) * all_states
    buffers = tile_buffers(L, C, STATES)
    n_N1, channel_1C = gl.arange(0, STATES, gl.SliceLayout(1, NC))[:, None], start + gl.arange(0, C, gl.SliceLayout(0, NC))[None, :]
    at_NC, turned_NC, inside_NC = n_N1 * width + channel_1C, channel_1C * n_states + n_N1, (n_N1 < n_states) & (channel_1C < width)
    slope_NC = gl.load(rate_ptr + member * all_states + turned_NC, mask=inside_NC, other=0.0).to(gl.float32) * -LOG2_E
    place = (sequence * n_segments + segment) * all_states
    h_NC = entering(start_ptr, place, n_N1, channel_1C, state_stride, channel_stride, inside_NC)
    if KEEP:
        gl.store(states_ptr + at_NC, h_NC, mask=inside_NC & (segment == 0))
    column_C, token_L = start + gl.arange(0, C, gl.SliceLayout(0, LC)), gl.arange(0, L, gl.SliceLayout(1, LC))
    place_LC = token_L[:, None] * width + column_C[None, :]
    first = first_tile * L
    if GATED:
        bias_C, skip_C = sides_of(bias_ptr, skip_ptr, member, width, column_C)
        z_LC = fetch(gate_ptr, first, gate_stride, n_tokens, width, start, L, C, LC)
    dt_LC, x_LC, b_LN, c_LN = rows_of(
        dt_ptr, x_ptr, b_ptr, c_ptr, first, n_tokens, width, n_states, n_states, start, L, C, STATES, LC, LN
    )
    for tile in range(tiles):
        now, following = tile % 2, first + L
        if GATED:
            dt_LC = time_steps(dt_LC, bias_C, first, n_tokens, L, LC)
            skipped_LC, open_LC = skip_C[None, :] * x_LC, opened(z_LC)[0]
            z_LC = fetch(gate_ptr, following, gate_stride, n_tokens, width, start, L, C, LC)
        dt, u, b, c = shared_rows(buffers, now, dt_LC, x_LC, b_LN, c_LN, True)
        dt_LC, x_LC, b_LN, c_LN = rows_of(
            dt_ptr, x_ptr, b_ptr, c_ptr, following, n_tokens, width, n_states, n_states, start, L, C, STATES, LC, LN
        )
        h_NC, y_LC = walk(h_NC, slope_NC, dt, u, b, c, L, C, WARPS)
        y_LC = gl.convert_layout(y_LC, LC)
        if GATED:
            y_LC = (y_LC + skipped_LC) * open_LC
        inside_LC = (first + token_L < n_tokens)[:, None] & (column_C < width)[None, :]
        gl.store(y_ptr + place_LC, y_LC.to(y_ptr.dtype.element_ty), mask=inside_LC)
        y_ptr += L * width
        states_ptr += all_states
        if KEEP:
            gl.store(states_ptr + at_NC, h_NC, mask=inside_NC)
        first = following
    gl.store(final_ptr + sequence * all_states + turned_NC, h_NC, mask=inside_NC & (segment == n_segments - 1))
