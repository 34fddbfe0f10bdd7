"""The forward pass of Mamba's selective scan that keeps states for `kernels.scans.selective_scan_columns`.

As `kernels.scans.selective_scan_gluon`, whose functions it takes, without a gate; the states that it keeps, before each `EACH`
tokens and in bf16, lie as a thread has them, so that two stores keep sixteen. Channels with more states take a launch for each
group of them.

Shape legend: B batch, T time, D channels, N = 8 or 16 states, L tokens of a tile, C channels of a program.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from kernels._entry import entry
from kernels.scans.selective_scan_gluon import (
    LOG2_E,
    ROW_UNIT,
    rows_layout,
    rows_of,
    shared_rows,
    softplus,
    states_layout,
    tile_buffers,
    token_step,
)


@gluon.jit
def skipping_step(h_NC, rate_NC, skip_C, dt, x, b, c, t: gl.constexpr, layout: gl.constexpr):
    """As `token_step` with x in place of dt x, of which a part joins the output."""
    dt_1C, x_1C = dt.slice(t, 1, 0).load(layout), x.slice(t, 1, 0).load(layout)
    b_N1, c_N1 = b.permute([1, 0]).slice(t, 1, 1).load(layout), c.permute([1, 0]).slice(t, 1, 1).load(layout)
    h_NC = h_NC * gl.exp2(rate_NC * dt_1C) + (dt_1C * x_1C) * b_N1
    return h_NC, gl.sum(h_NC * c_N1, 0) + skip_C * gl.sum(x_1C, 0)


@entry(do_not_specialize=["row_stride", "n_tokens", "n_tiles", "sequences_per_member"], gluon=True)
def columns_forward(  # noqa: PLR0915 - one loop, whose values live in registers
    x_ptr, dt_ptr, bias_ptr, skip_ptr, rate_ptr, b_ptr, c_ptr, start_ptr, y_ptr, steps_ptr, states_ptr, final_ptr,
    row_stride, n_tokens, n_tiles, sequences_per_member,
    WIDTH: gl.constexpr, STEPPED: gl.constexpr, SKIP: gl.constexpr, START: gl.constexpr, ADD: gl.constexpr, EACH: gl.constexpr,
    ALL: gl.constexpr, N: gl.constexpr, C: gl.constexpr, L: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Outputs, the last state and those kept before each `EACH` tokens, [B, T / EACH + 1, D, N], by N of ALL states of a channel.

    Grid: (B * blocks of channels,). Rows of b and c are `row_stride` times `ROW_UNIT` apart; rates, initial and last states are
    [D, ALL], and behind each sequence's kept states those of other groups lie. ADD: outputs are added to what an earlier launch
    stored.
    STEPPED: dt comes before its bias and softplus, and is kept behind them. SKIP: skip times x is added to the outputs.
    """
    NC: gl.constexpr = states_layout(N, WARPS)
    LC: gl.constexpr = rows_layout(C, WARPS)
    LN: gl.constexpr = rows_layout(N, WARPS)
    n_blocks: gl.constexpr = (WIDTH + C - 1) // C
    sequence, start = (gl.program_id(0) // n_blocks).to(gl.int64), gl.program_id(0) % n_blocks * C
    member = sequence // sequences_per_member
    x_ptr, dt_ptr = x_ptr + sequence * n_tokens * WIDTH, dt_ptr + sequence * n_tokens * WIDTH
    y_ptr, steps_ptr = y_ptr + sequence * n_tokens * WIDTH, steps_ptr + sequence * n_tokens * WIDTH
    row_stride = row_stride * ROW_UNIT
    b_ptr, c_ptr = b_ptr + sequence * n_tokens * row_stride, c_ptr + sequence * n_tokens * row_stride
    states_ptr += sequence * (n_tiles * (L // EACH) + 1) * ALL * WIDTH
    buffers = tile_buffers(L, C, N)
    n_N, channel_C = gl.arange(0, N, gl.SliceLayout(1, NC)), start + gl.arange(0, C, gl.SliceLayout(0, NC))
    inside_C = channel_C < WIDTH
    inside_NC = (n_N < N)[:, None] & inside_C[None, :]
    own_NC, kept_NC = channel_C[None, :] * ALL + n_N[:, None], channel_C[None, :] * N + n_N[:, None]
    rate_NC = gl.load(rate_ptr + member * ALL * WIDTH + own_NC, mask=inside_NC, other=0.0).to(gl.float32) * -LOG2_E
    h_NC = gl.zeros([N, C], gl.float32, NC)
    if START:
        h_NC = gl.load(start_ptr + sequence * ALL * WIDTH + own_NC, mask=inside_NC, other=0.0).to(gl.float32)
    gl.store(states_ptr + kept_NC, h_NC.to(states_ptr.dtype.element_ty), mask=inside_NC)
    skip_C = gl.zeros([C], gl.float32, gl.SliceLayout(0, NC))
    if SKIP:
        skip_C = gl.load(skip_ptr + member * WIDTH + channel_C, mask=inside_C, other=0.0).to(gl.float32)
    column_C = start + gl.arange(0, C, gl.SliceLayout(0, LC))
    bias_C = gl.zeros([C], gl.float32, gl.SliceLayout(0, LC))
    if STEPPED:
        bias_C = gl.load(bias_ptr + member * WIDTH + column_C, mask=column_C < WIDTH, other=0.0).to(gl.float32)
    at_LC = gl.arange(0, L, gl.SliceLayout(1, LC))[:, None] * WIDTH + column_C[None, :]
    dt_LC, x_LC, b_LN, c_LN = rows_of(dt_ptr, x_ptr, b_ptr, c_ptr, 0, n_tokens, WIDTH, N, row_stride, start, L, C, N, LC, LN)
    for tile in range(n_tiles):
        now, following = tile % 2, (tile + 1) * L
        if STEPPED:
            dt_LC = softplus(dt_LC + bias_C[None, :])
            gl.store(steps_ptr + at_LC, dt_LC, mask=(column_C < WIDTH)[None, :])
            steps_ptr += L * WIDTH
        dt, x, b, c = shared_rows(buffers, now, dt_LC, x_LC, b_LN, c_LN, not SKIP)
        dt_LC, x_LC, b_LN, c_LN = rows_of(
            dt_ptr, x_ptr, b_ptr, c_ptr, following, n_tokens, WIDTH, N, row_stride, start, L, C, N, LC, LN
        )
        found = ()
        if ADD:  # all at once, as a load waits for the stores before it
            for t in gl.static_range(L):
                found = found + (gl.load(y_ptr + (t * WIDTH + channel_C), mask=inside_C, other=0.0).to(gl.float32),)
        for t in gl.static_range(L):
            if SKIP:
                h_NC, y_C = skipping_step(h_NC, rate_NC, skip_C, dt, x, b, c, t, NC)
            else:
                h_NC, y_C = token_step(h_NC, rate_NC, dt, x, b, c, t, NC)
            if ADD:
                y_C += found[t]
            gl.store(y_ptr + (t * WIDTH + channel_C), y_C.to(y_ptr.dtype.element_ty), mask=inside_C)
            if (t + 1) % EACH == 0:
                states_ptr += N * WIDTH
                gl.store(states_ptr + kept_NC, h_NC.to(states_ptr.dtype.element_ty), mask=inside_NC)
        y_ptr += L * WIDTH
    gl.store(final_ptr + sequence * ALL * WIDTH + own_NC, h_NC, mask=inside_NC)
