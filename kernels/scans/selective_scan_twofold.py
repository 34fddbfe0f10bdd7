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
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from kernels._entry import entry

LOG2_E = gl.constexpr(1.4426950408889634)
STATES = gl.constexpr(16)
C = gl.constexpr(32)


@gluon.constexpr_function
def columns_layout():
    """[N, C]: a thread has all states of a channel."""
    return gl.BlockedLayout([16, 1], [1, 32], [1, 1], [0, 1])


@gluon.constexpr_function
def tile_layout(tokens):
    """[L, C]: a thread has all tokens of a channel."""
    return gl.BlockedLayout([tokens, 1], [1, 32], [1, 1], [0, 1])


@gluon.constexpr_function
def rows_layout(beside):
    """[L, N] as they come from memory."""
    return gl.BlockedLayout([1, beside], [32 * beside // 16, 16 // beside], [1, 1], [1, 0])


@gluon.constexpr_function
def sums_layout():
    return gl.NVMMADistributedLayout([2, 0], [1, 1], [16, 8])


@gluon.jit
def unstacked(x, L: gl.constexpr):
    """The rows [C] of [L, C]; only names registers."""
    if L == 1:
        return (gl.convert_layout(x.reshape([C]), gl.SliceLayout(0, columns_layout()), assert_trivial=True),)
    else:
        even, odd = gl.split(x.reshape([L // 2, 2, C]).permute([0, 2, 1]))
        evens, odds = unstacked(even, L // 2), unstacked(odd, L // 2)
        rows = (evens[0], odds[0])
        for n in gl.static_range(1, L // 2):
            rows = rows + (evens[n], odds[n])
        return rows


@gluon.jit
def stacked(rows, L: gl.constexpr):
    """[L, C] of rows [C]."""
    if L == 1:
        return rows[0].reshape([1, C])
    else:
        evens, odds = (rows[0],), (rows[1],)
        for n in gl.static_range(1, L // 2):
            evens, odds = evens + (rows[2 * n],), odds + (rows[2 * n + 1],)
        both = gl.join(stacked(evens, L // 2), stacked(odds, L // 2))
        return both.permute([0, 2, 1]).reshape([L, C])


@gluon.jit
def widened(slot):
    """States [N, C] in fp32 of [C, N] in bf16 in shared memory, taken apart from pairs in registers of 32 bits."""
    pairs: gl.constexpr = gl.BlockedLayout([8, 1], [1, 32], [1, 1], [0, 1])
    words = slot._reinterpret(gl.int32, [C, 8], gl.SwizzledSharedLayout(4, 4, 2, [1, 0])).permute([1, 0]).load(pairs)
    low, high = (words << 16).to(gl.float32, bitcast=True), (words & -65536).to(gl.float32, bitcast=True)
    both = gl.join(low, high).permute([0, 2, 1]).reshape([STATES, C])
    return gl.convert_layout(both, columns_layout(), assert_trivial=True)


@gluon.jit
def tile_of(ptr, at_LC, inside_LC):
    return gl.load(ptr + at_LC, mask=inside_LC, other=0.0)


@gluon.jit
def over_channels(sums_NL, slot, weight_CL, t: gl.constexpr):
    """Sums whose column t is the sum over c of slot[c, n] weight[c, t]."""
    S: gl.constexpr = sums_layout()
    column = gl.arange(0, sums_NL.shape[1], gl.SliceLayout(0, S))[None, :]
    left_NC = slot.permute([1, 0]).load(gl.DotOperandLayout(0, S, 2))
    none_NL = gl.zeros([sums_NL.shape[0], sums_NL.shape[1]], gl.float32, S)
    return gl.where(column == t, mma_v2(left_NC, weight_CL, none_NL), sums_NL)


@gluon.jit
def ask(ptr):
    return gl.inline_asm_elementwise("prefetch.global.L1 [$1]; mov.u32 $0, 0;", "=r,l", [ptr], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def asked_for(dt_ptr, x_ptr, dy_ptr, states_ptr, b_ptr, c_ptr, L: gl.constexpr, WIDTH: gl.constexpr):
    """Asks the cache of this SM for a tile."""
    lane = gl.arange(0, 32, gl.BlockedLayout([1], [32], [1], [0]))
    ask(dt_ptr + lane % L * WIDTH)
    ask(x_ptr + lane % L * WIDTH)
    ask(dy_ptr + lane % L * WIDTH)
    ask(states_ptr + lane * STATES)
    ask(b_ptr + lane % (L // 2) * 32)
    ask(c_ptr + lane % (L // 2) * 32)


@gluon.jit
def half(
    slope_NC, e_NC, drate_NC, dt_LC, x_LC, dy_LC, next_dt_LC, next_x_LC, next_dy_LC, h_NC, one,
    slots, next_slots, factor_slots, next_factor_slots, b, c, next_b, u_weight, next_dy_weight,
    L: gl.constexpr, STORED: gl.constexpr,
):  # fmt: skip
    """Walks back through a tile and at the same time forward through the one before it."""
    NC: gl.constexpr = columns_layout()
    LC: gl.constexpr = tile_layout(L)
    S: gl.constexpr = sums_layout()
    dt, again, dy = unstacked(dt_LC, L), unstacked(dt_LC * one, L), unstacked(dy_LC, L)
    next_dt, next_u = unstacked(next_dt_LC, L), unstacked(next_dt_LC * next_x_LC, L)
    next_slots[L].store(h_NC.to(gl.bfloat16).permute([1, 0]))
    du, decayed = (), ()
    for t in gl.static_range(L - 1, -1, -1):
        if t < STORED:
            factor_NC = factor_slots[t].load(NC)
        else:
            factor_NC = gl.exp2(slope_NC * again[t][None, :])
        before_NC = widened(slots[t - 1 if t > 0 else L])
        dh_NC = e_NC + dy[t][None, :] * c.permute([1, 0]).slice(t, 1, 1).load(NC)
        next_factor_NC = gl.exp2(slope_NC * next_dt[L - 1 - t][None, :])
        if L - 1 - t < STORED:
            next_factor_slots[L - 1 - t].store(next_factor_NC)
        e_NC = factor_NC * dh_NC
        h_NC = gl.fma(h_NC, next_factor_NC, next_u[L - 1 - t][None, :] * next_b.permute([1, 0]).slice(L - 1 - t, 1, 1).load(NC))
        next_slots[L - 1 - t].store(h_NC.to(gl.bfloat16).permute([1, 0]))
        dlog_NC = e_NC * before_NC
        drate_NC += dlog_NC * dt[t][None, :]
        du = (gl.sum(dh_NC * b.permute([1, 0]).slice(t, 1, 1).load(NC), 0),) + du
        decayed = (gl.sum(dlog_NC * slope_NC, 0),) + decayed
        slots[t].store(dh_NC.to(gl.bfloat16).permute([1, 0]))
    dc_NL, db_NL = gl.zeros([STATES, L], gl.float32, S), gl.zeros([STATES, L], gl.float32, S)
    u_CL = u_weight.permute([1, 0]).load(gl.DotOperandLayout(1, S, 2))
    dy_CL = next_dy_weight.permute([1, 0]).load(gl.DotOperandLayout(1, S, 2))
    for t in gl.static_range(L):
        db_NL, dc_NL = over_channels(db_NL, slots[t], u_CL, t), over_channels(dc_NL, next_slots[t], dy_CL, t)
    du_LC = gl.convert_layout(stacked(du, L), LC, assert_trivial=True)
    decayed_LC = gl.convert_layout(stacked(decayed, L), LC, assert_trivial=True)
    return e_NC, drate_NC, du_LC, decayed_LC, db_NL, dc_NL


@entry(do_not_specialize=["n_tokens", "n_tiles", "n_sequences", "sequences_per_member"], gluon=True)
def twofold_backward(  # noqa: PLR0915 - one loop, whose values live in registers
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
    b, other_b = gl.allocate_shared_memory(gl.float32, [L, STATES], flat), gl.allocate_shared_memory(gl.float32, [L, STATES], flat)
    c, other_c = gl.allocate_shared_memory(gl.float32, [L, STATES], flat), gl.allocate_shared_memory(gl.float32, [L, STATES], flat)
    u_weight, other_u_weight = gl.allocate_shared_memory(gl.bfloat16, [L, C], flat), gl.allocate_shared_memory(gl.bfloat16, [L, C], flat)
    dy_weight = gl.allocate_shared_memory(gl.bfloat16, [L, C], flat)
    slots, factor_slots, other_slots, other_factor_slots = (), (), (), ()
    for t in gl.static_range(L + 1):
        slots = slots + (gl.allocate_shared_memory(gl.bfloat16, [C, STATES], cube),)
        other_slots = other_slots + (gl.allocate_shared_memory(gl.bfloat16, [C, STATES], cube),)
    for t in gl.static_range(STORED):
        factor_slots = factor_slots + (gl.allocate_shared_memory(gl.float32, [STATES, C], quads),)
        other_factor_slots = other_factor_slots + (gl.allocate_shared_memory(gl.float32, [STATES, C], quads),)
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
    ask_place = gl.maximum(place - L * WIDTH, sequence * n_tokens * WIDTH + start)
    ask_states = (sequence * (n_tiles + 1) + gl.maximum(n_tiles - 2, 0)) * all_states + start * STATES
    ask_row = (sequence * n_tokens + gl.maximum(first - L, 0)) * STATES
    states_ptrs = states_ptr + ((sequence * (n_tiles + 1) + n_tiles - 1) * all_states + channel_1C * STATES)
    b_ptrs, c_ptrs = (b_ptr + ((sequence * n_tokens + first) * STATES + at_LN), c_ptr + ((sequence * n_tokens + first) * STATES + at_LN))
    db_ptrs = db_ptr + (((block * n_sequences + sequence) * n_tokens + first) * STATES + out_NL)
    dc_ptrs = dc_ptr + (((block * n_sequences + sequence) * n_tokens + first) * STATES + out_NL)
    h_NC = tile_of(states_ptrs, n_N1, inside_NC).to(gl.float32)
    left = 64 if EVEN else n_tokens - first
    inside_LC = (token_L1 < left) & (start + lane_1 < (start + 64 if whole else WIDTH))
    inside_LN = (row_L1 < left) & (n_1N >= 0)
    dt_LC = tile_of(dt_ptrs, token_L1 * WIDTH, inside_LC)
    x_LC = tile_of(x_ptrs, token_L1 * WIDTH, inside_LC).to(gl.float32)
    dy_LC = tile_of(dy_ptrs, token_L1 * WIDTH, inside_LC).to(gl.float32)
    b.store(tile_of(b_ptrs, 0, inside_LN).to(gl.float32))
    c.store(tile_of(c_ptrs, 0, inside_LN).to(gl.float32))
    u_weight.store((dt_LC * x_LC).to(gl.bfloat16))
    dy_weight.store(dy_LC.to(gl.bfloat16))
    dt, u = unstacked(dt_LC, L), unstacked(dt_LC * x_LC, L)
    slots[L].store(h_NC.to(gl.bfloat16).permute([1, 0]))
    for t in gl.static_range(L):
        factor_NC = gl.exp2(slope_NC * dt[t][None, :])
        if t < STORED:
            factor_slots[t].store(factor_NC)
        h_NC = gl.fma(h_NC, factor_NC, u[t][None, :] * b.permute([1, 0]).slice(t, 1, 1).load(NC))
        slots[t].store(h_NC.to(gl.bfloat16).permute([1, 0]))
    dc_NL = gl.zeros([STATES, L], gl.float32, S)
    dy_CL = dy_weight.permute([1, 0]).load(gl.DotOperandLayout(1, S, 2))
    for t in gl.static_range(L):
        dc_NL = over_channels(dc_NL, slots[t], dy_CL, t)
    gl.store(dc_ptrs, dc_NL.to(dc_ptr.dtype.element_ty), mask=(out_1L < left) & (out_N1 >= 0))
    for back in range(n_tiles // 2):
        for which in gl.static_range(2):
            if which == 0:
                own, following = (slots, factor_slots, b, c, u_weight), (other_slots, other_factor_slots, other_b, other_c, other_u_weight)
            else:
                own, following = (other_slots, other_factor_slots, other_b, other_c, other_u_weight), (slots, factor_slots, b, c, u_weight)
            # behind the first tile the first one again, of which nobody uses what is made
            more = which == 0 or back < n_tiles // 2 - 1
            step = L if which == 0 else gl.where(back < n_tiles // 2 - 1, L, 0)
            x_ptrs, dt_ptrs, dy_ptrs = x_ptrs - step * WIDTH, dt_ptrs - step * WIDTH, dy_ptrs - step * WIDTH
            b_ptrs, c_ptrs, states_ptrs = b_ptrs - step * STATES, c_ptrs - step * STATES, states_ptrs - step // L * all_states
            left = 64 if EVEN else n_tokens - first
            inside_LC = (token_L1 < left) & (start + lane_1 < (start + 64 if whole else WIDTH))
            next_LC = (token_L1 < left + step) & (start + lane_1 < (start + 64 if whole else WIDTH))
            next_LN = (row_L1 < left + step) & (n_1N >= 0)
            next_dt_LC = tile_of(dt_ptrs, token_L1 * WIDTH, next_LC)
            next_x_LC = tile_of(x_ptrs, token_L1 * WIDTH, next_LC).to(gl.float32)
            next_dy_LC = tile_of(dy_ptrs, token_L1 * WIDTH, next_LC).to(gl.float32)
            h_NC = tile_of(states_ptrs, n_N1, inside_NC).to(gl.float32)
            following[2].store(tile_of(b_ptrs, 0, next_LN).to(gl.float32))
            following[3].store(tile_of(c_ptrs, 0, next_LN).to(gl.float32))
            if ASK:
                back_to = gl.where(back < n_tiles // 2 - 1, L, 0)
                ask_place, ask_row, ask_states = ask_place - back_to * WIDTH, ask_row - back_to * STATES, ask_states - back_to // L * all_states
                asked_for(dt_ptr + ask_place, x_ptr + ask_place, dy_ptr + ask_place, states_ptr + ask_states, b_ptr + ask_row, c_ptr + ask_row, L, WIDTH)
            following[4].store((next_dt_LC * next_x_LC).to(gl.bfloat16))
            dy_weight.store(next_dy_LC.to(gl.bfloat16))
            e_NC, drate_NC, du_LC, decayed_LC, db_NL, dc_NL = half(
                slope_NC, e_NC, drate_NC, dt_LC, x_LC, dy_LC, next_dt_LC, next_x_LC, next_dy_LC, h_NC, one,
                own[0], following[0], own[1], following[1], own[2], own[3], following[2], own[4], dy_weight, L, STORED,
            )  # fmt: skip
            gl.store(db_ptrs, db_NL.to(db_ptr.dtype.element_ty), mask=(out_1L < left) & (out_N1 >= 0))
            db_ptrs, dc_ptrs = db_ptrs - L * STATES, dc_ptrs - L * STATES
            gl.store(dc_ptrs, dc_NL.to(dc_ptr.dtype.element_ty), mask=(out_1L < left + step) & (out_N1 >= 0) & more)
            gl.store(dx_ptrs + token_L1 * WIDTH, (du_LC * dt_LC).to(dx_ptr.dtype.element_ty), mask=inside_LC)
            ddt_LC = du_LC * x_LC + decayed_LC * (1.0 / LOG2_E)
            gl.store(ddt_ptrs + token_L1 * WIDTH, ddt_LC.to(ddt_ptr.dtype.element_ty), mask=inside_LC)
            dx_ptrs, ddt_ptrs = dx_ptrs - L * WIDTH, ddt_ptrs - L * WIDTH
            first -= L
            dt_LC, x_LC, dy_LC = next_dt_LC, next_x_LC, next_dy_LC
    gl.store(drate_ptr + (sequence * all_states + at_NC + channel_1C), -drate_NC, mask=inside_NC)
    gl.store(dstart_ptr + (sequence * all_states + turned_NC), e_NC, mask=inside_NC)
