"""The forward pass of Mamba's selective scan in Gluon: a thread owns a channel and all its states, and walks through time.

What a token's states share, its row of b and of c, is read from shared memory, where all lanes of a warp get it at once. The
next tile of tokens is on its way from memory while this one is computed. Everything else stays in registers, so the recurrences
of a thread, one for each state, hide each other's latency.

Exponentials bound it: B T D N of them, at 16 a clock and SM.

Shape legend: B batch, T time, D channels, N state size (padded on chip), L tokens of a tile, C channels of a program.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from kernels._entry import entry
from kernels.scans.selective_scan_rows import log_1p

LOG2_E = gl.constexpr(1.4426950408889634)
ROW_UNIT = gl.constexpr(8)
"""Of the distance between rows of b and c that are parts of wider ones: so it is known that they start on 16 bytes."""


@gluon.constexpr_function
def channels_of_a_warp(n_states):
    """Lanes beside each other have different channels, while a thread can hold all states of one: 16."""
    return max(1, 32 * 16 // max(n_states, 16))


@gluon.constexpr_function
def states_layout(n_states, warps):
    """States of a channel in one thread, or, if they are many, in neighbours; channels over lanes and warps."""
    channels = channels_of_a_warp(n_states)
    return gl.BlockedLayout([n_states * channels // 32, 1], [32 // channels, channels], [1, warps], [0, 1])


@gluon.constexpr_function
def rows_layout(columns, warps):
    """Rows of a tile as they come from memory."""
    beside = 2 if columns >= 64 else 1
    lanes = min(32, columns // beside)
    return gl.BlockedLayout([1, beside], [32 // lanes, lanes], [warps, 1], [1, 0])


@gluon.jit
def fetch(ptr, first, stride, n_tokens, columns, start, L: gl.constexpr, COLUMNS: gl.constexpr, layout: gl.constexpr):
    """The tile of tokens that starts with `first`, in fp32; beyond the end zeros, with which a state goes on unchanged."""
    token_L = first + gl.arange(0, L, gl.SliceLayout(1, layout))
    column = start + gl.arange(0, COLUMNS, gl.SliceLayout(0, layout))
    inside = (token_L < n_tokens)[:, None] & (column < columns)[None, :]
    return gl.load(ptr + (token_L.to(gl.int64)[:, None] * stride + column[None, :]), mask=inside, other=0.0).to(gl.float32)


@gluon.jit
def rows_of(
    dt_ptr, x_ptr, b_ptr, c_ptr, first, n_tokens, width, n_states, row_stride, start,
    L: gl.constexpr, C: gl.constexpr, N: gl.constexpr, LC: gl.constexpr, LN: gl.constexpr,
):  # fmt: skip
    """A tile's rows of dt, x, b and c; those of b and c are `row_stride` apart."""
    dt_LC = fetch(dt_ptr, first, width, n_tokens, width, start, L, C, LC)
    x_LC = fetch(x_ptr, first, width, n_tokens, width, start, L, C, LC)
    b_LN = fetch(b_ptr, first, row_stride, n_tokens, n_states, 0, L, N, LN)
    c_LN = fetch(c_ptr, first, row_stride, n_tokens, n_states, 0, L, N, LN)
    return dt_LC, x_LC, b_LN, c_LN


@gluon.jit
def sides_of(bias_ptr, skip_ptr, member, width, column_C):
    """Bias and skip of the channels."""
    bias_C = gl.load(bias_ptr + member * width + column_C, mask=column_C < width, other=0.0).to(gl.float32)
    return bias_C, gl.load(skip_ptr + member * width + column_C, mask=column_C < width, other=0.0).to(gl.float32)


@gluon.jit
def tile_buffers(L: gl.constexpr, C: gl.constexpr, N: gl.constexpr):
    """Shared memory for dt, dt x, b and c of two tiles."""
    shared: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    dt_buffers = gl.allocate_shared_memory(gl.float32, [2, L, C], shared)
    u_buffers = gl.allocate_shared_memory(gl.float32, [2, L, C], shared)
    b_buffers = gl.allocate_shared_memory(gl.float32, [2, L, N], shared)
    c_buffers = gl.allocate_shared_memory(gl.float32, [2, L, N], shared)
    return dt_buffers, u_buffers, b_buffers, c_buffers


@gluon.jit
def shared_rows(buffers, now, dt_LC, x_LC, b_LN, c_LN, MULTIPLIED: gl.constexpr):
    """dt, dt x or x alone, b and c of a tile in one half of that memory."""
    dt, u, b, c = buffers[0].index(now), buffers[1].index(now), buffers[2].index(now), buffers[3].index(now)
    dt.store(dt_LC)
    if MULTIPLIED:
        u.store(dt_LC * x_LC)
    else:
        u.store(x_LC)
    b.store(b_LN)
    c.store(c_LN)
    return dt, u, b, c


@gluon.jit
def softplus(x):
    """Of x: max(x, 0) + log(1 + exp(-|x|))."""
    high = gl.maximum(x, 0.0)
    return high + log_1p(gl.exp2((x - 2.0 * high) * LOG2_E))


@gluon.jit
def time_steps(raw_LC, bias_C, first, n_tokens, L: gl.constexpr, layout: gl.constexpr):
    """softplus(raw dt + bias), and 0 beyond the end."""
    dt_LC = softplus(raw_LC + bias_C[None, :])
    token_L = first + gl.arange(0, L, gl.SliceLayout(1, layout))
    return gl.where((token_L < n_tokens)[:, None], dt_LC, 0.0)


@gluon.jit
def token_step(h_NC, rate_NC, dt, u, b, c, t: gl.constexpr, layout: gl.constexpr):
    """The states after a token of the tile in shared memory, and what is read from them."""
    dt_1C, u_1C = dt.slice(t, 1, 0).load(layout), u.slice(t, 1, 0).load(layout)
    b_N1, c_N1 = b.permute([1, 0]).slice(t, 1, 1).load(layout), c.permute([1, 0]).slice(t, 1, 1).load(layout)
    h_NC = h_NC * gl.exp2(rate_NC * dt_1C) + u_1C * b_N1
    return h_NC, gl.sum(h_NC * c_N1, 0)


@entry(do_not_specialize=["gate_stride", "n_tokens", "n_tiles", "sequences_per_member"], gluon=True)
def selective_scan_forward(  # noqa: PLR0915 - one loop, whose values live in registers
    x_ptr, dt_ptr, rate_ptr, b_ptr, c_ptr, bias_ptr, skip_ptr, gate_ptr, start_ptr, y_ptr, states_ptr, final_ptr,
    gate_stride, n_tokens, width, n_states, n_tiles, sequences_per_member,
    GATED: gl.constexpr, START: gl.constexpr, KEEP: gl.constexpr,
    N: gl.constexpr, C: gl.constexpr, L: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Outputs, the last state and, if they are kept, the states at the borders of tiles.

    Those are [N, D], while rates, the initial state and the last one are [D, N].
    """
    NC: gl.constexpr = states_layout(N, WARPS)
    LC: gl.constexpr = rows_layout(C, WARPS)
    LN: gl.constexpr = rows_layout(N, WARPS)
    shared: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    n_blocks = (width + C - 1) // C
    sequence, start = (gl.program_id(0) // n_blocks).to(gl.int64), gl.program_id(0) % n_blocks * C
    member = sequence // sequences_per_member
    x_ptr, dt_ptr = x_ptr + sequence * n_tokens * width, dt_ptr + sequence * n_tokens * width
    y_ptr += sequence * n_tokens * width
    b_ptr, c_ptr = b_ptr + sequence * n_tokens * n_states, c_ptr + sequence * n_tokens * n_states
    gate_ptr += sequence * n_tokens * gate_stride
    states_ptr += sequence * (n_tiles + 1) * n_states * width
    buffers = tile_buffers(L, C, N)
    n_N, channel_C = gl.arange(0, N, gl.SliceLayout(1, NC)), start + gl.arange(0, C, gl.SliceLayout(0, NC))
    at_NC, inside_C = n_N[:, None] * width + channel_C[None, :], channel_C < width
    inside_NC = (n_N < n_states)[:, None] & inside_C[None, :]
    turned_NC = channel_C[None, :] * n_states + n_N[:, None]
    rate_NC = gl.load(rate_ptr + member * n_states * width + turned_NC, mask=inside_NC, other=0.0).to(gl.float32) * -LOG2_E
    h_NC = gl.zeros([N, C], gl.float32, NC)
    if START:
        h_NC = gl.load(start_ptr + sequence * n_states * width + turned_NC, mask=inside_NC, other=0.0).to(gl.float32)
    if KEEP:
        gl.store(states_ptr + at_NC, h_NC, mask=inside_NC)
    column_C = start + gl.arange(0, C, gl.SliceLayout(0, LC))
    bias_C, skip_C = gl.zeros([C], gl.float32, gl.SliceLayout(0, LC)), gl.zeros([C], gl.float32, gl.SliceLayout(0, LC))
    if GATED:
        skipped_buffers = gl.allocate_shared_memory(gl.float32, [2, L, C], shared)
        open_buffers = gl.allocate_shared_memory(gl.float32, [2, L, C], shared)
        bias_C, skip_C = sides_of(bias_ptr, skip_ptr, member, width, column_C)
        z_LC = fetch(gate_ptr, 0, gate_stride, n_tokens, width, start, L, C, LC)
    dt_LC, x_LC, b_LN, c_LN = rows_of(dt_ptr, x_ptr, b_ptr, c_ptr, 0, n_tokens, width, n_states, n_states, start, L, C, N, LC, LN)
    for tile in range(n_tiles):
        now, following = tile % 2, (tile + 1) * L
        if GATED:
            dt_LC = time_steps(dt_LC, bias_C, tile * L, n_tokens, L, LC)
            skipped_buffers.index(now).store(skip_C[None, :] * x_LC)
            open_buffers.index(now).store(z_LC / (1.0 + gl.exp2(z_LC * -LOG2_E)))
            z_LC = fetch(gate_ptr, following, gate_stride, n_tokens, width, start, L, C, LC)
        dt, u, b, c = shared_rows(buffers, now, dt_LC, x_LC, b_LN, c_LN, True)
        dt_LC, x_LC, b_LN, c_LN = rows_of(
            dt_ptr, x_ptr, b_ptr, c_ptr, following, n_tokens, width, n_states, n_states, start, L, C, N, LC, LN
        )
        for t in gl.static_range(L):
            h_NC, y_C = token_step(h_NC, rate_NC, dt, u, b, c, t, NC)
            if GATED:
                y_C += gl.sum(skipped_buffers.index(now).slice(t, 1, 0).load(NC), 0)
                y_C *= gl.sum(open_buffers.index(now).slice(t, 1, 0).load(NC), 0)
            inside = inside_C & (tile * L + t < n_tokens)
            gl.store(y_ptr + (t * width + channel_C), y_C.to(y_ptr.dtype.element_ty), mask=inside)
        y_ptr += L * width
        states_ptr += n_states * width
        if KEEP:
            gl.store(states_ptr + at_NC, h_NC, mask=inside_NC)
    gl.store(final_ptr + sequence * n_states * width + turned_NC, h_NC, mask=inside_NC)
