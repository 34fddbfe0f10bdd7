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


@entry(do_not_specialize=["n_tokens", "n_tiles", "n_sequences", "sequences_per_member"], gluon=True)
def columns_backward(  # noqa: PLR0915 - one loop, whose values live in registers
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
    slots, factor_slots = (), ()
    for t in gl.static_range(L):
        slots = slots + (gl.allocate_shared_memory(gl.bfloat16, [C, STATES], cube),)
    for t in gl.static_range(STORED):
        factor_slots = factor_slots + (gl.allocate_shared_memory(gl.float32, [STATES, C], quads),)
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
    states_ptrs = states_ptr + ((sequence * (n_tiles + 1) + n_tiles - 1) * all_states + channel_1C * STATES)
    b_ptrs, c_ptrs = (b_ptr + ((sequence * n_tokens + first) * STATES + at_LN), c_ptr + ((sequence * n_tokens + first) * STATES + at_LN))
    db_ptrs = db_ptr + (((block * n_sequences + sequence) * n_tokens + first) * STATES + out_NL)
    dc_ptrs = dc_ptr + (((block * n_sequences + sequence) * n_tokens + first) * STATES + out_NL)
    left = 64 if EVEN else n_tokens - first
    inside_LC = (token_L1 < left) & (start + lane_1 < (start + 64 if whole else WIDTH))
    inside_LN = (row_L1 < left) & (n_1N >= 0)
    if AHEAD:
        next_dt_LC, next_x_LC = tile_of(dt_ptrs, token_L1 * WIDTH, inside_LC), tile_of(x_ptrs, token_L1 * WIDTH, inside_LC)
        next_dy_LC = tile_of(dy_ptrs, token_L1 * WIDTH, inside_LC)
        next_h_NC = tile_of(states_ptrs, n_N1, inside_NC)
        next_b_LN, next_c_LN = tile_of(b_ptrs, 0, inside_LN), tile_of(c_ptrs, 0, inside_LN)
    for back in range(n_tiles):
        left = 64 if EVEN else n_tokens - first
        inside_LC = (token_L1 < left) & (start + lane_1 < (start + 64 if whole else WIDTH))
        inside_LN = (row_L1 < left) & (n_1N >= 0)
        if AHEAD:
            dt_LC, x_LC, dy_LC = next_dt_LC, next_x_LC.to(gl.float32), next_dy_LC.to(gl.float32)
            h_NC = next_h_NC.to(gl.float32)
            b.store(next_b_LN.to(gl.float32))
            c.store(next_c_LN.to(gl.float32))
            step = gl.where(back < n_tiles - 1, L, 0)  # in the last turn loads that nobody uses
            x_ptrs, dt_ptrs, dy_ptrs = x_ptrs - step * WIDTH, dt_ptrs - step * WIDTH, dy_ptrs - step * WIDTH
            b_ptrs, c_ptrs, states_ptrs = b_ptrs - step * STATES, c_ptrs - step * STATES, states_ptrs - step // L * all_states
            next_LC = (token_L1 < left + step) & (start + lane_1 < (start + 64 if whole else WIDTH))
            next_LN = (row_L1 < left + step) & (n_1N >= 0)
            next_dt_LC, next_x_LC = tile_of(dt_ptrs, token_L1 * WIDTH, next_LC), tile_of(x_ptrs, token_L1 * WIDTH, next_LC)
            next_dy_LC = tile_of(dy_ptrs, token_L1 * WIDTH, next_LC)
            next_h_NC = tile_of(states_ptrs, n_N1, inside_NC)
            next_b_LN, next_c_LN = tile_of(b_ptrs, 0, next_LN), tile_of(c_ptrs, 0, next_LN)
        else:
            dt_LC = tile_of(dt_ptrs, token_L1 * WIDTH, inside_LC)
            x_LC = tile_of(x_ptrs, token_L1 * WIDTH, inside_LC).to(gl.float32)
            dy_LC = tile_of(dy_ptrs, token_L1 * WIDTH, inside_LC).to(gl.float32)
            h_NC = tile_of(states_ptrs, n_N1, inside_NC).to(gl.float32)
            b.store(tile_of(b_ptrs, 0, inside_LN).to(gl.float32))
            c.store(tile_of(c_ptrs, 0, inside_LN).to(gl.float32))
        if ASK:
            lane = gl.arange(0, 32, gl.BlockedLayout([1], [32], [1], [0]))
            ahead = gl.where(back < n_tiles - 1, L, 0)
            row = (sequence * n_tokens + first - ahead + lane % L) * WIDTH + start
            ask(dt_ptr + row)
            ask(x_ptr + row)
            ask(dy_ptr + row)
            ask(states_ptr + ((sequence * (n_tiles + 1) + n_tiles - 1 - back - ahead // L) * all_states + (start + lane) * STATES))
        u_LC = dt_LC * x_LC
        u_weight.store(u_LC.to(gl.bfloat16))
        dy_weight.store(dy_LC.to(gl.bfloat16))
        dt, u, dy = unstacked(dt_LC, L), unstacked(u_LC, L), unstacked(dy_LC, L)
        again = unstacked(dt_LC * one, L)  # the compiler does not know that it is the same
        kept = ()
        border_NC = h_NC
        for t in gl.static_range(L):
            factor_NC = slope_NC * dt[t][None, :] if OMIT == 1 else gl.exp2(slope_NC * dt[t][None, :])
            if t >= L - KEPT:
                kept = kept + (factor_NC,)
            if t < STORED:
                factor_slots[t].store(factor_NC)
            h_NC = gl.fma(h_NC, factor_NC, u[t][None, :] * b.permute([1, 0]).slice(t, 1, 1).load(NC))
            slots[t].store(h_NC.to(gl.bfloat16).permute([1, 0]))
        dc_NL, db_NL = gl.zeros([STATES, L], gl.float32, S), gl.zeros([STATES, L], gl.float32, S)
        dy_CL = dy_weight.permute([1, 0]).load(gl.DotOperandLayout(1, S, 2))
        for t in gl.static_range(1 if OMIT == 2 else L):
            dc_NL = over_channels(dc_NL, slots[t], dy_CL, t)
        du, decayed = (), ()
        for t in gl.static_range(L - 1, -1, -1):
            if t >= L - KEPT:
                factor_NC = kept[t - L + KEPT]
            elif t < STORED:
                factor_NC = factor_slots[t].load(NC)
            else:
                factor_NC = slope_NC * again[t][None, :] if OMIT == 1 else gl.exp2(slope_NC * again[t][None, :])
            if t > 0:
                before_NC = widened(slots[t - 1])
            else:
                before_NC = border_NC
            dh_NC = e_NC + dy[t][None, :] * c.permute([1, 0]).slice(t, 1, 1).load(NC)
            e_NC = factor_NC * dh_NC
            dlog_NC = e_NC * before_NC
            drate_NC += dlog_NC * dt[t][None, :]
            du = (gl.sum(dh_NC * b.permute([1, 0]).slice(t, 1, 1).load(NC), 0),) + du
            decayed = (gl.sum(dlog_NC * slope_NC, 0),) + decayed
            slots[t].store(dh_NC.to(gl.bfloat16).permute([1, 0]))
        u_CL = u_weight.permute([1, 0]).load(gl.DotOperandLayout(1, S, 2))
        for t in gl.static_range(1 if OMIT == 2 else L):
            db_NL = over_channels(db_NL, slots[t], u_CL, t)
        inside_NL = (out_1L < left) & (out_N1 >= 0)
        gl.store(db_ptrs, db_NL.to(db_ptr.dtype.element_ty), mask=inside_NL)
        gl.store(dc_ptrs, dc_NL.to(dc_ptr.dtype.element_ty), mask=inside_NL)
        du_LC, decayed_LC = gl.convert_layout(stacked(du, L), LC, assert_trivial=True), gl.convert_layout(stacked(decayed, L), LC, assert_trivial=True)
        gl.store(dx_ptrs + token_L1 * WIDTH, (du_LC * dt_LC).to(dx_ptr.dtype.element_ty), mask=inside_LC)
        ddt_LC = du_LC * x_LC + decayed_LC * (1.0 / LOG2_E)
        gl.store(ddt_ptrs + token_L1 * WIDTH, ddt_LC.to(ddt_ptr.dtype.element_ty), mask=inside_LC)
        if not AHEAD:
            states_ptrs -= gl.where(back < n_tiles - 1, all_states, 0)
            x_ptrs, dt_ptrs, dy_ptrs = x_ptrs - L * WIDTH, dt_ptrs - L * WIDTH, dy_ptrs - L * WIDTH
            b_ptrs, c_ptrs = b_ptrs - L * STATES, c_ptrs - L * STATES
        dx_ptrs, ddt_ptrs = dx_ptrs - L * WIDTH, ddt_ptrs - L * WIDTH
        db_ptrs, dc_ptrs = db_ptrs - L * STATES, dc_ptrs - L * STATES
        first -= L
    gl.store(drate_ptr + (sequence * all_states + at_NC + channel_1C), -drate_NC, mask=inside_NC)
    gl.store(dstart_ptr + (sequence * all_states + turned_NC), e_NC, mask=inside_NC)
