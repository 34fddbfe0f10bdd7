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
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from kernels.delta_hopper import SIZES, barriers, place, shared_layout, thread_barrier, turned_layout
from kernels.delta_hopper_beside import beside, beside_buffers
from kernels.delta_hopper_walk import bring, leave, operand, start_errors, start_state, state_places, token_factors, whole_decay


@gluon.jit
def _start(
    given, head_index, order, e_start,
    K: gl.constexpr, V: gl.constexpr, BK: gl.constexpr, BV: gl.constexpr, GIVEN: gl.constexpr,
):  # fmt: skip
    """The columns of a state with which a program starts, transposed: of the state given, of zero or of the identity."""
    VALUES: gl.constexpr = (V + BV - 1) // BV * BV
    wide: gl.constexpr = turned_layout(BK, 1)
    e, d = e_start + gl.arange(0, BV, gl.SliceLayout(1, wide)), gl.arange(0, BK, gl.SliceLayout(0, wide))
    state_VK = gl.where(d[None, :] == e[:, None] - VALUES, 1.0, 0.0)
    if GIVEN:
        offsets, inside = state_places(e_start, V, K, BK, BV, 1)
        state_VK += gl.load(given + head_index.to(gl.int64) * K * V + offsets, mask=inside & (order == 0), other=0.0)
    return state_VK


@gluon.jit
def _store_end(ends, slot, state_VK, e_start, K: gl.constexpr, V: gl.constexpr, BK: gl.constexpr, BV: gl.constexpr):
    WIDTH: gl.constexpr = ((V + BV - 1) // BV + (K + BV - 1) // BV) * BV
    offsets, inside = state_places(e_start, WIDTH, K, BK, BV, 1)
    gl.store(ends + slot.to(gl.int64) * K * WIDTH + offsets, state_VK, mask=inside)


@gluon.jit
def _walk(
    sources, place, bounds, rows, bars, made, handed, first, ends, head_index, order, slot,
    K: gl.constexpr, V: gl.constexpr, BK: gl.constexpr, BV: gl.constexpr, C: gl.constexpr, STAGES: gl.constexpr,
    GATED: gl.constexpr, FIRST: gl.constexpr, DOT: gl.constexpr,
):  # fmt: skip
    """The partition that walks: `kernels.delta_hopper_walk` without outputs."""
    k, v = sources
    batch, head, shared_head, e_start = place
    n_first, n_last = bounds
    k_buffers, v_buffers = rows
    k_bars, v_bars = bars
    ready_bars, free_bars = handed
    none_VC = gl.zeros([BV, C], gl.float32, turned_layout(C, 1))
    for early in gl.static_range(STAGES - 1):
        at = [batch, gl.minimum(n_first + early, n_last) * C, shared_head, 0]
        bring(k_bars, (k,), at, early, (k_buffers,), STAGES, 2 * C * BK)
    bring(v_bars, (v,), [batch, n_first * C, head, e_start], 0, (v_buffers,), 2, 2 * C * BV)
    state_VK = _start(first, head_index, order, e_start, K, V, BK, BV, FIRST)
    for n in range(n_first, n_last + 1):
        step, part = n - n_first, (n - n_first) % 2
        k_CK = k_buffers.index(step % STAGES)
        mbarrier.wait(k_bars.index(step % STAGES), step // STAGES % 2)
        old_VK = operand(state_VK, C, 1, DOT)
        read = warpgroup_mma(old_VK, k_CK.permute([1, 0]), none_VC, use_acc=False, is_async=True)
        at = [batch, gl.minimum(n + STAGES - 1, n_last) * C, shared_head, 0]
        bring(k_bars, (k,), at, step + STAGES - 1, (k_buffers,), STAGES, 2 * C * BK)
        at_v = [batch, gl.minimum(n + 1, n_last) * C, head, e_start]
        bring(v_bars, (v,), at_v, step + 1, (v_buffers,), 2, 2 * C * BV)
        mbarrier.wait(v_bars.index(part), step // 2 % 2)
        value_VC = v_buffers.index(part).permute([1, 0]).load(turned_layout(C, 1)).to(gl.float32)
        mbarrier.wait(ready_bars.index(part), step // 2 % 2)
        error = start_errors(warpgroup_mma_wait(0, [read]), value_VC, part, made, C, 1, GATED, DOT)
        error_VC = warpgroup_mma_wait(0, [error])
        state, _ = start_state(error_VC, state_VK, k_CK, part, made, C, BK, 1, GATED, DOT)
        state_VK = warpgroup_mma_wait(0, [state])
        thread_barrier()
        mbarrier.arrive(free_bars.index(part), count=1)
    leave(k_bars, v_bars, n_last - n_first + 1, STAGES)
    _store_end(ends, slot, state_VK, e_start, K, V, BK, BV)


@gluon.jit(do_not_specialize=SIZES)
def forward_carry_kernel(
    k, v, beta, gate, first, ends,
    gate_b: tl.int64, gate_t: tl.int64, gate_every: tl.int32,
    length: tl.int32, heads: tl.int32, group: tl.int32, segments: tl.int32, span: tl.int32,
    K: gl.constexpr, V: gl.constexpr, BK: gl.constexpr, BV: gl.constexpr, C: gl.constexpr, STAGES: gl.constexpr,
    REGISTERS: gl.constexpr, GATED: gl.constexpr, FIRST: gl.constexpr, DOT: gl.constexpr, MERGE: gl.constexpr,
):  # fmt: skip
    """Grid: (B * H * (segments - 1) * tiles of C and of R,)."""
    TILES: gl.constexpr = (V + BV - 1) // BV + (K + BV - 1) // BV
    slot, tile, n_chunks = gl.program_id(0) // TILES, gl.program_id(0) % TILES, (length + C - 1) // C
    head_index, order, n_first, n_last = place(slot, segments - 1, segments, span, n_chunks, False)
    batch, head = head_index // heads, head_index % heads
    beta += batch.to(gl.int64) * length * heads + head
    gate += (batch // gate_every) * gate_b + head
    k_buffers = gl.allocate_shared_memory(DOT, [STAGES, C, BK], shared_layout(BK))
    v_buffers = gl.allocate_shared_memory(DOT, [2, C, BV], shared_layout(BV))
    made, inner, handed = beside_buffers(C, BV, DOT, MERGE)
    bars = (barriers(STAGES), barriers(2))
    gl.warp_specialize(
        [
            (_walk, (
                (k, v), (batch, head, head // group, tile * BV), (n_first, n_last), (k_buffers, v_buffers), bars, made, handed,
                first, ends, head_index, order, slot, K, V, BK, BV, C, STAGES, GATED, FIRST, DOT,
            )),
            (beside, (
                k, (beta, gate, gate), gate_t, (n_first, n_last), 0, (k_buffers, k_buffers), bars[0], made, inner, handed,
                False, length, heads, C, BV, STAGES, GATED, False, False, False, DOT, MERGE,
            )),
        ],
        [4],
        [REGISTERS],
    )  # fmt: skip


@gluon.jit
def _solved(dwrite_VC, part, made, C: gl.constexpr, GATED: gl.constexpr, DOT: gl.constexpr):
    """Starts the product that makes Y of the gradient of what was written."""
    beta = token_factors(made[2].index(part), C, 1)
    return warpgroup_mma(operand(dwrite_VC * -beta, C, 1, DOT), made[0].index(part), dwrite_VC, is_async=True)


@gluon.jit
def _walk_back(
    sources, place, bounds, rows, bars, made, handed, dlast, ends, head_index, order, slot,
    K: gl.constexpr, V: gl.constexpr, BK: gl.constexpr, BV: gl.constexpr, C: gl.constexpr, STAGES: gl.constexpr,
    GATED: gl.constexpr, DLAST: gl.constexpr, DOT: gl.constexpr,
):  # fmt: skip
    """The partition that walks back, with the gradient of a state: its chain is dS^T K^T, (beta dU)^T H, the next gradient."""
    q, k, do = sources
    batch, head, shared_head, e_start = place
    n_first, n_last = bounds
    qk_buffers, do_buffers = rows
    qk_bars, do_bars = bars
    ready_bars, free_bars = handed
    none_VC = gl.zeros([BV, C], gl.float32, turned_layout(C, 1))
    for early in gl.static_range(STAGES - 1):
        at = [batch, gl.maximum(n_last - early, n_first) * C, shared_head, 0]
        bring(qk_bars, (q, k), at, early, qk_buffers, STAGES, 4 * C * BK)
    bring(do_bars, (do,), [batch, n_last * C, head, e_start], 0, (do_buffers,), 2, 2 * C * BV)
    dstate_VK = _start(dlast, head_index, order, e_start, K, V, BK, BV, DLAST)
    for step in range(n_last - n_first + 1):
        n, part = n_last - step, step % 2
        q_CK, k_CK = qk_buffers[0].index(step % STAGES), qk_buffers[1].index(step % STAGES)
        mbarrier.wait(qk_bars.index(step % STAGES), step // STAGES % 2)
        old_VK = operand(dstate_VK, C, 1, DOT)
        dwrite = warpgroup_mma(old_VK, k_CK.permute([1, 0]), none_VC, use_acc=False, is_async=True)
        at = [batch, gl.maximum(n - STAGES + 1, n_first) * C, shared_head, 0]
        bring(qk_bars, (q, k), at, step + STAGES - 1, qk_buffers, STAGES, 4 * C * BK)
        at_do = [batch, gl.maximum(n - 1, n_first) * C, head, e_start]
        bring(do_bars, (do,), at_do, step + 1, (do_buffers,), 2, 2 * C * BV)
        mbarrier.wait(do_bars.index(part), step // 2 % 2)
        do_VC = do_buffers.index(part).permute([1, 0]).load(turned_layout(C, 1))
        mbarrier.wait(ready_bars.index(part), step // 2 % 2)
        asked = warpgroup_mma(operand(do_VC, C, 1, DOT), made[1].index(part), none_VC, use_acc=False, is_async=True)
        dwrite_VC, asked = warpgroup_mma_wait(1, [dwrite, asked])
        if GATED:
            dwrite_VC = dwrite_VC * token_factors(made[4].index(part), C, 1)
        y = _solved(warpgroup_mma_wait(0, [asked]) + dwrite_VC, part, made, C, GATED, DOT)
        if GATED:
            dstate_VK = dstate_VK * whole_decay(made[5].index(part), BK, 1)
            do_VC = do_VC.to(gl.float32) * token_factors(made[3].index(part), C, 1)
        dstate = warpgroup_mma(operand(do_VC, C, 1, DOT), q_CK, dstate_VK, is_async=True)
        y_VC, dstate = warpgroup_mma_wait(1, [y, dstate])
        y_VC = y_VC * -token_factors(made[2].index(part), C, 1)
        if GATED:
            y_VC = y_VC * token_factors(made[3].index(part), C, 1)
        dstate = warpgroup_mma(operand(y_VC, C, 1, DOT), k_CK, dstate, is_async=True)
        dstate_VK = warpgroup_mma_wait(0, [dstate])
        thread_barrier()
        mbarrier.arrive(free_bars.index(part), count=1)
    leave(qk_bars, do_bars, n_last - n_first + 1, STAGES)
    _store_end(ends, slot, dstate_VK, e_start, K, V, BK, BV)


@gluon.jit(do_not_specialize=SIZES)
def reverse_carry_kernel(
    q, k, do, beta, gate, dlast, ends,
    gate_b: tl.int64, gate_t: tl.int64, gate_every: tl.int32,
    length: tl.int32, heads: tl.int32, group: tl.int32, segments: tl.int32, span: tl.int32,
    K: gl.constexpr, V: gl.constexpr, BK: gl.constexpr, BV: gl.constexpr, C: gl.constexpr, STAGES: gl.constexpr,
    REGISTERS: gl.constexpr, GATED: gl.constexpr, DLAST: gl.constexpr, DOT: gl.constexpr, MERGE: gl.constexpr,
):  # fmt: skip
    """Grid: (B * H * (segments - 1) * tiles of C and of R,)."""
    TILES: gl.constexpr = (V + BV - 1) // BV + (K + BV - 1) // BV
    slot, tile, n_chunks = gl.program_id(0) // TILES, gl.program_id(0) % TILES, (length + C - 1) // C
    head_index, order, n_first, n_last = place(slot, segments - 1, segments, span, n_chunks, True)
    batch, head = head_index // heads, head_index % heads
    beta += batch.to(gl.int64) * length * heads + head
    gate += (batch // gate_every) * gate_b + head
    q_buffers = gl.allocate_shared_memory(DOT, [STAGES, C, BK], shared_layout(BK))
    k_buffers = gl.allocate_shared_memory(DOT, [STAGES, C, BK], shared_layout(BK))
    do_buffers = gl.allocate_shared_memory(DOT, [2, C, BV], shared_layout(BV))
    made, inner, handed = beside_buffers(C, BV, DOT, MERGE)
    bars = (barriers(STAGES), barriers(2))
    gl.warp_specialize(
        [
            (_walk_back, (
                (q, k, do), (batch, head, head // group, tile * BV), (n_first, n_last), ((q_buffers, k_buffers), do_buffers),
                bars, made, handed, dlast, ends, head_index, order, slot, K, V, BK, BV, C, STAGES, GATED, DLAST, DOT,
            )),
            (beside, (
                k, (beta, gate, ends), gate_t, (n_first, n_last), 0, (q_buffers, k_buffers), bars[0], made, inner, handed,
                False, length, heads, C, BV, STAGES, GATED, True, True, False, DOT, MERGE,
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
