"""The forward pass of Mamba's selective scan in Gluon: a thread owns a channel and all its states, and walks through time.

What a token's states share, its row of b and of c, is read from shared memory, where all lanes of a warp get it at once. The
next tile of tokens is on its way from memory while this one is computed. Everything else stays in registers, so the recurrences
of a thread, one for each state, hide each other's latency.

Exponentials bound it: B T D N of them, at 16 a clock and SM.

Shape legend: B batch, T time, D channels, N state size (padded on chip), L tokens of a tile, C channels of a program.
"""

from __future__ import annotations

from triton.experimental.gluon import language as gl

from kernels._entry import entry
from kernels.scans.selective_scan_gluon import fetch, rows_layout, states_layout, time_steps, token_step

LOG2_E = gl.constexpr(1.4426950408889634)


@entry(do_not_specialize=["gate_stride", "n_tokens", "n_tiles", "sequences_per_member"], gluon=True)
def forward_fixed(  # noqa: PLR0915 - one loop, whose values live in registers
    x_ptr, dt_ptr, rate_ptr, b_ptr, c_ptr, bias_ptr, skip_ptr, gate_ptr, start_ptr, y_ptr, states_ptr, final_ptr,
    gate_stride, n_tokens, n_tiles, sequences_per_member,
    GATED: gl.constexpr, START: gl.constexpr, KEEP: gl.constexpr,
    N: gl.constexpr, C: gl.constexpr, L: gl.constexpr, WARPS: gl.constexpr, EACH: gl.constexpr,
    width: gl.constexpr, n_states: gl.constexpr,
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
    x_ptr, dt_ptr, y_ptr = (
        x_ptr + sequence * n_tokens * width,
        dt_ptr + sequence * n_tokens * width,
        y_ptr + sequence * n_tokens * width,
    )
    b_ptr, c_ptr = b_ptr + sequence * n_tokens * n_states, c_ptr + sequence * n_tokens * n_states
    gate_ptr += sequence * n_tokens * gate_stride
    states_ptr += sequence * (n_tiles * (L // EACH) + 1) * n_states * width
    dt_buffers = gl.allocate_shared_memory(gl.float32, [2, L, C], shared)
    u_buffers = gl.allocate_shared_memory(gl.float32, [2, L, C], shared)
    b_buffers = gl.allocate_shared_memory(gl.float32, [2, L, N], shared)
    c_buffers = gl.allocate_shared_memory(gl.float32, [2, L, N], shared)
    n_N, channel_C = gl.arange(0, N, gl.SliceLayout(1, NC)), start + gl.arange(0, C, gl.SliceLayout(0, NC))
    at_NC, inside_C = n_N[:, None] * width + channel_C[None, :], channel_C < width
    inside_NC = (n_N < n_states)[:, None] & inside_C[None, :]
    turned_NC = channel_C[None, :] * n_states + n_N[:, None]
    rate_NC = gl.load(rate_ptr + member * n_states * width + turned_NC, mask=inside_NC, other=0.0).to(gl.float32) * -LOG2_E
    h_NC = gl.zeros([N, C], gl.float32, NC)
    if START:
        h_NC = gl.load(start_ptr + sequence * n_states * width + turned_NC, mask=inside_NC, other=0.0).to(gl.float32)
    if KEEP:
        gl.store(states_ptr + turned_NC, h_NC.to(states_ptr.dtype.element_ty), mask=inside_NC)
    column_C = start + gl.arange(0, C, gl.SliceLayout(0, LC))
    bias_C, skip_C = gl.zeros([C], gl.float32, gl.SliceLayout(0, LC)), gl.zeros([C], gl.float32, gl.SliceLayout(0, LC))
    if GATED:
        skipped_buffers = gl.allocate_shared_memory(gl.float32, [2, L, C], shared)
        open_buffers = gl.allocate_shared_memory(gl.float32, [2, L, C], shared)
        bias_C = gl.load(bias_ptr + member * width + column_C, mask=column_C < width, other=0.0).to(gl.float32)
        skip_C = gl.load(skip_ptr + member * width + column_C, mask=column_C < width, other=0.0).to(gl.float32)
        z_LC = fetch(gate_ptr, 0, gate_stride, n_tokens, width, start, L, C, LC)
    dt_LC = fetch(dt_ptr, 0, width, n_tokens, width, start, L, C, LC)
    x_LC = fetch(x_ptr, 0, width, n_tokens, width, start, L, C, LC)
    b_LN = fetch(b_ptr, 0, n_states, n_tokens, n_states, 0, L, N, LN)
    c_LN = fetch(c_ptr, 0, n_states, n_tokens, n_states, 0, L, N, LN)
    for tile in range(n_tiles):
        now, following = tile % 2, (tile + 1) * L
        if GATED:
            dt_LC = time_steps(dt_LC, bias_C, tile * L, n_tokens, L, LC)
            skipped_buffers.index(now).store(skip_C[None, :] * x_LC)
            open_buffers.index(now).store(z_LC / (1.0 + gl.exp2(z_LC * -LOG2_E)))
            z_LC = fetch(gate_ptr, following, gate_stride, n_tokens, width, start, L, C, LC)
        dt, u, b, c = dt_buffers.index(now), u_buffers.index(now), b_buffers.index(now), c_buffers.index(now)
        dt.store(dt_LC)
        u.store(dt_LC * x_LC)
        b.store(b_LN)
        c.store(c_LN)
        dt_LC = fetch(dt_ptr, following, width, n_tokens, width, start, L, C, LC)
        x_LC = fetch(x_ptr, following, width, n_tokens, width, start, L, C, LC)
        b_LN = fetch(b_ptr, following, n_states, n_tokens, n_states, 0, L, N, LN)
        c_LN = fetch(c_ptr, following, n_states, n_tokens, n_states, 0, L, N, LN)
        for t in gl.static_range(L):
            h_NC, y_C = token_step(h_NC, rate_NC, dt, u, b, c, t, NC)
            if GATED:
                y_C += gl.sum(skipped_buffers.index(now).slice(t, 1, 0).load(NC), 0)
                y_C *= gl.sum(open_buffers.index(now).slice(t, 1, 0).load(NC), 0)
            inside = inside_C & (tile * L + t < n_tokens)
            gl.store(y_ptr + (t * width + channel_C), y_C.to(y_ptr.dtype.element_ty), mask=inside)
            if (t + 1) % EACH == 0:
                states_ptr += n_states * width
                if KEEP:
                    gl.store(states_ptr + turned_NC, h_NC.to(states_ptr.dtype.element_ty), mask=inside_NC)
        y_ptr += L * width
    gl.store(final_ptr + sequence * n_states * width + turned_NC, h_NC, mask=inside_NC)
