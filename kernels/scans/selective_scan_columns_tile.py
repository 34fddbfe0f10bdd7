"""What `selective_scan_columns` does with a tile: layouts, ways in and out of memory, slots, products that sum over channels.

Shape legend: L tokens of a tile, N = 8 or 16 states, R = 16 rows of a product, C = 32 channels of a program.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

LOG2_E = gl.constexpr(1.4426950408889634)
ROWS = gl.constexpr(16)
C = gl.constexpr(32)


@gluon.constexpr_function
def columns_layout(n_states):
    """[N, C]: a thread has all states of a channel."""
    return gl.BlockedLayout([n_states, 1], [1, 32], [1, 1], [0, 1])


@gluon.constexpr_function
def tile_layout(tokens):
    """[L, C]: a thread has all tokens of a channel."""
    return gl.BlockedLayout([tokens, 1], [1, 32], [1, 1], [0, 1])


@gluon.constexpr_function
def rows_layout(n_states):
    """[L, N] as they come from memory."""
    return gl.BlockedLayout([1, n_states // 4], [8, 4], [1, 1], [1, 0])


@gluon.constexpr_function
def sums_layout():
    """Sums [R, L] over channels, and through it their operands."""
    return gl.NVMMADistributedLayout([2, 0], [1, 1], [16, 8])


@gluon.jit
def unstacked(x_LC, L: gl.constexpr, N: gl.constexpr):
    """The rows [C] of [L, C]; only names registers."""
    if L == 1:
        return (gl.convert_layout(x_LC.reshape([C]), gl.SliceLayout(0, columns_layout(N)), assert_trivial=True),)
    else:
        even, odd = gl.split(x_LC.reshape([L // 2, 2, C]).permute([0, 2, 1]))
        evens, odds = unstacked(even, L // 2, N), unstacked(odd, L // 2, N)
        rows = (evens[0], odds[0])
        for n in gl.static_range(1, L // 2):
            rows = rows + (evens[n], odds[n])
        return rows


@gluon.jit
def stacked(rows, L: gl.constexpr):
    """[L, C] of rows [C]; only names registers."""
    if L == 1:
        return rows[0].reshape([1, C])
    else:
        evens, odds = (rows[0],), (rows[1],)
        for n in gl.static_range(1, L // 2):
            evens, odds = evens + (rows[2 * n],), odds + (rows[2 * n + 1],)
        both = gl.join(stacked(evens, L // 2), stacked(odds, L // 2))
        return both.permute([0, 2, 1]).reshape([L, C])


@gluon.jit
def buffers(N: gl.constexpr, L: gl.constexpr):
    """Shared memory: b, c, dt x and dy of a tile, and slots for its states and their gradients."""
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    cube: gl.constexpr = gl.SwizzledSharedLayout(8, 4, 2, [1, 0])
    b, c = gl.allocate_shared_memory(gl.float32, [L, N], flat), gl.allocate_shared_memory(gl.float32, [L, N], flat)
    u_weight, dy_weight = gl.allocate_shared_memory(gl.bfloat16, [L, C], flat), gl.allocate_shared_memory(gl.bfloat16, [L, C], flat)
    h_slots, dh_slots = (), ()
    for _ in gl.static_range(L // (ROWS // N)):  # apart, as the compiler puts a barrier between stores into one buffer
        h_slots = h_slots + (gl.allocate_shared_memory(gl.bfloat16, [C, ROWS], cube),)
        dh_slots = dh_slots + (gl.allocate_shared_memory(gl.bfloat16, [C, ROWS], cube),)
    return b, c, u_weight, dy_weight, h_slots, dh_slots


@gluon.jit
def put(slot, first_NC, second_NC, N: gl.constexpr):
    """States of a token, or of two neighbours one after the other, into a slot [C, R]."""
    if N == ROWS:
        slot.store(first_NC.to(gl.bfloat16).permute([1, 0]))
    else:
        both = gl.join(first_NC.to(gl.bfloat16), second_NC.to(gl.bfloat16))
        slot.store(both.permute([1, 2, 0]).reshape([C, ROWS]))


@gluon.jit
def over_channels(sums_RL, slot, weight_CL, at: gl.constexpr, TOKENS: gl.constexpr):
    """Sums whose column t is the sum over c of slot[c, r] weight[c, t], in the columns of that slot's tokens."""
    S: gl.constexpr = sums_layout()
    column = gl.arange(0, sums_RL.shape[1], gl.SliceLayout(0, S))[None, :]
    left_RC = slot.permute([1, 0]).load(gl.DotOperandLayout(0, S, 2))
    none_RL = gl.zeros([sums_RL.shape[0], sums_RL.shape[1]], gl.float32, S)
    return gl.where(column // TOKENS == at, mma_v2(left_RC, weight_CL, none_RL), sums_RL)


@gluon.jit
def row_of(buffer, t: gl.constexpr, N: gl.constexpr):
    """Token t of [L, N] in shared memory, [N, 1], which all lanes read at once."""
    return buffer.permute([1, 0]).slice(t, 1, 1).load(columns_layout(N))


@gluon.jit
def ask(ptr):
    """Asks the cache of this SM for the lines at these addresses, which costs no registers."""
    gl.inline_asm_elementwise("prefetch.global.L1 [$1]; mov.u32 $0, 0;", "=r,l", [ptr], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def ask_tile(
    dt_ptr, x_ptr, dy_ptr, b_ptr, c_ptr, states_ptr, token, state, start, lane, row_stride,
    WIDTH: gl.constexpr, N: gl.constexpr, EACH: gl.constexpr, L: gl.constexpr,
):  # fmt: skip
    """Asks for all that a tile needs."""
    all_states: gl.constexpr = N * WIDTH
    ask(dt_ptr + ((token + lane % L) * WIDTH + start))
    ask(x_ptr + ((token + lane % L) * WIDTH + start))
    ask(dy_ptr + ((token + lane % L) * WIDTH + start))
    for part in gl.static_range(L // EACH):
        ask(states_ptr + ((state + part) * all_states + (start + lane) * N))
    ask(b_ptr + (token + lane % L) * row_stride)
    ask(c_ptr + (token + lane % L) * row_stride)


@gluon.jit
def tile_of(ptrs, at_LC):
    """A tile in fp32."""
    return gl.load(ptrs + at_LC).to(gl.float32)


@gluon.jit
def borders_of(states_ptrs, n_N1, ALL_STATES: gl.constexpr, PARTS: gl.constexpr):
    """The states before each part of a tile."""
    borders = ()
    for part in gl.static_range(PARTS):
        borders = borders + (gl.load(states_ptrs + (n_N1 + part * ALL_STATES)).to(gl.float32),)
    return borders


@gluon.jit
def store_sums(ptrs, sums_RL, row_R1, column_1L, N: gl.constexpr):
    """Of each token the rows that are its own."""
    sums_RL = sums_RL.to(ptrs.dtype.element_ty)
    if N == ROWS:
        gl.store(ptrs, sums_RL)
    else:
        gl.store(ptrs, sums_RL, mask=row_R1 // N == column_1L % (ROWS // N))


@gluon.jit
def store_or_add(ptrs, x, ADD: gl.constexpr):
    """In place of what lies there, or added to it."""
    if ADD:
        x += gl.load(ptrs).to(gl.float32)
    gl.store(ptrs, x.to(ptrs.dtype.element_ty))


@gluon.jit
def slope_of_softplus(dt):
    """1 - exp(-dt), the derivative of a softplus where that is dt; small ones without a difference of ones."""
    return gl.where(dt < 0.01, dt - 0.5 * dt * dt, 1.0 - gl.exp2(dt * -LOG2_E))
