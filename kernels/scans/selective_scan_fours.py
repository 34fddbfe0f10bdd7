"""The gradient of Mamba's selective scan where channels fill a device: a thread owns a channel with all its states.

A program is one warp with 32 channels of one sequence, and goes through it in tiles of `L` tokens from the end. First it walks a tile
forward from its border and leaves the states in shared memory in bf16; then it walks back with the gradients of all states in
registers, makes the factors again, and leaves the gradients where the states were. From there tensor cores sum over channels.

Shape legend: B batch, T time, D channels, P blocks of them, N = 16 states, L tokens of a tile, C = 32 channels of a program.
"""

# ruff: noqa: RUF005 - Triton knows sums of tuples, but no unpacking into them
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from kernels._entry import entry

from kernels.scans.selective_scan_columns import (
    C, LOG2_E, STATES, ask, columns_layout, over_channels, rows_layout, stacked, sums_layout, tile_layout, tile_of, unstacked,
)


@gluon.jit
def borders_of(states_ptrs, n_N1, inside_NC, L: gl.constexpr, WIDTH: gl.constexpr):
    """The states before each four tokens of a tile."""
    borders = ()
    for part in gl.static_range(L // 4):
        borders = borders + (tile_of(states_ptrs, n_N1 + part * STATES * WIDTH, inside_NC),)
    return borders


@gluon.jit
def widened_borders(borders, L: gl.constexpr):
    wide = ()
    for part in gl.static_range(L // 4):
        wide = wide + (borders[part].to(gl.float32),)
    return wide


@entry(do_not_specialize=["n_tokens", "n_tiles", "n_sequences", "sequences_per_member"], gluon=True)
def fours_backward(  # noqa: PLR0915 - one loop, whose values live in registers
    dy_ptr, x_ptr, dt_ptr, rate_ptr, b_ptr, c_ptr, states_ptr, final_ptr,
    dx_ptr, ddt_ptr, drate_ptr, db_ptr, dc_ptr, dstart_ptr,
    n_tokens, n_tiles, n_sequences, sequences_per_member,
    WIDTH: gl.constexpr, EVEN: gl.constexpr, FINAL: gl.constexpr, L: gl.constexpr, KEPT: gl.constexpr, STORED: gl.constexpr, AHEAD: gl.constexpr, ASK: gl.constexpr,
    OMIT: gl.constexpr,
):  # fmt: skip
    """Gradients, tile by tile from the end. Grid: (B * P,).

    Rates and the gradients of first and final state are [D, N], states at borders [N, D], `drate` [B, N, D]; `db` and `dc` [P, B, T, N] are
    parts for each block of channels. Of a tile's tokens the factors of the last KEPT stay in registers, those of the first STORED
    in shared memory.
    """
    NC: gl.constexpr = columns_layout()
    LC: gl.constexpr = tile_layout(L)
    LN: gl.constexpr = rows_layout(4)
    S: gl.constexpr = sums_layout()
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    cube: gl.constexpr = gl.SwizzledSharedLayout(8, 4, 2, [1, 0])
    quads: gl.constexpr = gl.SharedLinearLayout(
        [[1, 0], [2, 0], [0, 1], [0, 2], [0, 4], [0, 8], [0, 16], [4, 0], [8, 0]]
    )
    n_blocks: gl.constexpr = (WIDTH + C - 1) // C
    block, sequence = gl.program_id(0) % n_blocks, (gl.program_id(0) // n_blocks).to(gl.int64)
    start, member = block * C, sequence // sequences_per_member
    all_states: gl.constexpr = STATES * WIDTH
    b = gl.allocate_shared_memory(gl.float32, [L, STATES], flat)
    c = gl.allocate_shared_memory(gl.float32, [L, STATES], flat)
    u_weight = gl.allocate_shared_memory(gl.bfloat16, [L, C], flat)
    dy_weight = gl.allocate_shared_memory(gl.bfloat16, [L, C], flat)
    slots, grads = (), ()
    for t in gl.static_range(L):
        slots = slots + (gl.allocate_shared_memory(gl.bfloat16, [C, STATES], cube),)
        grads = grads + (gl.allocate_shared_memory(gl.bfloat16, [C, STATES], cube),)
    n_N1, lane_1C = gl.arange(0, STATES, gl.SliceLayout(1, NC))[:, None], gl.arange(0, C, gl.SliceLayout(0, NC))[None, :]
    channel_1C = start + lane_1C
    whole: gl.constexpr = WIDTH % 32 == 0
    inside_1C = channel_1C < (start + 64 if whole else WIDTH)
    at_NC, turned_NC, inside_NC = n_N1 * WIDTH, channel_1C * STATES + n_N1, inside_1C & (n_N1 >= 0)
    slope_NC = gl.load(rate_ptr + member * all_states + turned_NC, mask=inside_NC, other=0.0).to(gl.float32) * -LOG2_E
    e_NC, drate_NC = gl.zeros([STATES, C], gl.float32, NC), gl.zeros([STATES, C], gl.float32, NC)
    if FINAL:
        e_NC = gl.load(final_ptr + sequence * all_states + turned_NC, mask=inside_NC, other=0.0).to(gl.float32)
    token_L1, lane_1 = gl.arange(0, L, gl.SliceLayout(1, LC))[:, None], gl.arange(0, C, gl.SliceLayout(0, LC))[None, :]
    row_L1, n_1N = gl.arange(0, L, gl.SliceLayout(1, LN))[:, None], gl.arange(0, STATES, gl.SliceLayout(0, LN))[None, :]
    at_LN = row_L1 * STATES + n_1N
    out_N1 = gl.arange(0, STATES, gl.SliceLayout(1, S))[:, None]
    out_1L = gl.arange(0, L, gl.SliceLayout(0, S))[None, :]
    out_NL = out_1L * STATES + out_N1
    first, one = (n_tiles - 1) * L, gl.minimum(n_tokens, 1).to(gl.float32)
    place = (sequence * n_tokens + first) * WIDTH + start
    x_ptrs, dt_ptrs, dy_ptrs = x_ptr + (place + lane_1), dt_ptr + (place + lane_1), dy_ptr + (place + lane_1)
    dx_ptrs, ddt_ptrs = dx_ptr + (place + lane_1), ddt_ptr + (place + lane_1)
    states_ptrs = states_ptr + ((sequence * (n_tiles * (L // 4) + 1) + (n_tiles - 1) * (L // 4)) * all_states + channel_1C * STATES)
    b_ptrs, c_ptrs = (b_ptr + ((sequence * n_tokens + first) * STATES + at_LN), c_ptr + ((sequence * n_tokens + first) * STATES + at_LN))
    db_ptrs = db_ptr + (((block * n_sequences + sequence) * n_tokens + first) * STATES + out_NL)
    dc_ptrs = dc_ptr + (((block * n_sequences + sequence) * n_tokens + first) * STATES + out_NL)
    left = 64 if EVEN else n_tokens - first
    inside_LC = (token_L1 < left) & (start + lane_1 < (start + 64 if whole else WIDTH))
    inside_LN = (row_L1 < left) & (n_1N >= 0)
    if AHEAD:
        next_dt_LC, next_x_LC = tile_of(dt_ptrs, token_L1 * WIDTH, inside_LC), tile_of(x_ptrs, token_L1 * WIDTH, inside_LC)
        next_dy_LC = tile_of(dy_ptrs, token_L1 * WIDTH, inside_LC)
        next_borders = borders_of(states_ptrs, n_N1, inside_NC, L, WIDTH)
        next_b_LN, next_c_LN = tile_of(b_ptrs, 0, inside_LN), tile_of(c_ptrs, 0, inside_LN)
    for back in range(n_tiles):
        left = 64 if EVEN else n_tokens - first
        inside_LC = (token_L1 < left) & (start + lane_1 < (start + 64 if whole else WIDTH))
        inside_LN = (row_L1 < left) & (n_1N >= 0)
        if AHEAD:
            dt_LC, x_LC, dy_LC = next_dt_LC, next_x_LC.to(gl.float32), next_dy_LC.to(gl.float32)
            borders = widened_borders(next_borders, L)
            b.store(next_b_LN.to(gl.float32))
            c.store(next_c_LN.to(gl.float32))
            step = gl.where(back < n_tiles - 1, L, 0)  # in the last turn loads that nobody uses
            x_ptrs, dt_ptrs, dy_ptrs = x_ptrs - step * WIDTH, dt_ptrs - step * WIDTH, dy_ptrs - step * WIDTH
            b_ptrs, c_ptrs, states_ptrs = b_ptrs - step * STATES, c_ptrs - step * STATES, states_ptrs - step // 4 * all_states
            next_LC = (token_L1 < left + step) & (start + lane_1 < (start + 64 if whole else WIDTH))
            next_LN = (row_L1 < left + step) & (n_1N >= 0)
            next_dt_LC, next_x_LC = tile_of(dt_ptrs, token_L1 * WIDTH, next_LC), tile_of(x_ptrs, token_L1 * WIDTH, next_LC)
            next_dy_LC = tile_of(dy_ptrs, token_L1 * WIDTH, next_LC)
            next_borders = borders_of(states_ptrs, n_N1, inside_NC, L, WIDTH)
            next_b_LN, next_c_LN = tile_of(b_ptrs, 0, next_LN), tile_of(c_ptrs, 0, next_LN)
        else:
            dt_LC = tile_of(dt_ptrs, token_L1 * WIDTH, inside_LC)
            x_LC = tile_of(x_ptrs, token_L1 * WIDTH, inside_LC).to(gl.float32)
            dy_LC = tile_of(dy_ptrs, token_L1 * WIDTH, inside_LC).to(gl.float32)
            borders = widened_borders(borders_of(states_ptrs, n_N1, inside_NC, L, WIDTH), L)
            b.store(tile_of(b_ptrs, 0, inside_LN).to(gl.float32))
            c.store(tile_of(c_ptrs, 0, inside_LN).to(gl.float32))
        if ASK:
            lane = gl.arange(0, 32, gl.BlockedLayout([1], [32], [1], [0]))
            ahead = gl.where(back < n_tiles - 1, L, 0)
            row = (sequence * n_tokens + first - ahead + lane % L) * WIDTH + start
            ask(dt_ptr + row)
            ask(x_ptr + row)
            ask(dy_ptr + row)
            before = sequence * (n_tiles * (L // 4) + 1) + (n_tiles - 1 - back) * (L // 4) - ahead // 4
            for part in gl.static_range(L // 4):
                ask(states_ptr + ((before + part) * all_states + (start + lane) * STATES))
            ask(b_ptr + ((sequence * n_tokens + first - ahead) * STATES + lane % (L // 2) * 32))
            ask(c_ptr + ((sequence * n_tokens + first - ahead) * STATES + lane % (L // 2) * 32))
        u_LC = dt_LC * x_LC
        u_weight.store(u_LC.to(gl.bfloat16))
        dy_weight.store(dy_LC.to(gl.bfloat16))
        dt, u, dy = unstacked(dt_LC, L), unstacked(u_LC, L), unstacked(dy_LC, L)
        du, decayed = (), ()
        for part in gl.static_range(L // 4 - 1, -1, -1):
            factors, states = (), (borders[part],)
            for s in gl.static_range(4):
                factors = factors + (gl.exp2(slope_NC * dt[part * 4 + s][None, :]),)
                written_NC = u[part * 4 + s][None, :] * b.permute([1, 0]).slice(part * 4 + s, 1, 1).load(NC)
                states = states + (gl.fma(states[s], factors[s], written_NC),)
                slots[part * 4 + s].store(states[s + 1].to(gl.bfloat16).permute([1, 0]))
            for s in gl.static_range(3, -1, -1):
                dh_NC = e_NC + dy[part * 4 + s][None, :] * c.permute([1, 0]).slice(part * 4 + s, 1, 1).load(NC)
                e_NC = factors[s] * dh_NC
                dlog_NC = e_NC * states[s]
                drate_NC += dlog_NC * dt[part * 4 + s][None, :]
                du = (gl.sum(dh_NC * b.permute([1, 0]).slice(part * 4 + s, 1, 1).load(NC), 0),) + du
                decayed = (gl.sum(dlog_NC * slope_NC, 0),) + decayed
                grads[part * 4 + s].store(dh_NC.to(gl.bfloat16).permute([1, 0]))
        dc_NL, db_NL = gl.zeros([STATES, L], gl.float32, S), gl.zeros([STATES, L], gl.float32, S)
        dy_CL = dy_weight.permute([1, 0]).load(gl.DotOperandLayout(1, S, 2))
        u_CL = u_weight.permute([1, 0]).load(gl.DotOperandLayout(1, S, 2))
        for t in gl.static_range(1 if OMIT == 2 else L):
            dc_NL, db_NL = over_channels(dc_NL, slots[t], dy_CL, t), over_channels(db_NL, grads[t], u_CL, t)
        inside_NL = (out_1L < left) & (out_N1 >= 0)
        gl.store(db_ptrs, db_NL.to(db_ptr.dtype.element_ty), mask=inside_NL)
        gl.store(dc_ptrs, dc_NL.to(dc_ptr.dtype.element_ty), mask=inside_NL)
        du_LC, decayed_LC = gl.convert_layout(stacked(du, L), LC, assert_trivial=True), gl.convert_layout(stacked(decayed, L), LC, assert_trivial=True)
        gl.store(dx_ptrs + token_L1 * WIDTH, (du_LC * dt_LC).to(dx_ptr.dtype.element_ty), mask=inside_LC)
        ddt_LC = du_LC * x_LC + decayed_LC * (1.0 / LOG2_E)
        gl.store(ddt_ptrs + token_L1 * WIDTH, ddt_LC.to(ddt_ptr.dtype.element_ty), mask=inside_LC)
        if not AHEAD:
            states_ptrs -= gl.where(back < n_tiles - 1, L // 4 * all_states, 0)
            x_ptrs, dt_ptrs, dy_ptrs = x_ptrs - L * WIDTH, dt_ptrs - L * WIDTH, dy_ptrs - L * WIDTH
            b_ptrs, c_ptrs = b_ptrs - L * STATES, c_ptrs - L * STATES
        dx_ptrs, ddt_ptrs = dx_ptrs - L * WIDTH, ddt_ptrs - L * WIDTH
        db_ptrs, dc_ptrs = db_ptrs - L * STATES, dc_ptrs - L * STATES
        first -= L
    gl.store(drate_ptr + (sequence * all_states + at_NC + channel_1C), -drate_NC, mask=inside_NC)
    gl.store(dstart_ptr + (sequence * all_states + turned_NC), e_NC, mask=inside_NC)
