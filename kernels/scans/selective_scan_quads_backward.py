"""The gradient of Mamba's selective scan where channels are few: four lanes own one, a program a segment of time.

A program goes through its segment in tiles of `L` tokens from the end: recomputes a tile's states from its border, kept by the
forward pass, and runs the gradient's recurrence back through them. Everything is in registers but for the states of the tile and
their gradients in bf16, which shared memory turns for the sums over channels.

Shape legend: B batch, S segments, T time, D channels, P blocks of them, N = 16 states, L tokens of a tile, C channels of a program.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from kernels._entry import entry
from kernels.scans.selective_scan_gluon import fetch, sides_of, time_steps
from kernels.scans.selective_scan_quads import (
    LOG2_E,
    STATES,
    entering,
    left_layout,
    opened,
    over_channels,
    quads_layout,
    row_of_products,
    rows_layout,
    stacked,
    states_layout,
    store_sums,
    sums_layout,
    tokens_of,
)


@gluon.jit
def replay(h_NC, slope_NC, dt, u, b, c_LN, L: gl.constexpr, C: gl.constexpr, WARPS: gl.constexpr, GATED: gl.constexpr):
    """Factors of a tile's tokens, the state before each of them and after the last, and, for the gate, what is read from them."""
    NC: gl.constexpr = states_layout(WARPS)
    factors, states, steps, inputs = (), (h_NC,), (), ()
    y_LC = gl.zeros([L, C], gl.float32, sums_layout(WARPS))
    for t in gl.static_range(L):
        if t % 4 == 0:
            steps, inputs = tokens_of(dt, t, C, WARPS), tokens_of(u, t, C, WARPS)
        factor_NC = gl.exp2(slope_NC * steps[t % 4])
        h_NC = gl.fma(h_NC, factor_NC, inputs[t % 4] * b.permute([1, 0]).slice(t, 1, 1).load(NC))
        factors, states = factors + (factor_NC,), states + (h_NC,)
        if GATED:
            y_LC = row_of_products(y_LC, c_LN, h_NC.to(gl.bfloat16), t, sums_layout(WARPS))
    return factors, states, y_LC


@gluon.jit
def reverse(e_NC, drate_NC, rate_NC, factors, states, dt, dy, c, b_LN, L: gl.constexpr, C: gl.constexpr, WARPS: gl.constexpr):
    """Gradients of the states, from the last token to the first, and what follows from them.

    e_t = a_t dh_t is what reaches h_{t-1}, and e_t h_{t-1} is the gradient of log a_t, which is minus rate dt_t.
    """
    NC: gl.constexpr = states_layout(WARPS)
    LC: gl.constexpr = sums_layout(WARPS)
    ones_LN = gl.full([L, STATES], 1.0, gl.bfloat16, left_layout(WARPS))
    du_LC, decayed_LC = gl.zeros([L, C], gl.float32, LC), gl.zeros([L, C], gl.float32, LC)
    dhs, steps, gradients = (), (), ()
    for t in gl.static_range(L - 1, -1, -1):
        if t % 4 == 3:
            steps, gradients = tokens_of(dt, t - 3, C, WARPS), tokens_of(dy, t - 3, C, WARPS)
        dh_NC = gl.fma(gradients[t % 4], c.permute([1, 0]).slice(t, 1, 1).load(NC), e_NC)
        e_NC = factors[t] * dh_NC
        dlog_NC = e_NC * states[t]
        drate_NC -= dlog_NC * steps[t % 4]
        dhs = (dh_NC.to(gl.bfloat16),) + dhs
        du_LC = row_of_products(du_LC, b_LN, dhs[0], t, LC)
        decayed_LC = row_of_products(decayed_LC, ones_LN, (dlog_NC * rate_NC).to(gl.bfloat16), t, LC)
    return e_NC, drate_NC, du_LC, decayed_LC, dhs


@gluon.jit
def _buffers(L: gl.constexpr, C: gl.constexpr):
    """Shared memory of a tile: dt, dt x and dy; dt x and dy as weights; B and C; states and their gradients."""
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    tokens_beside: gl.constexpr = gl.SwizzledSharedLayout(4, 2, 4, [0, 1])
    cube: gl.constexpr = gl.SwizzledSharedLayout(8, 4, 2, [2, 1, 0])
    tokens = (
        gl.allocate_shared_memory(gl.float32, [L, C], tokens_beside),
        gl.allocate_shared_memory(gl.float32, [L, C], tokens_beside),
        gl.allocate_shared_memory(gl.float32, [L, C], tokens_beside),
    )
    weights = (gl.allocate_shared_memory(gl.bfloat16, [L, C], flat), gl.allocate_shared_memory(gl.bfloat16, [L, C], flat))
    b = gl.allocate_shared_memory(gl.float32, [L, STATES], quads_layout(L))
    c = gl.allocate_shared_memory(gl.float32, [L, STATES], quads_layout(L))
    h_buffer = gl.allocate_shared_memory(gl.bfloat16, [L, C, STATES], cube)
    dh_buffer = gl.allocate_shared_memory(gl.bfloat16, [L, C, STATES], cube)
    return tokens, weights, (b, c), (h_buffer, dh_buffer)


@gluon.jit
def _rows(
    pointers, first, n_tokens, width, n_states, start,
    L: gl.constexpr, C: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """A tile's rows of dt, x, dy, b and c."""
    dt_ptr, x_ptr, dy_ptr, b_ptr, c_ptr = pointers
    LC: gl.constexpr = rows_layout(C, WARPS)
    LN: gl.constexpr = rows_layout(STATES, WARPS)
    raw_LC = fetch(dt_ptr, first, width, n_tokens, width, start, L, C, LC)
    x_LC = fetch(x_ptr, first, width, n_tokens, width, start, L, C, LC)
    dy_LC = fetch(dy_ptr, first, width, n_tokens, width, start, L, C, LC)
    b_LN = fetch(b_ptr, first, n_states, n_tokens, n_states, 0, L, STATES, LN)
    c_LN = fetch(c_ptr, first, n_states, n_tokens, n_states, 0, L, STATES, LN)
    return raw_LC, x_LC, dy_LC, b_LN, c_LN


@gluon.jit
def _share(tokens, weights, parts, dt_LC, x_LC, read_LC, b_LN, c_LN):
    """Puts a tile into shared memory."""
    tokens[0].store(dt_LC)
    tokens[1].store(dt_LC * x_LC)
    tokens[2].store(read_LC)
    weights[0].store((dt_LC * x_LC).to(gl.bfloat16))
    weights[1].store(read_LC.to(gl.bfloat16))
    parts[0].store(b_LN)
    parts[1].store(c_LN)


@gluon.jit
def _through_states(
    e_NC, drate_NC, rate_NC, border_NC, tokens, of_states, cubes,
    L: gl.constexpr, C: gl.constexpr, WARPS: gl.constexpr, GATED: gl.constexpr,
):  # fmt: skip
    """A tile's states from its border and their gradients, into shared memory, and what follows from them."""
    dt, u, dy = tokens
    b, c = of_states
    b_left, c_left = b.load(left_layout(WARPS)).to(gl.bfloat16), c.load(left_layout(WARPS)).to(gl.bfloat16)
    factors, states, y_LC = replay(border_NC, rate_NC * -LOG2_E, dt, u, b, c_left, L, C, WARPS, GATED)
    cubes[0].store(stacked(states[1:], L).permute([0, 2, 1]).to(gl.bfloat16))
    e_NC, drate_NC, du_LC, decayed_LC, dhs = reverse(e_NC, drate_NC, rate_NC, factors, states, dt, dy, c, b_left, L, C, WARPS)
    cubes[1].store(stacked(dhs, L).permute([0, 2, 1]))
    return e_NC, drate_NC, du_LC, decayed_LC, y_LC


@gluon.jit
def _through_gate(
    dgate_ptr, place_LC, inside_LC, ddt_LC, dx_LC, dbias_C, dskip_C, raw_LC, x_LC, dy_LC, read_LC, slope_LC, y_LC, bias_C, skip_C,
    LC: gl.constexpr,
):  # fmt: skip
    """Gradients of raw time steps and of x, and what is added to those of bias and skip; writes that of the gate."""
    ddt_LC = gl.where(inside_LC, ddt_LC / (1.0 + gl.exp2((raw_LC + bias_C[None, :]) * -LOG2_E)), 0.0)
    dgate_LC = dy_LC * (gl.convert_layout(y_LC, LC) + skip_C[None, :] * x_LC) * slope_LC
    gl.store(dgate_ptr + place_LC, dgate_LC.to(dgate_ptr.dtype.element_ty), mask=inside_LC)
    dx_LC += skip_C[None, :] * read_LC
    dbias_C += gl.sum(ddt_LC, 0)
    return ddt_LC, dx_LC, dbias_C, dskip_C + gl.sum(read_LC * x_LC, 0)


@entry(
    do_not_specialize=[
        "n_tokens", "n_tiles", "n_segments", "segment_tiles", "n_sequences", "sequences_per_member", "state_stride",
        "channel_stride",
    ],
    gluon=True,
)  # fmt: skip
def quads_backward(  # noqa: PLR0915 - one loop, whose values live in registers
    dy_ptr, x_ptr, dt_ptr, rate_ptr, b_ptr, c_ptr, bias_ptr, skip_ptr, gate_ptr, states_ptr, after_ptr,
    dx_ptr, ddt_ptr, drate_ptr, db_ptr, dc_ptr, dgate_ptr, sides_ptr, dstart_ptr,
    gate_stride, n_tokens, width, n_states, n_tiles, n_segments, segment_tiles, n_sequences, sequences_per_member,
    state_stride, channel_stride, GATED: gl.constexpr, C: gl.constexpr, L: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Gradients, tile by tile from the end of a segment. Grid: (B * S * P,).

    Rates and the gradient of the first state are [D, N], states at borders [N, D]; gradients that enter segments lie B * S after
    each other, with strides of state and channel, which are 0 where there are none. `drate` [B, S, N, D] is a part for each
    segment, `sides` [B, S, 2, D] are parts of those of bias and skip, `db` and `dc` [P, B, T, N] parts for each block of channels.
    """
    NC: gl.constexpr = states_layout(WARPS)
    LC: gl.constexpr = rows_layout(C, WARPS)
    n_blocks = (width + C - 1) // C
    block, rest = gl.program_id(0) % n_blocks, gl.program_id(0) // n_blocks
    segment, sequence = rest % n_segments, (rest // n_segments).to(gl.int64)
    start, member, first_tile = block * C, sequence // sequences_per_member, segment * segment_tiles
    tiles, all_states = gl.minimum(segment_tiles, n_tiles - first_tile), n_states * width
    rows = sequence * n_tokens * width
    dx_ptr, ddt_ptr, dgate_ptr = dx_ptr + rows, ddt_ptr + rows, dgate_ptr + rows
    gate_ptr += sequence * n_tokens * gate_stride
    parts = sequence * n_tokens * n_states
    pointers = (dt_ptr + rows, x_ptr + rows, dy_ptr + rows, b_ptr + parts, c_ptr + parts)
    db_ptr += (block * n_sequences + sequence) * n_tokens * n_states
    dc_ptr += (block * n_sequences + sequence) * n_tokens * n_states
    states_ptr += (sequence * (n_tiles + 1) + first_tile + tiles - 1) * all_states
    tokens, weights, of_states, cubes = _buffers(L, C)
    n_N1, channel_1C = gl.arange(0, STATES, gl.SliceLayout(1, NC))[:, None], start + gl.arange(0, C, gl.SliceLayout(0, NC))[None, :]
    at_NC, turned_NC, inside_NC = n_N1 * width + channel_1C, channel_1C * n_states + n_N1, (n_N1 < n_states) & (channel_1C < width)
    rate_NC = gl.load(rate_ptr + member * all_states + turned_NC, mask=inside_NC, other=0.0).to(gl.float32)
    place = (sequence * n_segments + segment) * all_states
    e_NC = entering(after_ptr, place, n_N1, channel_1C, state_stride, channel_stride, inside_NC)
    drate_NC = gl.zeros([STATES, C], gl.float32, NC)
    border_NC = gl.load(states_ptr + at_NC, mask=inside_NC, other=0.0)
    column_C, token_L = start + gl.arange(0, C, gl.SliceLayout(0, LC)), gl.arange(0, L, gl.SliceLayout(1, LC))
    first = (first_tile + tiles - 1) * L
    if GATED:
        bias_C, skip_C = sides_of(bias_ptr, skip_ptr, member, width, column_C)
        dbias_C, dskip_C = gl.zeros([C], gl.float32, gl.SliceLayout(0, LC)), gl.zeros([C], gl.float32, gl.SliceLayout(0, LC))
        z_LC = fetch(gate_ptr, first, gate_stride, n_tokens, width, start, L, C, LC)
    raw_LC, x_LC, dy_LC, b_LN, c_LN = _rows(pointers, first, n_tokens, width, n_states, start, L, C, WARPS)
    for back in range(tiles):
        before = gl.maximum(first - L, 0)  # in the last turn loads that nobody uses
        own_raw_LC, own_x_LC, own_dy_LC, dt_LC, read_LC, own_NC = raw_LC, x_LC, dy_LC, raw_LC, dy_LC, border_NC
        if GATED:
            dt_LC = time_steps(raw_LC, bias_C, first, n_tokens, L, LC)
            open_LC, slope_LC = opened(z_LC)
            read_LC = own_dy_LC * open_LC
            z_LC = fetch(gate_ptr, before, gate_stride, n_tokens, width, start, L, C, LC)
        _share(tokens, weights, of_states, dt_LC, own_x_LC, read_LC, b_LN, c_LN)
        raw_LC, x_LC, dy_LC, b_LN, c_LN = _rows(pointers, before, n_tokens, width, n_states, start, L, C, WARPS)
        states_ptr -= gl.where(back < tiles - 1, all_states, 0)
        border_NC = gl.load(states_ptr + at_NC, mask=inside_NC, other=0.0)
        e_NC, drate_NC, du_LC, decayed_LC, y_LC = _through_states(
            e_NC, drate_NC, rate_NC, own_NC, tokens, of_states, cubes, L, C, WARPS, GATED
        )  # fmt: skip
        db, dc = over_channels(cubes[1], weights[0], L, C, WARPS), over_channels(cubes[0], weights[1], L, C, WARPS)
        store_sums(db_ptr, db, first, n_tokens, n_states, L, WARPS)
        store_sums(dc_ptr, dc, first, n_tokens, n_states, L, WARPS)
        du_LC, decayed_LC = gl.convert_layout(du_LC, LC), gl.convert_layout(decayed_LC, LC)
        inside_LC = (first + token_L < n_tokens)[:, None] & (column_C < width)[None, :]
        place_LC = (first + token_L).to(gl.int64)[:, None] * width + column_C[None, :]
        dx_LC, ddt_LC = du_LC * dt_LC, du_LC * own_x_LC - decayed_LC
        if GATED:
            ddt_LC, dx_LC, dbias_C, dskip_C = _through_gate(
                dgate_ptr, place_LC, inside_LC, ddt_LC, dx_LC, dbias_C, dskip_C, own_raw_LC, own_x_LC, own_dy_LC, read_LC,
                slope_LC, y_LC, bias_C, skip_C, LC,
            )  # fmt: skip
        gl.store(dx_ptr + place_LC, dx_LC.to(dx_ptr.dtype.element_ty), mask=inside_LC)
        gl.store(ddt_ptr + place_LC, ddt_LC.to(ddt_ptr.dtype.element_ty), mask=inside_LC)
        first = before
    gl.store(drate_ptr + place + at_NC, drate_NC, mask=inside_NC)
    gl.store(dstart_ptr + sequence * all_states + turned_NC, e_NC, mask=inside_NC & (segment == 0))
    if GATED:
        sides_ptr += (sequence * n_segments + segment) * 2 * width
        gl.store(sides_ptr + column_C, dbias_C, mask=column_C < width)
        gl.store(sides_ptr + (width + column_C), dskip_C, mask=column_C < width)
