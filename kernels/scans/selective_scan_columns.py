"""The gradient of Mamba's selective scan where channels fill a device: a thread owns a channel with all its states.

A program is one warp with 32 channels of one sequence, and goes through it in tiles of `L` tokens from the end, of which it takes
four at a time: the forward pass has kept the state before them, so states and factors of four tokens stay in registers, no
exponential is taken twice, and its recurrences hide each other's latency. States and their gradients go to shared memory in
bf16, from where they come turned, as operands of the products that sum over channels: those of one token, or, if there are 8,
of two. Nothing is masked: it takes whole tiles and whole warps. Channels with more states take a launch for each group of them.

Shape legend: B batch, T time, D channels, P blocks of them, N = 8 or 16 states, R = 16 rows of a product, L tokens of a tile,
C = 32 channels of a program.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from kernels._entry import entry
from kernels.scans.selective_scan_columns_tile import (
    LOG2_E,
    ROWS,
    C,
    ask,
    ask_tile,
    borders_of,
    buffers,
    columns_layout,
    over_channels,
    put,
    row_of,
    rows_layout,
    slope_of_softplus,
    stacked,
    store_or_add,
    store_sums,
    sums_layout,
    tile_layout,
    tile_of,
    unstacked,
)
from kernels.scans.selective_scan_gluon import ROW_UNIT


@gluon.jit
def through_states(
    e_NC, drate_NC, slope_NC, borders, dt, u, dy, b, c, h_slots, dh_slots, N: gl.constexpr, EACH: gl.constexpr, L: gl.constexpr
):
    """States of a tile from those that were kept, and gradients back through them; both into slots, what follows as rows [C]."""
    held: gl.constexpr = ROWS // N
    du, decayed = (), ()
    for part in gl.static_range(L // EACH - 1, -1, -1):
        factors, states = (), (borders[part],)
        for s in gl.static_range(EACH):
            factors = factors + (gl.exp2(slope_NC * dt[part * EACH + s][None, :]),)
            states = states + (gl.fma(states[s], factors[s], u[part * EACH + s][None, :] * row_of(b, part * EACH + s, N)),)
            if s % held == held - 1:
                put(h_slots[(part * EACH + s) // held], states[s + 2 - held], states[s + 1], N)
        # e_t = a_t dh_t is what reaches h_{t-1}, and e_t h_{t-1} the gradient of log a_t
        later_NC = e_NC
        for s in gl.static_range(EACH - 1, -1, -1):
            dh_NC = e_NC + dy[part * EACH + s][None, :] * row_of(c, part * EACH + s, N)
            e_NC = factors[s] * dh_NC
            dlog_NC = e_NC * states[s]
            drate_NC += dlog_NC * dt[part * EACH + s][None, :]
            du = (gl.sum(dh_NC * row_of(b, part * EACH + s, N), 0),) + du
            decayed = (gl.sum(dlog_NC * slope_NC, 0),) + decayed
            if s % held == 0:
                put(dh_slots[(part * EACH + s) // held], dh_NC, later_NC, N)
            later_NC = dh_NC
    return e_NC, drate_NC, du, decayed


@gluon.jit
def sums_over_channels(h_slots, dh_slots, u_weight, dy_weight, N: gl.constexpr, L: gl.constexpr):
    """Shares of the channels in the gradients of b and c, [R, L]; of a column the rows of its token."""
    S: gl.constexpr = sums_layout()
    held: gl.constexpr = ROWS // N
    db_RL, dc_RL = gl.zeros([ROWS, L], gl.float32, S), gl.zeros([ROWS, L], gl.float32, S)
    dy_CL = dy_weight.permute([1, 0]).load(gl.DotOperandLayout(1, S, 2))
    u_CL = u_weight.permute([1, 0]).load(gl.DotOperandLayout(1, S, 2))
    for at in gl.static_range(L // held):
        dc_RL = over_channels(dc_RL, h_slots[at], dy_CL, at, held)
        db_RL = over_channels(db_RL, dh_slots[at], u_CL, at, held)
    return db_RL, dc_RL


@entry(do_not_specialize=["row_stride", "n_tokens", "n_tiles", "n_sequences", "sequences_per_member"], gluon=True)
def columns_backward(  # noqa: PLR0915 - one loop, whose values live in registers
    dy_ptr, x_ptr, dt_ptr, skip_ptr, rate_ptr, b_ptr, c_ptr, states_ptr, final_ptr,
    dx_ptr, ddt_ptr, drate_ptr, db_ptr, dc_ptr, dstart_ptr, dbias_ptr, dskip_ptr,
    row_stride, n_tokens, n_tiles, n_sequences, sequences_per_member,
    WIDTH: gl.constexpr, STEPPED: gl.constexpr, SKIP: gl.constexpr, FINAL: gl.constexpr, ADD: gl.constexpr,
    ALL: gl.constexpr, N: gl.constexpr, EACH: gl.constexpr, L: gl.constexpr,
):  # fmt: skip
    """Gradients, tile by tile from the end, by N of ALL states of a channel. Grid: (B * P,).

    States [B, T / EACH + 1, D, N] are those before each EACH tokens, and the last, behind each sequence's those of other groups.
    Rates and the gradients of the first and of the final state are [D, ALL], `drate` [B, ALL, D]; STEPPED: ddt is that of what dt
    is the softplus of, and `dbias` its sums [B, D]; SKIP: outputs contain skip times x, and `dskip` [B, D] has its gradients.
    ADD: dx, ddt and dbias are added to what an earlier launch stored.
    `db` and `dc` [P, B, T, N] are parts for each block of channels. The number of
    channels is a constant, and so are the distances between tokens: added up at run time they would take the registers.
    """
    NC: gl.constexpr = columns_layout(N)
    LC: gl.constexpr = tile_layout(L)
    LN: gl.constexpr = rows_layout(N)
    S: gl.constexpr = sums_layout()
    n_blocks: gl.constexpr = WIDTH // C
    all_states: gl.constexpr = N * WIDTH
    block, sequence = gl.program_id(0) % n_blocks, (gl.program_id(0) // n_blocks).to(gl.int64)
    start, member = block * C, sequence // sequences_per_member
    b, c, u_weight, dy_weight, h_slots, dh_slots = buffers(N, L)
    n_N1, channel_1C = gl.arange(0, N, gl.SliceLayout(1, NC))[:, None], start + gl.arange(0, C, gl.SliceLayout(0, NC))[None, :]
    own_NC = channel_1C * ALL + n_N1
    slope_NC = gl.load(rate_ptr + (member * ALL * WIDTH + own_NC)).to(gl.float32) * -LOG2_E
    e_NC, drate_NC = gl.zeros([N, C], gl.float32, NC), gl.zeros([N, C], gl.float32, NC)
    if FINAL:
        e_NC = gl.load(final_ptr + (sequence * ALL * WIDTH + own_NC)).to(gl.float32)
    token_L1, lane_1C = gl.arange(0, L, gl.SliceLayout(1, LC))[:, None], gl.arange(0, C, gl.SliceLayout(0, LC))[None, :]
    at_LC, lane = token_L1 * WIDTH, gl.arange(0, 32, gl.BlockedLayout([1], [32], [1], [0]))
    row_L1, n_1N = gl.arange(0, L, gl.SliceLayout(1, LN))[:, None], gl.arange(0, N, gl.SliceLayout(0, LN))[None, :]
    sum_R1, sum_1L = gl.arange(0, ROWS, gl.SliceLayout(1, S))[:, None], gl.arange(0, L, gl.SliceLayout(0, S))[None, :]
    dbias_C, dskip_C = gl.zeros([C], gl.float32, gl.SliceLayout(0, LC)), gl.zeros([C], gl.float32, gl.SliceLayout(0, LC))
    side_C = start + gl.arange(0, C, gl.SliceLayout(0, LC))
    first = (n_tiles - 1) * L
    token, last_state = sequence * n_tokens + first, sequence * (n_tiles * (L // EACH) + 1) + (n_tiles - 1) * (L // EACH)
    place_1C = token * WIDTH + start + lane_1C
    x_ptrs, dt_ptrs, dy_ptrs = x_ptr + place_1C, dt_ptr + place_1C, dy_ptr + place_1C
    dx_ptrs, ddt_ptrs = dx_ptr + place_1C, ddt_ptr + place_1C
    states_ptr += sequence * (n_tiles * (L // EACH) + 1) * ((ALL - N) * WIDTH)
    states_ptrs = states_ptr + (last_state * all_states + channel_1C * N)
    row_stride = row_stride * ROW_UNIT
    rows_LN = token * row_stride + (row_L1 * row_stride + n_1N)
    b_ptrs, c_ptrs = b_ptr + rows_LN, c_ptr + rows_LN
    sums_RL = ((block * n_sequences + sequence) * n_tokens + first) * N + (sum_1L * N + sum_R1 % N)
    db_ptrs, dc_ptrs = db_ptr + sums_RL, dc_ptr + sums_RL
    for back in range(n_tiles):
        dt_LC, x_LC, dy_LC = tile_of(dt_ptrs, at_LC), tile_of(x_ptrs, at_LC), tile_of(dy_ptrs, at_LC)
        borders = borders_of(states_ptrs, n_N1, all_states, L // EACH)
        b.store(gl.load(b_ptrs).to(gl.float32))
        c.store(gl.load(c_ptrs).to(gl.float32))
        before = gl.where(back < n_tiles - 1, L, 0)  # at the end lines that are there already
        token, state = sequence * n_tokens + first - before, last_state - back * (L // EACH) - before // EACH
        ask_tile(dt_ptr, x_ptr, dy_ptr, b_ptr, c_ptr, states_ptr, token, state, start, lane, row_stride, WIDTH, N, EACH, L)
        if ADD:
            ask(dx_ptr + ((token + lane % L) * WIDTH + start))
            ask(ddt_ptr + ((token + lane % L) * WIDTH + start))
        u_LC = dt_LC * x_LC
        u_weight.store(u_LC.to(gl.bfloat16))
        dy_weight.store(dy_LC.to(gl.bfloat16))
        dt, u, dy = unstacked(dt_LC, L, N), unstacked(u_LC, L, N), unstacked(dy_LC, L, N)
        e_NC, drate_NC, du, decayed = through_states(
            e_NC, drate_NC, slope_NC, borders, dt, u, dy, b, c, h_slots, dh_slots, N, EACH, L
        )
        db_RL, dc_RL = sums_over_channels(h_slots, dh_slots, u_weight, dy_weight, N, L)
        store_sums(db_ptrs, db_RL, sum_R1, sum_1L, N)
        store_sums(dc_ptrs, dc_RL, sum_R1, sum_1L, N)
        du_LC = gl.convert_layout(stacked(du, L), LC, assert_trivial=True)
        decayed_LC = gl.convert_layout(stacked(decayed, L), LC, assert_trivial=True)  # times rate and -log2(e)
        dx_LC = du_LC * dt_LC
        if SKIP:
            dx_LC += gl.load(skip_ptr + member * WIDTH + side_C).to(gl.float32)[None, :] * dy_LC
            dskip_C += gl.sum(dy_LC * x_LC, 0)
        store_or_add(dx_ptrs + at_LC, dx_LC, ADD)
        ddt_LC = du_LC * x_LC + decayed_LC * (1.0 / LOG2_E)
        if STEPPED:
            ddt_LC *= slope_of_softplus(dt_LC)
            dbias_C += gl.sum(ddt_LC, 0)
        store_or_add(ddt_ptrs + at_LC, ddt_LC, ADD)
        states_ptrs -= gl.where(back < n_tiles - 1, L // EACH * all_states, 0)
        x_ptrs, dt_ptrs, dy_ptrs = x_ptrs - L * WIDTH, dt_ptrs - L * WIDTH, dy_ptrs - L * WIDTH
        b_ptrs, c_ptrs = b_ptrs - L * row_stride, c_ptrs - L * row_stride
        dx_ptrs, ddt_ptrs = dx_ptrs - L * WIDTH, ddt_ptrs - L * WIDTH
        db_ptrs, dc_ptrs = db_ptrs - L * N, dc_ptrs - L * N
        first -= L
    if STEPPED:
        store_or_add(dbias_ptr + (sequence * WIDTH + side_C), dbias_C, ADD)
    if SKIP:
        gl.store(dskip_ptr + (sequence * WIDTH + side_C), dskip_C)
    gl.store(drate_ptr + (sequence * ALL * WIDTH + n_N1 * WIDTH + channel_1C), -drate_NC)
    gl.store(dstart_ptr + (sequence * ALL * WIDTH + own_NC), e_NC)
