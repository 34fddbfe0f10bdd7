"""Trial kernels of the selective scan."""

import triton
import triton.language as tl

from kernels.selective_scan_triton import LOG2_E, then

SIZES = ("n_tokens", "width", "n_tiles", "n_sequences", "sequences_per_member")


@triton.jit(do_not_specialize=SIZES)
def forward2(
    x_ptr, dt_ptr, rate_ptr, b_ptr, c_ptr, y_ptr, states_ptr, final_ptr,
    n_tokens, width, n_tiles, sequences_per_member,
    N: tl.constexpr, W: tl.constexpr, TILE: tl.constexpr, CHANNELS: tl.constexpr, BORDERS: tl.constexpr,
):  # fmt: skip
    NB: tl.constexpr = N // W
    n_blocks = tl.cdiv(width, CHANNELS)
    sequence = (tl.program_id(0) // n_blocks).to(tl.int64)
    channel_C = tl.program_id(0) % n_blocks * CHANNELS + tl.arange(0, CHANNELS)
    inside_C = channel_C < width
    w_W = tl.arange(0, W)
    plane_WC = w_W[:, None] * width + channel_C[None, :]
    inside_WC = (w_W[:, None] < W) & inside_C[None, :]
    rate_ptr += sequence // sequences_per_member * N * width
    states_ptr += sequence * (n_tiles + 1) * N * width
    row_L = tl.arange(0, TILE)
    b_ptr += sequence * N * n_tiles * TILE
    c_ptr += sequence * N * n_tiles * TILE
    h = ()
    for j in tl.static_range(NB):
        h += (tl.load(states_ptr + j * W * width + plane_WC, mask=inside_WC, other=0.0),)
    for tile in range(n_tiles):
        token_L = tile * TILE + row_L
        place_LWC = (sequence * n_tokens + token_L[:, None, None]) * width + channel_C[None, None, :] + 0 * w_W[None, :, None]
        inside_LWC = (token_L[:, None, None] < n_tokens) & inside_WC[None, :, :]
        dt_LWC = tl.load(dt_ptr + place_LWC, mask=inside_LWC, other=0.0).to(tl.float32)
        u_LWC = dt_LWC * tl.load(x_ptr + place_LWC, mask=inside_LWC, other=0.0).to(tl.float32)
        y_LWC = tl.zeros([TILE, W, CHANNELS], tl.float32)
        states_ptr += tl.cast(N, tl.int64) * width
        new = ()
        for j in tl.static_range(NB):
            offset_LW = (j * W + w_W[None, :]) * n_tiles * TILE + token_L[:, None]
            b_LW = tl.load(b_ptr + offset_LW)
            c_LW = tl.load(c_ptr + offset_LW)
            rate_WC = tl.load(rate_ptr + j * W * width + plane_WC, mask=inside_WC, other=0.0)
            a_LWC = tl.exp2(dt_LWC * (rate_WC * -LOG2_E)[None, :, :])
            enters_LWC = tl.where(row_L[:, None, None] == 0, a_LWC * h[j][None, :, :], 0.0)
            _, h_LWC = tl.associative_scan((a_LWC, u_LWC * b_LW[:, :, None] + enters_LWC), 0, then)
            y_LWC += h_LWC * c_LW[:, :, None]
            end_WC = tl.sum(tl.where(row_L[:, None, None] == TILE - 1, h_LWC, 0.0), axis=0)
            new += (end_WC,)
            if BORDERS:
                tl.store(states_ptr + j * W * width + plane_WC, end_WC, mask=inside_WC)
        h = new
        y_LC = tl.sum(y_LWC, axis=1)
        place_LC = (sequence * n_tokens + token_L[:, None]) * width + channel_C[None, :]
        tl.store(y_ptr + place_LC, y_LC.to(y_ptr.dtype.element_ty), mask=(token_L[:, None] < n_tokens) & inside_C[None, :])
    for j in tl.static_range(NB):
        tl.store(final_ptr + sequence * N * width + j * W * width + plane_WC, h[j], mask=inside_WC)


@triton.jit
def later_first(a_1, e_1, g_1, p_1, a_2, e_2, g_2, p_2):
    """Composition of maps e -> a (x + e), beside the sum g = x + e that enters the last of them."""
    return a_1 * a_2, e_2 + a_2 * e_1, g_2 + p_2 * e_1, a_1 * p_2


@triton.jit
def _total(x_LC, ones, DOTS: tl.constexpr):
    """Sums over channels."""
    if DOTS == 0:
        total_L = tl.sum(x_LC, axis=1)
    elif DOTS == 1:
        total_L = tl.max(tl.dot(x_LC, ones, input_precision="tf32"), axis=1)
    else:
        high = x_LC.to(tl.bfloat16)
        low = (x_LC - high.to(tl.float32)).to(tl.bfloat16)
        total_L = tl.max(tl.dot(low, ones) + tl.dot(high, ones), axis=1)
    return total_L


@triton.jit(do_not_specialize=("n_tokens", "width", "n_states", "n_tiles", "n_sequences", "sequences_per_member"))
def backward2(
    dy_ptr, x_ptr, dt_ptr, rate_ptr, b_ptr, c_ptr, states_ptr,
    dx_ptr, ddt_ptr, drate_ptr, db_ptr, dc_ptr, dstate_ptr,
    n_tokens, width, n_states, n_tiles, n_sequences, sequences_per_member,
    TILE: tl.constexpr, CHANNELS: tl.constexpr, DOTS: tl.constexpr,
):  # fmt: skip
    n_blocks = tl.cdiv(width, CHANNELS)
    sequence = (tl.program_id(0) // n_blocks).to(tl.int64)
    block = tl.program_id(0) % n_blocks
    channel_C = block * CHANNELS + tl.arange(0, CHANNELS)
    inside_C = channel_C < width
    rate_ptr += sequence // sequences_per_member * n_states * width + channel_C
    drate_ptr += sequence * n_states * width + channel_C
    dstate_ptr += sequence * n_states * width + channel_C
    states_ptr += (sequence * (n_tiles + 1) + n_tiles) * n_states * width + channel_C
    read_ptr = sequence * n_states * n_tiles * TILE
    part_ptr = (block * n_sequences + sequence) * n_states * n_tiles * TILE
    row_L = tl.arange(0, TILE)
    ones = tl.full([CHANNELS, 16], 1.0, tl.float32)
    if DOTS == 2:
        ones = ones.to(tl.bfloat16)
    for back in range(n_tiles):
        states_ptr -= n_states.to(tl.int64) * width
        token_L = (n_tiles - 1 - back) * TILE + row_L
        place_LC = (sequence * n_tokens + token_L[:, None]) * width + channel_C[None, :]
        inside_LC = (token_L[:, None] < n_tokens) & inside_C[None, :]
        dt_LC = tl.load(dt_ptr + place_LC, mask=inside_LC, other=0.0).to(tl.float32)
        x_LC = tl.load(x_ptr + place_LC, mask=inside_LC, other=0.0).to(tl.float32)
        dy_LC = tl.load(dy_ptr + place_LC, mask=inside_LC, other=0.0).to(tl.float32)
        u_LC = dt_LC * x_LC
        du_LC = tl.zeros([TILE, CHANNELS], tl.float32)
        decayed_LC = tl.zeros([TILE, CHANNELS], tl.float32)
        for n in range(n_states):
            start_C = tl.load(states_ptr + n * width, mask=inside_C, other=0.0)
            after_C = tl.load(dstate_ptr + n * width, mask=inside_C, other=0.0)
            rate_C = tl.load(rate_ptr + n * width, mask=inside_C, other=0.0)
            offset_L = n * n_tiles * TILE + token_L
            b_L = tl.load(b_ptr + read_ptr + offset_L).to(tl.float32)
            c_L = tl.load(c_ptr + read_ptr + offset_L).to(tl.float32)
            a_LC = tl.exp2(dt_LC * (rate_C * -LOG2_E)[None, :])
            written_LC = u_LC * b_L[:, None]
            enters_LC = tl.where(row_L[:, None] == 0, a_LC * start_C[None, :], 0.0)
            _, h_LC = tl.associative_scan((a_LC, written_LC + enters_LC), 0, then)
            leaves_LC = tl.where(row_L[:, None] == TILE - 1, after_C[None, :], 0.0)
            read_LC = tl.flip(dy_LC * c_L[:, None] + leaves_LC, 0)
            a_late_LC = tl.flip(a_LC, 0)
            _, e_LC, g_LC, _ = tl.associative_scan(
                (a_late_LC, a_late_LC * read_LC, read_LC, tl.full([TILE, CHANNELS], 1.0, tl.float32)), 0, later_first
            )
            dh_LC = tl.flip(g_LC, 0)
            dlog_LC = dh_LC * (h_LC - written_LC)
            du_LC += dh_LC * b_L[:, None]
            decayed_LC += dlog_LC * rate_C[None, :]
            drate_C = tl.load(drate_ptr + n * width, mask=inside_C, other=0.0) - tl.sum(dlog_LC * dt_LC, axis=0)
            tl.store(drate_ptr + n * width, drate_C, mask=inside_C)
            tl.store(dstate_ptr + n * width, tl.sum(tl.where(row_L[:, None] == TILE - 1, e_LC, 0.0), axis=0), mask=inside_C)
            tl.store(db_ptr + part_ptr + offset_L, _total(dh_LC * u_LC, ones, DOTS))
            tl.store(dc_ptr + part_ptr + offset_L, _total(h_LC * dy_LC, ones, DOTS))
        tl.store(dx_ptr + place_LC, (du_LC * dt_LC).to(dx_ptr.dtype.element_ty), mask=inside_LC)
        tl.store(ddt_ptr + place_LC, (du_LC * x_LC - decayed_LC).to(ddt_ptr.dtype.element_ty), mask=inside_LC)
        tl.debug_barrier()


@triton.jit(do_not_specialize=("n_tokens", "width", "n_states", "n_tiles", "sequences_per_member"))
def forward3(
    x_ptr, dt_ptr, rate_ptr, b_ptr, c_ptr, y_ptr, states_ptr,
    n_tokens, width, n_states, n_tiles, sequences_per_member,
    TILE: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """The shipped kernel with everything of the next state element loaded one turn ahead."""
    n_blocks = tl.cdiv(width, CHANNELS)
    sequence = (tl.program_id(0) // n_blocks).to(tl.int64)
    channel_C = tl.program_id(0) % n_blocks * CHANNELS + tl.arange(0, CHANNELS)
    inside_C = channel_C < width
    rate_ptr += sequence // sequences_per_member * n_states * width + channel_C
    states_ptr += sequence * (n_tiles + 1) * n_states * width + channel_C
    read_ptr = sequence * n_states * n_tiles * TILE
    row_L = tl.arange(0, TILE)
    for tile in range(n_tiles):
        token_L = tile * TILE + row_L
        place_LC = (sequence * n_tokens + token_L[:, None]) * width + channel_C[None, :]
        inside_LC = (token_L[:, None] < n_tokens) & inside_C[None, :]
        offset_L = read_ptr + token_L
        start_C = tl.load(states_ptr, mask=inside_C, other=0.0)
        rate_C = tl.load(rate_ptr, mask=inside_C, other=0.0)
        b_L = tl.load(b_ptr + offset_L)
        c_L = tl.load(c_ptr + offset_L)
        dt_LC = tl.load(dt_ptr + place_LC, mask=inside_LC, other=0.0).to(tl.float32)
        u_LC = dt_LC * tl.load(x_ptr + place_LC, mask=inside_LC, other=0.0).to(tl.float32)
        y_LC = tl.zeros([TILE, CHANNELS], tl.float32)
        for n in range(n_states):
            more = tl.minimum(n + 1, n_states - 1)
            next_start_C = tl.load(states_ptr + more * width, mask=inside_C, other=0.0)
            next_rate_C = tl.load(rate_ptr + more * width, mask=inside_C, other=0.0)
            next_b_L = tl.load(b_ptr + offset_L + more * n_tiles * TILE)
            next_c_L = tl.load(c_ptr + offset_L + more * n_tiles * TILE)
            a_LC = tl.exp2(dt_LC * (rate_C * -LOG2_E)[None, :])
            enters_LC = tl.where(row_L[:, None] == 0, a_LC * start_C[None, :], 0.0)
            _, h_LC = tl.associative_scan((a_LC, u_LC * b_L.to(tl.float32)[:, None] + enters_LC), 0, then)
            y_LC += h_LC * c_L.to(tl.float32)[:, None]
            end_C = tl.sum(tl.where(row_L[:, None] == TILE - 1, h_LC, 0.0), axis=0)
            tl.store(states_ptr + (n_states + n) * width, end_C, mask=inside_C)
            start_C, rate_C, b_L, c_L = next_start_C, next_rate_C, next_b_L, next_c_L
        tl.store(y_ptr + place_LC, y_LC.to(y_ptr.dtype.element_ty), mask=inside_LC)
        states_ptr += n_states.to(tl.int64) * width
        tl.debug_barrier()


@triton.jit(do_not_specialize=("n_tokens", "width", "n_states", "n_tiles", "n_sequences", "sequences_per_member"))
def backward3(
    dy_ptr, x_ptr, dt_ptr, rate_ptr, b_ptr, c_ptr, states_ptr,
    dx_ptr, ddt_ptr, drate_ptr, db_ptr, dc_ptr, dstate_ptr,
    n_tokens, width, n_states, n_tiles, n_sequences, sequences_per_member,
    TILE: tl.constexpr, CHANNELS: tl.constexpr, DOTS: tl.constexpr,
):  # fmt: skip
    n_blocks = tl.cdiv(width, CHANNELS)
    sequence = (tl.program_id(0) // n_blocks).to(tl.int64)
    block = tl.program_id(0) % n_blocks
    channel_C = block * CHANNELS + tl.arange(0, CHANNELS)
    inside_C = channel_C < width
    rate_ptr += sequence // sequences_per_member * n_states * width + channel_C
    drate_ptr += sequence * n_states * width + channel_C
    dstate_ptr += sequence * n_states * width + channel_C
    states_ptr += (sequence * (n_tiles + 1) + n_tiles) * n_states * width + channel_C
    read_ptr = sequence * n_states * n_tiles * TILE
    part_ptr = (block * n_sequences + sequence) * n_states * n_tiles * TILE
    row_L = tl.arange(0, TILE)
    ones = tl.full([CHANNELS, 16], 1.0, tl.float32)
    if DOTS == 2:
        ones = ones.to(tl.bfloat16)
    for back in range(n_tiles):
        states_ptr -= n_states.to(tl.int64) * width
        token_L = (n_tiles - 1 - back) * TILE + row_L
        place_LC = (sequence * n_tokens + token_L[:, None]) * width + channel_C[None, :]
        inside_LC = (token_L[:, None] < n_tokens) & inside_C[None, :]
        dt_LC = tl.load(dt_ptr + place_LC, mask=inside_LC, other=0.0).to(tl.float32)
        x_LC = tl.load(x_ptr + place_LC, mask=inside_LC, other=0.0).to(tl.float32)
        dy_LC = tl.load(dy_ptr + place_LC, mask=inside_LC, other=0.0).to(tl.float32)
        start_C = tl.load(states_ptr, mask=inside_C, other=0.0)
        after_C = tl.load(dstate_ptr, mask=inside_C, other=0.0)
        rate_C = tl.load(rate_ptr, mask=inside_C, other=0.0)
        sum_C = tl.load(drate_ptr, mask=inside_C, other=0.0)
        b_L = tl.load(b_ptr + read_ptr + token_L)
        c_L = tl.load(c_ptr + read_ptr + token_L)
        u_LC = dt_LC * x_LC
        du_LC = tl.zeros([TILE, CHANNELS], tl.float32)
        decayed_LC = tl.zeros([TILE, CHANNELS], tl.float32)
        for n in range(n_states):
            more = tl.minimum(n + 1, n_states - 1)
            next_start_C = tl.load(states_ptr + more * width, mask=inside_C, other=0.0)
            next_after_C = tl.load(dstate_ptr + more * width, mask=inside_C, other=0.0)
            next_rate_C = tl.load(rate_ptr + more * width, mask=inside_C, other=0.0)
            next_sum_C = tl.load(drate_ptr + more * width, mask=inside_C, other=0.0)
            next_b_L = tl.load(b_ptr + read_ptr + more * n_tiles * TILE + token_L)
            next_c_L = tl.load(c_ptr + read_ptr + more * n_tiles * TILE + token_L)
            b_L1, c_L1 = b_L.to(tl.float32)[:, None], c_L.to(tl.float32)[:, None]
            a_LC = tl.exp2(dt_LC * (rate_C * -LOG2_E)[None, :])
            written_LC = u_LC * b_L1
            enters_LC = tl.where(row_L[:, None] == 0, a_LC * start_C[None, :], 0.0)
            _, h_LC = tl.associative_scan((a_LC, written_LC + enters_LC), 0, then)
            leaves_LC = tl.where(row_L[:, None] == TILE - 1, after_C[None, :], 0.0)
            read_LC = tl.flip(dy_LC * c_L1 + leaves_LC, 0)
            a_late_LC = tl.flip(a_LC, 0)
            _, e_LC, g_LC, _ = tl.associative_scan(
                (a_late_LC, a_late_LC * read_LC, read_LC, tl.full([TILE, CHANNELS], 1.0, tl.float32)), 0, later_first
            )
            dh_LC = tl.flip(g_LC, 0)
            dlog_LC = dh_LC * (h_LC - written_LC)
            du_LC += dh_LC * b_L1
            decayed_LC += dlog_LC * rate_C[None, :]
            tl.store(drate_ptr + n * width, sum_C - tl.sum(dlog_LC * dt_LC, axis=0), mask=inside_C)
            tl.store(dstate_ptr + n * width, tl.sum(tl.where(row_L[:, None] == TILE - 1, e_LC, 0.0), axis=0), mask=inside_C)
            tl.store(db_ptr + part_ptr + n * n_tiles * TILE + token_L, _total(dh_LC * u_LC, ones, DOTS))
            tl.store(dc_ptr + part_ptr + n * n_tiles * TILE + token_L, _total(h_LC * dy_LC, ones, DOTS))
            start_C, after_C, rate_C, sum_C, b_L, c_L = next_start_C, next_after_C, next_rate_C, next_sum_C, next_b_L, next_c_L
        tl.store(dx_ptr + place_LC, (du_LC * dt_LC).to(dx_ptr.dtype.element_ty), mask=inside_LC)
        tl.store(ddt_ptr + place_LC, (du_LC * x_LC - decayed_LC).to(ddt_ptr.dtype.element_ty), mask=inside_LC)
        tl.debug_barrier()


@triton.jit(do_not_specialize=("n_tokens", "width", "n_states", "n_tiles", "sequences_per_member"))
def forward4(
    x_ptr, dt_ptr, rate_ptr, b_ptr, c_ptr, y_ptr, states_ptr,
    n_tokens, width, n_states, n_tiles, sequences_per_member,
    GROUP: tl.constexpr, TILE: tl.constexpr, CHANNELS: tl.constexpr, BORDERS: tl.constexpr,
):  # fmt: skip
    """GROUP state elements at a time, whose loads are all under way before the first is used."""
    n_blocks = tl.cdiv(width, CHANNELS)
    sequence = (tl.program_id(0) // n_blocks).to(tl.int64)
    channel_C = tl.program_id(0) % n_blocks * CHANNELS + tl.arange(0, CHANNELS)
    inside_C = channel_C < width
    rate_ptr += sequence // sequences_per_member * n_states * width + channel_C
    states_ptr += sequence * (n_tiles + 1 if BORDERS else 1) * n_states * width + channel_C
    step = n_states.to(tl.int64) * width if BORDERS else 0
    row_L = tl.arange(0, TILE)
    for tile in range(n_tiles):
        token_L = tile * TILE + row_L
        place_LC = (sequence * n_tokens + token_L[:, None]) * width + channel_C[None, :]
        inside_LC = (token_L[:, None] < n_tokens) & inside_C[None, :]
        dt_LC = tl.load(dt_ptr + place_LC, mask=inside_LC, other=0.0).to(tl.float32)
        u_LC = dt_LC * tl.load(x_ptr + place_LC, mask=inside_LC, other=0.0).to(tl.float32)
        y_LC = tl.zeros([TILE, CHANNELS], tl.float32)
        for first in range(0, n_states, GROUP):
            given = ()
            for j in tl.static_range(GROUP):
                n = first + j
                there_C = inside_C & (n < n_states)
                start_C = tl.load(states_ptr + n * width, mask=there_C, other=0.0)
                rate_C = tl.load(rate_ptr + n * width, mask=there_C, other=0.0)
                offset_L = (sequence * n_states + n) * n_tiles * TILE + token_L
                b_L = tl.load(b_ptr + offset_L, mask=n < n_states, other=0.0)
                c_L = tl.load(c_ptr + offset_L, mask=n < n_states, other=0.0)
                given += ((start_C, rate_C, b_L, c_L),)
            ends = ()
            for j in tl.static_range(GROUP):
                start_C, rate_C, b_L, c_L = given[j]
                a_LC = tl.exp2(dt_LC * (rate_C * -LOG2_E)[None, :])
                enters_LC = tl.where(row_L[:, None] == 0, a_LC * start_C[None, :], 0.0)
                _, h_LC = tl.associative_scan((a_LC, u_LC * b_L[:, None] + enters_LC), 0, then)
                y_LC += h_LC * c_L[:, None]
                ends += (tl.sum(tl.where(row_L[:, None] == TILE - 1, h_LC, 0.0), axis=0),)
            for j in tl.static_range(GROUP):
                tl.store(states_ptr + step + (first + j) * width, ends[j], mask=inside_C & (first + j < n_states))
        tl.store(y_ptr + place_LC, y_LC.to(y_ptr.dtype.element_ty), mask=inside_LC)
        states_ptr += step
        tl.debug_barrier()
