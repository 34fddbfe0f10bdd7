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

LOG2_E = gl.constexpr(1.4426950408889634)


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
    lanes = min(32, columns)
    return gl.BlockedLayout([1, 1], [32 // lanes, lanes], [warps, 1], [1, 0])


@gluon.jit
def fetch(ptr, sequence, tile, n_tokens, width, start, L: gl.constexpr, COLUMNS: gl.constexpr, layout: gl.constexpr):
    """A tile of tokens in fp32; beyond the end zeros, with which a state goes on unchanged."""
    token_L = tile * L + gl.arange(0, L, gl.SliceLayout(1, layout))
    column = start + gl.arange(0, COLUMNS, gl.SliceLayout(0, layout))
    inside = (token_L < n_tokens)[:, None] & (column < width)[None, :]
    place = (sequence * n_tokens + token_L)[:, None] * width + column[None, :]
    return gl.load(ptr + place, mask=inside, other=0.0).to(gl.float32)


@gluon.jit
def token_step(h_NC, rate_NC, dt, u, b, c, t: gl.constexpr, layout: gl.constexpr):
    """The states after a token of the tile in shared memory, and what is read from them."""
    dt_1C, u_1C = dt.slice(t, 1, 0).load(layout), u.slice(t, 1, 0).load(layout)
    b_N1, c_N1 = b.permute([1, 0]).slice(t, 1, 1).load(layout), c.permute([1, 0]).slice(t, 1, 1).load(layout)
    h_NC = h_NC * gl.exp2(rate_NC * dt_1C) + u_1C * b_N1
    return h_NC, gl.sum(h_NC * c_N1, 0)


@gluon.jit(do_not_specialize=["n_tokens", "n_tiles", "sequences_per_member"])
def selective_scan_forward(
    x_ptr, dt_ptr, rate_ptr, b_ptr, c_ptr, y_ptr, states_ptr,
    n_tokens, width, n_states, n_tiles, sequences_per_member,
    N: gl.constexpr, C: gl.constexpr, L: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Outputs, and the state after every tile; the caller has put the initial one before the first."""
    NC: gl.constexpr = states_layout(N, WARPS)
    LC: gl.constexpr = rows_layout(C, WARPS)
    LN: gl.constexpr = rows_layout(N, WARPS)
    shared: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    n_blocks = (width + C - 1) // C
    sequence, start = (gl.program_id(0) // n_blocks).to(gl.int64), gl.program_id(0) % n_blocks * C
    dt_buffers, u_buffers = (
        gl.allocate_shared_memory(gl.float32, [2, L, C], shared),
        gl.allocate_shared_memory(gl.float32, [2, L, C], shared),
    )
    b_buffers, c_buffers = (
        gl.allocate_shared_memory(gl.float32, [2, L, N], shared),
        gl.allocate_shared_memory(gl.float32, [2, L, N], shared),
    )
    n_N, channel_C = gl.arange(0, N, gl.SliceLayout(1, NC)), start + gl.arange(0, C, gl.SliceLayout(0, NC))
    at_NC, inside_C = n_N[:, None] * width + channel_C[None, :], channel_C < width
    inside_NC = (n_N < n_states)[:, None] & inside_C[None, :]
    rate_ptr += sequence // sequences_per_member * n_states * width
    rate_NC = gl.load(rate_ptr + at_NC, mask=inside_NC, other=0.0) * -LOG2_E
    states_ptr += sequence * (n_tiles + 1) * n_states * width
    h_NC = gl.load(states_ptr + at_NC, mask=inside_NC, other=0.0)
    y_ptr += sequence * n_tokens * width
    dt_LC = fetch(dt_ptr, sequence, 0, n_tokens, width, start, L, C, LC)
    x_LC = fetch(x_ptr, sequence, 0, n_tokens, width, start, L, C, LC)
    b_LN = fetch(b_ptr, sequence, 0, n_tokens, n_states, 0, L, N, LN)
    c_LN = fetch(c_ptr, sequence, 0, n_tokens, n_states, 0, L, N, LN)
    for tile in range(n_tiles):
        dt, u, b, c = (
            dt_buffers.index(tile % 2),
            u_buffers.index(tile % 2),
            b_buffers.index(tile % 2),
            c_buffers.index(tile % 2),
        )
        dt.store(dt_LC)
        u.store(dt_LC * x_LC)
        b.store(b_LN)
        c.store(c_LN)
        dt_LC = fetch(dt_ptr, sequence, tile + 1, n_tokens, width, start, L, C, LC)
        x_LC = fetch(x_ptr, sequence, tile + 1, n_tokens, width, start, L, C, LC)
        b_LN = fetch(b_ptr, sequence, tile + 1, n_tokens, n_states, 0, L, N, LN)
        c_LN = fetch(c_ptr, sequence, tile + 1, n_tokens, n_states, 0, L, N, LN)
        for t in gl.static_range(L):
            h_NC, y_C = token_step(h_NC, rate_NC, dt, u, b, c, t, NC)
            inside = inside_C & (tile * L + t < n_tokens)
            gl.store(y_ptr + (t * width + channel_C), y_C.to(y_ptr.dtype.element_ty), mask=inside)
        y_ptr += L * width
        states_ptr += n_states * width
        gl.store(states_ptr + at_NC, h_NC, mask=inside_NC)
