"""Gradients of heads that share keys and queries on Hopper, in Gluon: chunk by chunk, as in `kernels.walks.walk_grouped_triton`.

A program owns a chunk and goes through heads of its group. Values, gradients of outputs and the state of a later head come by the
tensor memory accelerator meanwhile. What it multiplies itself stays in registers, as the left operand of the next product: only
what leaves the program is written to shared memory, and a turn has one barrier.

Shape legend: B batch, T time, H heads, G groups, N chunks of C = 64 tokens, K key, V value width, BK and BV the same on chip.
"""

from __future__ import annotations

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from kernels._entry import entry
from kernels.delta_rule.delta_hopper import at_stage, barriers, fetch, shared_layout, sums_layout, thread_barrier
from kernels.walks.walk_hopper_parts import (
    await_launch,
    await_stage,
    bring,
    column_sums,
    falls,
    half_of,
    line_layout,
    rate_of,
    row_sums,
    store_sums,
)
from kernels.walks.walk_triton import CONSTANT_GATE, NO_GATE, SCALAR_GATE

# What differs from call to call is not specialised, so that a new batch, length or head count compiles nothing.
COUNTS = ["length", "heads", "group", "gate_every", "splits"]


@gluon.jit
def _share(index, length, heads, group, splits, C: gl.constexpr):
    """Batch, first token, group and part of the group's heads of a program; the first of these and how many they are."""
    chunks, rest = (length + C - 1) // C, index // splits
    shared, split, turns = rest % (heads // group), index % splits, group // splits
    rest = rest // (heads // group)
    return (rest // chunks, rest % chunks * C, shared, split), shared * group + split * turns, turns


@gluon.jit
def _buffers(BK: gl.constexpr, BV: gl.constexpr, C: gl.constexpr, STAGES: gl.constexpr, GATE: gl.constexpr, DOT: gl.constexpr):
    """Shared memory: v, do, a state and a line of decays of each stage; q and k; barriers of the stages, and one of q and k."""
    v_buffers = gl.allocate_shared_memory(DOT, [STAGES, C, BV], shared_layout(BV))
    do_buffers = gl.allocate_shared_memory(DOT, [STAGES, C, BV], shared_layout(BV))
    stages = (v_buffers, do_buffers, gl.allocate_shared_memory(DOT, [STAGES, BK, BV], shared_layout(BV)))
    if GATE == SCALAR_GATE:
        stages = stages + (gl.allocate_shared_memory(gl.float32, [STAGES, 1, C], line_layout()),)
    q_buffer = gl.allocate_shared_memory(DOT, [C, BK], shared_layout(BK))
    return stages, q_buffer, gl.allocate_shared_memory(DOT, [C, BK], shared_layout(BK)), barriers(STAGES), barriers(1)


@gluon.jit
def _bring(
    bars, sources, stages, place, head, length, heads, turn,
    BK: gl.constexpr, BV: gl.constexpr, C: gl.constexpr, STAGES: gl.constexpr, GATE: gl.constexpr,
):  # fmt: skip
    """Starts to copy what a turn reads of its head."""
    batch, t, _, _ = place
    row, chunk = [batch, t, head, 0], batch * ((length + C - 1) // C) + t // C
    rows = (row, row, [chunk * heads + head, 0, 0])
    bring(bars, sources, stages, rows, [batch * heads + head, t], turn, 2 * (2 * C * BV + BK * BV), C, STAGES, GATE)


@gluon.jit
def _decay(lines, gate, place, head, length, heads, gate_every, C: gl.constexpr, GATE: gl.constexpr):
    """Rate of a head's constant decay, and half of what its chunk decays."""
    batch, t, _, _ = place
    rate = rate_of(gate, batch, head, heads, gate_every, GATE == CONSTANT_GATE)
    return rate, half_of(lines, rate, batch, head, heads, t, length, C, GATE)


@gluon.jit
def _pair_decays(stage, rate, t, length, square: gl.constexpr, C: gl.constexpr, GATE: gl.constexpr, LATER: gl.constexpr):
    """Decays of pairs of tokens, zero where they do not see each other: rows see columns before them, or behind (LATER)."""
    rows, cols = gl.arange(0, C, gl.SliceLayout(1, square)), gl.arange(0, C, gl.SliceLayout(0, square))
    is_seen = (rows[:, None] <= cols[None, :]) if LATER else (rows[:, None] >= cols[None, :])
    if GATE == NO_GATE:
        return gl.where(is_seen, 1.0, 0.0)
    fall_rows = falls(stage, rate, t, length, C, GATE, gl.SliceLayout(1, square))
    fall_cols = falls(stage, rate, t, length, C, GATE, gl.SliceLayout(0, square))
    between = (fall_cols[None, :] - fall_rows[:, None]) if LATER else (fall_rows[:, None] - fall_cols[None, :])
    # Only exponents that are <= 0 are used; the others would overflow and are masked before.
    return gl.exp2(gl.where(is_seen, between, float("-inf")))


@gluon.jit
def _left(x_CC, layout: gl.constexpr, DOT: gl.constexpr):
    """A product as the left operand of the next one: the same registers."""
    return gl.convert_layout(x_CC.to(DOT), gl.DotOperandLayout(0, layout, 2), assert_trivial=True)


@gluon.jit
def _add_read(
    sums_CK, rows, state, stage, rate, half, t, length, wide: gl.constexpr,
    C: gl.constexpr, GATE: gl.constexpr, LATER: gl.constexpr, DOT: gl.constexpr,
):  # fmt: skip
    """Starts to add what rows of a chunk read of a state that enters it, or (LATER) of the gradient of one that leaves it."""
    if GATE == NO_GATE:
        return warpgroup_mma(rows, state.permute([1, 0]), sums_CK, is_async=True)
    left: gl.constexpr = gl.DotOperandLayout(0, wide, 2)
    fall_C = falls(stage, rate, t, length, C, GATE, gl.SliceLayout(1, left))
    keep_C = gl.exp2((half - fall_C) if LATER else (half + fall_C))
    decayed_CV = (rows.load(left).to(gl.float32) * keep_C[:, None]).to(DOT)
    return warpgroup_mma(decayed_CV, state.permute([1, 0]), sums_CK, is_async=True)


@gluon.jit
def _write(out, row, buffer, x_CK, DOT: gl.constexpr):
    """Copies what a program has summed to memory."""
    buffer.store(x_CK.to(DOT))
    fence_async_shared()
    thread_barrier()
    tma.async_copy_shared_to_global(out, row, buffer)
    tma.store_wait(0)


@entry(do_not_specialize=COUNTS, gluon=True)
def queries_kernel(
    q, k, v, do, states, dq, line_rows, lines, gate, rowsums,
    length: tl.int32, heads: tl.int32, group: tl.int32, gate_every: tl.int32, splits: tl.int32,
    BK: gl.constexpr, BV: gl.constexpr, C: gl.constexpr, STAGES: gl.constexpr, GATE: gl.constexpr, GATE_GRAD: gl.constexpr,
    PARTS: gl.constexpr, DOT: gl.constexpr,
):  # fmt: skip
    """Gradient of queries [B, T, G * splits, K], and the first part of `rowsums` [B, H, PARTS, N * C]: q . dq of earlier chunks.

    It may start beside the kernel before it, of which it reads nothing, and ends after it. Grid: (B * N * G * splits,).
    """
    place, first, turns = _share(gl.program_id(0), length, heads, group, splits, C)
    batch, t, shared, split = place
    part_size = (length + C - 1) // C * C
    square: gl.constexpr = sums_layout(C)
    narrow: gl.constexpr = sums_layout(BV)
    wide: gl.constexpr = sums_layout(BK)
    stages, q_buffer, k_buffer, bars, bar = _buffers(BK, BV, C, STAGES, GATE, DOT)
    sources = (v, do, states, line_rows) if GATE == SCALAR_GATE else (v, do, states)
    own_row = [batch, t, shared, 0]
    fetch(bar.index(0), 4 * C * BK, (q, k), (own_row, own_row), (q_buffer, k_buffer))
    for early in gl.static_range(STAGES):
        if early < turns:
            _bring(bars, sources, stages, place, first + early, length, heads, early, BK, BV, C, STAGES, GATE)
    none_CV, none_CC = gl.zeros([C, BV], gl.float32, narrow), gl.zeros([C, C], gl.float32, square)
    dq_CK = gl.zeros([C, BK], gl.float32, wide)
    rate, half = _decay(lines, gate, place, first, length, heads, gate_every, C, GATE)
    await_stage(bar, 0, 1)
    for turn in range(turns):
        head, own = first + turn, at_stage(stages, turn % STAGES)
        following = gl.minimum(head + 1, first + turns - 1)
        next_rate, next_half = _decay(lines, gate, place, following, length, heads, gate_every, C, GATE)
        await_stage(bars, turn, STAGES)
        pairs = warpgroup_mma(own[1], own[0].permute([1, 0]), none_CC, use_acc=False, is_async=True)
        earlier = none_CV
        if GATE_GRAD:
            earlier = warpgroup_mma(q_buffer, own[2], none_CV, use_acc=False, is_async=True)
        dq_sums = _add_read(dq_CK, own[1], own[2], own, rate, half, t, length, wide, C, GATE, False, DOT)
        decay_CC = _pair_decays(own, rate, t, length, square, C, GATE, False)
        if GATE_GRAD:
            pairs_CC, earlier_CV, dq_sums = warpgroup_mma_wait(1, [pairs, earlier, dq_sums])
            read_C = gl.exp2(half + falls(own, rate, t, length, C, GATE, gl.SliceLayout(1, narrow)))
            sums = row_sums(earlier_CV * read_C[:, None] * own[1].load(narrow).to(gl.float32), C, BV, 1)
            store_sums(rowsums + (batch * heads + head).to(gl.int64) * PARTS * part_size + t, sums, part_size, True, C, 1)
        else:
            pairs_CC, dq_sums = warpgroup_mma_wait(1, [pairs, dq_sums])
        dq_sums = warpgroup_mma(_left(pairs_CC * decay_CC, wide, DOT), k_buffer, dq_sums, is_async=True)
        dq_CK = warpgroup_mma_wait(0, [dq_sums])
        thread_barrier()  # all warps have read what was brought
        if turn + STAGES < turns:
            _bring(bars, sources, stages, place, head + STAGES, length, heads, turn + STAGES, BK, BV, C, STAGES, GATE)
        rate, half = next_rate, next_half
    _write(dq, [batch, t, shared * splits + split, 0], k_buffer, dq_CK, DOT)
    await_launch()


@entry(do_not_specialize=COUNTS, gluon=True)
def keys_kernel(  # noqa: PLR0915 - one turn of a pipeline, whose order is the point
    q, k, v, do, states, dk, dv, line_rows, lines, gate, rowsums,
    length: tl.int32, heads: tl.int32, group: tl.int32, gate_every: tl.int32, splits: tl.int32,
    BK: gl.constexpr, BV: gl.constexpr, C: gl.constexpr, STAGES: gl.constexpr, GATE: gl.constexpr, GATE_GRAD: gl.constexpr,
    PARTS: gl.constexpr, DOT: gl.constexpr,
):  # fmt: skip
    """Gradients of keys [B, T, G * splits, K] and values, and the other parts of `rowsums` [B, H, PARTS, N * C].

    `states` are gradients of those behind the chunks. Of the parts one is what keys give, less, and four are what queries get
    inside of their chunk, from the products of the same pairs. Grid: (B * N * G * splits,).
    """
    place, first, turns = _share(gl.program_id(0), length, heads, group, splits, C)
    batch, t, shared, split = place
    part_size = (length + C - 1) // C * C
    square: gl.constexpr = sums_layout(C)
    narrow: gl.constexpr = sums_layout(BV)
    wide: gl.constexpr = sums_layout(BK)
    stages, q_buffer, k_buffer, bars, bar = _buffers(BK, BV, C, STAGES, GATE, DOT)
    dv_buffers = gl.allocate_shared_memory(DOT, [2, C, BV], shared_layout(BV))
    sources = (v, do, states, line_rows) if GATE == SCALAR_GATE else (v, do, states)
    own_row = [batch, t, shared, 0]
    fetch(bar.index(0), 4 * C * BK, (q, k), (own_row, own_row), (q_buffer, k_buffer))
    for early in gl.static_range(STAGES):
        if early < turns:
            _bring(bars, sources, stages, place, first + early, length, heads, early, BK, BV, C, STAGES, GATE)
    none_CV, none_CC = gl.zeros([C, BV], gl.float32, narrow), gl.zeros([C, C], gl.float32, square)
    dk_CK = gl.zeros([C, BK], gl.float32, wide)
    rows, cols = gl.arange(0, C, gl.SliceLayout(1, square)), gl.arange(0, C, gl.SliceLayout(0, square))
    rate, half = _decay(lines, gate, place, first, length, heads, gate_every, C, GATE)
    await_stage(bar, 0, 1)
    scores = warpgroup_mma(k_buffer, q_buffer.permute([1, 0]), none_CC, use_acc=False, is_async=True)
    scores_CC = warpgroup_mma_wait(0, [scores])
    for turn in range(turns):
        head, own = first + turn, at_stage(stages, turn % STAGES)
        following = gl.minimum(head + 1, first + turns - 1)
        next_rate, next_half = _decay(lines, gate, place, following, length, heads, gate_every, C, GATE)
        await_stage(bars, turn, STAGES)
        dv_read = warpgroup_mma(k_buffer, own[2], none_CV, use_acc=False, is_async=True)
        pairs = warpgroup_mma(own[0], own[1].permute([1, 0]), none_CC, use_acc=False, is_async=True)
        dk_sums = _add_read(dk_CK, own[0], own[2], own, rate, half, t, length, wide, C, GATE, True, DOT)
        decay_CC = _pair_decays(own, rate, t, length, square, C, GATE, True)
        kq_CC = _left(scores_CC * decay_CC, narrow, DOT)
        dv_CV, pairs, dk_sums = warpgroup_mma_wait(2, [dv_read, pairs, dk_sums])
        if GATE != NO_GATE:
            keep_C = gl.exp2(half - falls(own, rate, t, length, C, GATE, gl.SliceLayout(1, narrow)))
            dv_CV = dv_CV * keep_C[:, None]
        of_keys = rows
        if GATE_GRAD:
            of_keys = row_sums(dv_CV * own[0].load(narrow).to(gl.float32), C, BV, 1)
        dv_sums = warpgroup_mma(kq_CC, own[1], dv_CV, is_async=True)
        pairs_CC, dk_sums, dv_sums = warpgroup_mma_wait(2, [pairs, dk_sums, dv_sums])
        pairs_CC = pairs_CC * decay_CC
        dk_sums = warpgroup_mma(_left(pairs_CC, wide, DOT), q_buffer, dk_sums, is_async=True)
        if GATE_GRAD:
            both_CC = gl.where(rows[:, None] == cols[None, :], 0.0, scores_CC * pairs_CC)
            of_keys += row_sums(both_CC, C, C, 1)
            rowsum = rowsums + ((batch * heads + head).to(gl.int64) * PARTS + 1) * part_size + t
            store_sums(rowsum, -of_keys, part_size, True, C, 1)
            store_sums(rowsum + part_size, column_sums(both_CC, C, C, 1), part_size, False, C, 1)
        dv_CV, dk_sums = warpgroup_mma_wait(1, [dv_sums, dk_sums])
        dv_buffer = dv_buffers.index(turn % 2)
        dv_buffer.store(dv_CV.to(DOT))
        fence_async_shared()
        tma.store_wait(0)  # the other buffer has left
        dk_CK = warpgroup_mma_wait(0, [dk_sums])
        thread_barrier()  # all warps have read what was brought, and written
        tma.async_copy_shared_to_global(dv, [batch, t, head, 0], dv_buffer)
        if turn + STAGES < turns:
            _bring(bars, sources, stages, place, head + STAGES, length, heads, turn + STAGES, BK, BV, C, STAGES, GATE)
        rate, half = next_rate, next_half
    _write(dk, [batch, t, shared * splits + split, 0], k_buffer, dk_CK, DOT)
