"""What a segment of a long sequence does to a state, for Hopper: where heads are few, segments of a sequence run at once.

A segment takes the state S that enters it to R S + C, and the gradient of the state that leaves it to that of the one that
enters in the same form. A program walks over a segment with some columns of the state: from zero for C, and from columns of
the identity, with values (or gradients of outputs) of zero, for R. Then `combine_kernel` goes through the segments.

Segments are counted in the order of the walk: the first starts with the state given, or zero, and needs no R; what the last
leaves is left to the walk proper. `ends` is [B * H, segments - 1, K, columns of C and then of R] in fp32.

Shape legend: B batch, T time, H heads, N chunks, C = 64 tokens of a chunk, K key, V value width.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from kernels.delta_hopper import SIZES, place, thread_barrier, turned_layout
from kernels.delta_hopper_beside import beside, beside_buffers, rows_buffers
from kernels.delta_hopper_walk import operand, start_errors, start_state, state_places, token_factors, whole_decay


@gluon.jit
def _start(given, head_index, order, e_start, K: gl.constexpr, V: gl.constexpr, BK: gl.constexpr, GIVEN: gl.constexpr):
    """The columns of a state with which a program starts, transposed: of the state given, of zero or of the identity."""
    VALUES: gl.constexpr = (V + 63) // 64 * 64
    wide: gl.constexpr = turned_layout(BK)
    e, d = e_start + gl.arange(0, 64, gl.SliceLayout(1, wide)), gl.arange(0, BK, gl.SliceLayout(0, wide))
    state_VK = gl.where(d[None, :] == e[:, None] - VALUES, 1.0, 0.0)
    if GIVEN:
        offsets, inside = state_places(e_start, V, K, BK)
        state_VK += gl.load(given + head_index.to(gl.int64) * K * V + offsets, mask=inside & (order == 0), other=0.0)
    return state_VK


@gluon.jit
def _store_end(ends, slot, state_VK, e_start, K: gl.constexpr, V: gl.constexpr, BK: gl.constexpr):
    WIDTH: gl.constexpr = ((V + 63) // 64 + (K + 63) // 64) * 64
    offsets, inside = state_places(e_start, WIDTH, K, BK)
    gl.store(ends + slot.to(gl.int64) * K * WIDTH + offsets, state_VK, mask=inside)


@gluon.jit
def _walk(
    steps, rows, made, handed, first, ends, head_index, order, slot, e_start,
    K: gl.constexpr, V: gl.constexpr, BK: gl.constexpr, C: gl.constexpr, STAGES: gl.constexpr, GATED: gl.constexpr,
    FIRST: gl.constexpr, DOT: gl.constexpr,
):  # fmt: skip
    """The partition that walks: `kernels.delta_hopper_walk` without outputs."""
    none_VC = gl.zeros([64, C], gl.float32, turned_layout(C))
    state_VK = _start(first, head_index, order, e_start, K, V, BK, FIRST)
    for step in range(steps):
        part, k_CK = step % 2, rows[0][0].index(step % STAGES)
        old_VK = operand(state_VK, C, DOT)
        mbarrier.wait(rows[2][0].index(step % STAGES), step // STAGES % 2)
        read = warpgroup_mma(old_VK, k_CK.permute([1, 0]), none_VC, use_acc=False, is_async=True)
        mbarrier.wait(rows[2][1].index(part), step // 2 % 2)
        value_VC = rows[1].index(part).permute([1, 0]).load(turned_layout(C)).to(gl.float32)
        mbarrier.wait(handed[0].index(part), step // 2 % 2)
        error = start_errors(warpgroup_mma_wait(0, [read]), value_VC, part, made, C, GATED, DOT)
        error_VC = warpgroup_mma_wait(0, [error])
        state, _ = start_state(error_VC, state_VK, k_CK, part, made, BK, C, GATED, DOT)
        state_VK = warpgroup_mma_wait(0, [state])
        thread_barrier()
        mbarrier.arrive(handed[1].index(part), count=1)
    _store_end(ends, slot, state_VK, e_start, K, V, BK)


@gluon.jit(do_not_specialize=SIZES)
def forward_carry_kernel(
    k, v, beta, gate, first, ends,
    gate_b: tl.int64, gate_t: tl.int64, gate_every: tl.int32,
    length: tl.int32, heads: tl.int32, group: tl.int32, segments: tl.int32, span: tl.int32,
    K: gl.constexpr, V: gl.constexpr, BK: gl.constexpr, C: gl.constexpr, STAGES: gl.constexpr,
    REGISTERS: gl.constexpr, GATED: gl.constexpr, FIRST: gl.constexpr, DOT: gl.constexpr, MERGE: gl.constexpr,
):  # fmt: skip
    """Grid: (B * H * (segments - 1) * tiles of 64 columns of C and of R,)."""
    TILES: gl.constexpr = (V + 63) // 64 + (K + 63) // 64
    slot, e_start, n_chunks = gl.program_id(0) // TILES, gl.program_id(0) % TILES * 64, (length + C - 1) // C
    head_index, order, n_first, n_last = place(slot, segments - 1, segments, span, n_chunks, False)
    batch, head = head_index // heads, head_index % heads
    beta += batch.to(gl.int64) * length * heads + head
    gate += (batch // gate_every) * gate_b + head
    rows = rows_buffers(1, BK, C, STAGES, 1, DOT)
    made, inner, handed = beside_buffers(C, 1, DOT, MERGE)
    gl.warp_specialize(
        [
            (_walk, (
                n_last - n_first + 1, rows, made, handed, first, ends, head_index, order, slot, e_start,
                K, V, BK, C, STAGES, GATED, FIRST, DOT,
            )),
            (beside, (
                (k, v), k, (beta, gate, gate), gate_t, (batch, head, head // group, e_start), (n_first, n_last), 0, rows, made,
                inner, handed, False, length, heads, BK, C, STAGES, 1, GATED, False, False, False, DOT, MERGE,
            )),
        ],
        [4],
        [REGISTERS],
    )  # fmt: skip


@gluon.jit
def _walk_back(
    steps, rows, made, handed, dlast, ends, head_index, order, slot, e_start,
    K: gl.constexpr, V: gl.constexpr, BK: gl.constexpr, C: gl.constexpr, STAGES: gl.constexpr, GATED: gl.constexpr,
    DLAST: gl.constexpr, DOT: gl.constexpr,
):  # fmt: skip
    """The partition that walks back with the gradient of a state: its chain is dS^T K^T, (beta dU)^T H, the next gradient."""
    none_VC = gl.zeros([64, C], gl.float32, turned_layout(C))
    dstate_VK = _start(dlast, head_index, order, e_start, K, V, BK, DLAST)
    for step in range(steps):
        part, q_CK, k_CK = step % 2, rows[0][0].index(step % STAGES), rows[0][1].index(step % STAGES)
        old_VK = operand(dstate_VK, C, DOT)
        mbarrier.wait(rows[2][0].index(step % STAGES), step // STAGES % 2)
        dwrite = warpgroup_mma(old_VK, k_CK.permute([1, 0]), none_VC, use_acc=False, is_async=True)
        mbarrier.wait(rows[2][1].index(part), step // 2 % 2)
        do_VC = rows[1].index(part).permute([1, 0]).load(turned_layout(C))
        mbarrier.wait(handed[0].index(part), step // 2 % 2)
        asked = warpgroup_mma(operand(do_VC, C, DOT), made[1].index(part), none_VC, use_acc=False, is_async=True)
        dwrite_VC, asked = warpgroup_mma_wait(1, [dwrite, asked])
        if GATED:
            dwrite_VC = dwrite_VC * token_factors(made[4].index(part), C)
        dwrite_VC += warpgroup_mma_wait(0, [asked])
        minus_C = -token_factors(made[2].index(part), C)
        y = warpgroup_mma(operand(dwrite_VC * minus_C, C, DOT), made[0].index(part), dwrite_VC, is_async=True)
        if GATED:
            dstate_VK = dstate_VK * whole_decay(made[5].index(part), BK)
            do_VC = do_VC.to(gl.float32) * token_factors(made[3].index(part), C)
        dstate = warpgroup_mma(operand(do_VC, C, DOT), q_CK, dstate_VK, is_async=True)
        y_VC, dstate = warpgroup_mma_wait(1, [y, dstate])
        y_VC = y_VC * minus_C
        if GATED:
            y_VC = y_VC * token_factors(made[3].index(part), C)
        dstate = warpgroup_mma(operand(y_VC, C, DOT), k_CK, dstate, is_async=True)
        dstate_VK = warpgroup_mma_wait(0, [dstate])
        thread_barrier()
        mbarrier.arrive(handed[1].index(part), count=1)
    _store_end(ends, slot, dstate_VK, e_start, K, V, BK)


@gluon.jit(do_not_specialize=SIZES)
def reverse_carry_kernel(
    q, k, do, beta, gate, dlast, ends,
    gate_b: tl.int64, gate_t: tl.int64, gate_every: tl.int32,
    length: tl.int32, heads: tl.int32, group: tl.int32, segments: tl.int32, span: tl.int32,
    K: gl.constexpr, V: gl.constexpr, BK: gl.constexpr, C: gl.constexpr, STAGES: gl.constexpr,
    REGISTERS: gl.constexpr, GATED: gl.constexpr, DLAST: gl.constexpr, DOT: gl.constexpr, MERGE: gl.constexpr,
):  # fmt: skip
    """Grid: (B * H * (segments - 1) * tiles of 64 columns of C and of R,)."""
    TILES: gl.constexpr = (V + 63) // 64 + (K + 63) // 64
    slot, e_start, n_chunks = gl.program_id(0) // TILES, gl.program_id(0) % TILES * 64, (length + C - 1) // C
    head_index, order, n_first, n_last = place(slot, segments - 1, segments, span, n_chunks, True)
    batch, head = head_index // heads, head_index % heads
    beta += batch.to(gl.int64) * length * heads + head
    gate += (batch // gate_every) * gate_b + head
    rows = rows_buffers(2, BK, C, STAGES, 1, DOT)
    made, inner, handed = beside_buffers(C, 1, DOT, MERGE)
    gl.warp_specialize(
        [
            (_walk_back, (
                n_last - n_first + 1, rows, made, handed, dlast, ends, head_index, order, slot, e_start,
                K, V, BK, C, STAGES, GATED, DLAST, DOT,
            )),
            (beside, (
                (q, k, do), k, (beta, gate, ends), gate_t, (batch, head, head // group, e_start), (n_first, n_last), 0, rows, made,
                inner, handed, False, length, heads, BK, C, STAGES, 1, GATED, True, True, False, DOT, MERGE,
            )),
        ],
        [4],
        [REGISTERS],
    )  # fmt: skip


@triton.jit(do_not_specialize=["segments"])
def combine_kernel(
    ends, first, states, segments: tl.int32,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, TILE: tl.constexpr, FIRST: tl.constexpr,
):  # fmt: skip
    """Grid: (B * H * tiles of TILE columns,). Writes the state that enters each segment [B * H, segments, K, V] in fp32."""
    VALUES: tl.constexpr = (V + BV - 1) // BV * BV
    WIDTH: tl.constexpr = VALUES + (K + BV - 1) // BV * BV
    TILES: tl.constexpr = (V + TILE - 1) // TILE
    head_index = (tl.program_id(0) // TILES).to(tl.int64)
    d, e = tl.arange(0, BK), (tl.program_id(0) % TILES) * TILE + tl.arange(0, TILE)
    inside = (d < K)[:, None] & (e < V)[None, :]
    offsets = d[:, None] * V + e[None, :]
    states += head_index * segments * K * V
    ends += head_index * (segments - 1) * K * WIDTH
    state_KV = tl.zeros([BK, TILE], tl.float32)
    if FIRST:
        state_KV = tl.load(first + head_index * K * V + offsets, mask=inside, other=0.0)
    tl.store(states + offsets, state_KV, mask=inside)
    state_KV = tl.load(ends + d[:, None] * WIDTH + e[None, :], mask=inside, other=0.0)
    tl.store(states + K * V + offsets, state_KV, mask=inside)
    for part in range(1, segments - 1):
        step = ends + tl.cast(part, tl.int64) * K * WIDTH
        among = (d < K)[:, None] & (d < K)[None, :]
        r_KK = tl.load(step + d[:, None] * WIDTH + VALUES + d[None, :], mask=among, other=0.0)
        c_KV = tl.load(step + d[:, None] * WIDTH + e[None, :], mask=inside, other=0.0)
        state_KV = tl.dot(r_KK, state_KV, c_KV, input_precision="tf32x3")
        tl.store(states + (tl.cast(part, tl.int64) + 1) * K * V + offsets, state_KV, mask=inside)
