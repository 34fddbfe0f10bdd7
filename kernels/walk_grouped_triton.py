"""Linear attention whose heads share keys and queries, as in Mamba-2: states by a short walk, everything else chunk by chunk.

A walk of a head makes scores, and gradients of queries and keys, that are the same or summed over all heads of a group. Here a
walk makes only the states between chunks, kept in 16 bit; then a program owns a chunk and goes through the heads of its group:
it multiplies Q K^T once, and what heads add to dQ and dK stays in its registers. No program waits for another chunk.

Shape legend: B batch, T time, H heads, G groups, N chunks, C tokens of a chunk, K key, V value width.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels._entry import entry
from kernels.walk_triton import (
    CONSTANT_GATE,
    LIMIT,
    LIMIT_FP16,
    LOG2_E,
    NO_GATE,
    SCALAR_GATE,
    SEGMENTS,
    _bounds,
    _initial,
    _late,
    _load_rows,
    _place,
    _scaled,
    _split,
    _state_tile,
)


@entry
def cumulate_kernel(
    gate, out, length: tl.int32, heads: tl.int32, blocks: tl.int32,
    C: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Log2 decays [B, H, T] of log decays [B, T, H], summed from the start of each chunk.

    Grid: (B * blocks of HEADS heads * blocks of ROWS tokens,).
    """
    block, rest = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    head_groups = tl.cdiv(heads, HEADS)
    head_H, wide = rest % head_groups * HEADS + tl.arange(0, HEADS), (rest // head_groups).to(tl.int64)
    token_R1 = (block * ROWS + tl.arange(0, ROWS))[:, None]
    inside_RH = (token_R1 < length) & (head_H < heads)[None, :]
    step_RH = tl.load(gate + (wide * length + token_R1) * heads + head_H[None, :], mask=inside_RH, other=0.0) * LOG2_E
    sums_RH = tl.reshape(tl.cumsum(tl.reshape(step_RH, [ROWS // C, C, HEADS]), 1), [ROWS, HEADS])
    tl.store(out + (wide * heads + head_H[None, :]) * length + token_R1, sums_RH, mask=inside_RH)


@triton.jit
def _sums_of(gate, batch, head, length, heads, gate_every, GATE: tl.constexpr):
    """Where the decays of a head start: one number, or those that `cumulate_kernel` has summed over each chunk."""
    if GATE == SCALAR_GATE:
        return gate + (batch.to(tl.int64) * heads + head) * length
    return gate + batch // gate_every * heads + head


@triton.jit
def _whole_decay(sums, start, length, C: tl.constexpr, GATE: tl.constexpr):
    """Log2 decay of a chunk, which loops ask for one turn ahead: nothing else of theirs waits for a number from memory."""
    if GATE == SCALAR_GATE:
        return tl.load(sums + (tl.minimum(start + C, length) - 1))
    if GATE == CONSTANT_GATE:
        return tl.load(sums) * LOG2_E * tl.minimum(length - start, C).to(tl.float32)
    return tl.zeros([], tl.float32)


@triton.jit
def _sums_at(sums, g_all, t_C, start, length, SCALAR: tl.constexpr):
    """Log2 decays of a chunk, cumulated up to and with each token; padding does not decay."""
    if SCALAR:
        return tl.where(t_C < length, tl.load(sums + t_C, mask=t_C < length, other=0.0), g_all)
    return tl.load(sums) * LOG2_E * (tl.minimum(t_C + 1, length) - start).to(tl.float32)


@entry
def states_kernel(
    b, c, gate, given, last, kept, sums, decays,
    b_b: tl.int64, b_t: tl.int64, b_h: tl.int64, c_b: tl.int64, c_t: tl.int64, c_h: tl.int64,
    length: tl.int32, chunks: tl.int32, heads: tl.int32, group: tl.int32, gate_every: tl.int32, pieces: tl.int32, segment: tl.int32,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, UNIT: tl.constexpr, C: tl.constexpr,
    GATE: tl.constexpr, GIVEN: tl.constexpr, LAST: tl.constexpr, PIECES: tl.constexpr, REVERSE: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The state before each chunk, or in reverse the gradient of the one behind it, `kept` [B, N, H, K, V].

    Grid: (B * P * H * value tiles,). Forward b and c are keys and values, in reverse queries and gradients of outputs.
    """
    tile, head, piece, batch = _place(tl.program_id(0), (V + BV - 1) // BV, heads, pieces)
    begin, count = _bounds(b, piece, segment, length, PIECES)
    wide, skipped = batch.to(tl.int64), tl.cast(begin, tl.int64)
    b += (wide * b_b + skipped * b_t + head // group * b_h) * UNIT
    c += (wide * c_b + skipped * c_t + head * c_h) * UNIT
    gate = _sums_of(gate, batch, head, length, heads, gate_every, GATE)
    if GATE == SCALAR_GATE:
        gate += begin
    at_KV, in_KV = _state_tile(0, tile * BV, V, 1, BK, BV, K, V)
    state_KV = _initial(given, sums, decays, batch, head, piece, heads, pieces, at_KV, in_KV, K * V, GIVEN, PIECES, REVERSE)
    ks, vs, i = tl.arange(0, BK), tile * BV + tl.arange(0, BV), tl.arange(0, C)
    n_chunks = tl.cdiv(count, C)
    kept += ((wide * chunks + begin // C) * heads + head) * K * V
    g_all = _whole_decay(gate, (n_chunks - 1) * C if REVERSE else 0, count, C, GATE)
    for n in tl.range(0, n_chunks, num_stages=STAGES):
        chunk = (n_chunks - 1 - n) if REVERSE else n
        following = tl.maximum(chunk - 1, 0) if REVERSE else tl.minimum(chunk + 1, n_chunks - 1)
        g_next = _whole_decay(gate, following * C, count, C, GATE)
        t_C = chunk * C + i
        b_CK = _load_rows(b, b_t * UNIT, t_C, ks, count, K, DOT)
        c_CV = _load_rows(c, c_t * UNIT, t_C, vs, count, V, DOT)
        enter_CV, carried = c_CV, g_all
        if GATE != NO_GATE:
            g_C = _sums_at(gate, g_all, t_C, chunk * C, count, GATE == SCALAR_GATE)
            leave_C, rest_C, half, rough = _split(g_C, g_all, REVERSE, DOT)
            enter_CV = _scaled(c_CV, -leave_C, DOT)
            carried = _carried(half, DOT)
            state_KV *= tl.exp2(carried)
        tl.store(kept + tl.cast(chunk, tl.int64) * heads * K * V + at_KV, state_KV.to(DOT), mask=in_KV)
        if GATE != NO_GATE:
            state_KV *= tl.exp2(half - carried)
        state_KV = tl.dot(tl.trans(b_CK), enter_CV, state_KV, input_precision=PRECISION)
        if GATE != NO_GATE:
            state_KV *= tl.exp2(half)
            if rough:
                late_CV = _load_rows(c, c_t * UNIT, t_C, vs, count, V, tl.float32) * _late(leave_C, rest_C, half)[:, None]
                state_KV = tl.dot(tl.trans(b_CK), late_CV.to(DOT), state_KV, input_precision=PRECISION)
        g_all = g_next
    if LAST:
        ending = (piece == 0) if REVERSE else (piece == pieces - 1)
        tl.store(last + (wide * heads + head) * K * V + at_KV, state_KV, mask=in_KV & ((PIECES != SEGMENTS) | ending))


@triton.jit
def _share(program, chunks, groups, splits):
    """Batch, chunk, group and part of the group's heads of a program."""
    rest = program // splits
    return rest // groups // chunks, rest // groups % chunks, rest % groups, program % splits


@triton.jit
def _decay_of_head(gate, batch, head, start, length, heads, gate_every, C: tl.constexpr, GATE: tl.constexpr):
    """Log2 decay of one head's chunk."""
    return _whole_decay(_sums_of(gate, batch, head, length, heads, gate_every, GATE), start, length, C, GATE)


@triton.jit
def _carried(half, DOT: tl.constexpr):
    """Exponent of what kept states are scaled by: half of their chunk's decay, as far as the products' dtype can undo it."""
    limit: tl.constexpr = LIMIT_FP16 if DOT == tl.float16 else LIMIT
    return tl.maximum(half, -limit)


@triton.jit
def _decays_of(gate, batch, head, g_all, t_C, start, length, heads, gate_every, GATE: tl.constexpr, REVERSE: tl.constexpr, DOT: tl.constexpr):
    """`_split` of one head's chunk, and the exponent that turns what comes from kept states into what comes from the sums."""
    own = _sums_of(gate, batch, head, length, heads, gate_every, GATE)
    leave_C, rest_C, half, rough = _split(_sums_at(own, g_all, t_C, start, length, GATE == SCALAR_GATE), g_all, REVERSE, DOT)
    return leave_C, rest_C, half + rest_C - _carried(half, DOT), rough


@entry
def outputs_kernel(
    q, k, v, gate, kept, o,
    q_b: tl.int64, q_t: tl.int64, q_h: tl.int64, k_b: tl.int64, k_t: tl.int64, k_h: tl.int64,
    v_b: tl.int64, v_t: tl.int64, v_h: tl.int64,
    length: tl.int32, chunks: tl.int32, heads: tl.int32, group: tl.int32, gate_every: tl.int32, splits: tl.int32,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, UNIT: tl.constexpr, C: tl.constexpr, GATE: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """O = exp(G) Q S + (Q K^T o D) V for some heads of a group and one chunk. Grid: (B * N * G * splits,)."""
    batch, chunk, shared, split = _share(tl.program_id(0), chunks, heads // group, splits)
    wide, start = batch.to(tl.int64), chunk * C
    ks, vs, i = tl.arange(0, BK), tl.arange(0, BV), tl.arange(0, C)
    t_C = start + i
    q_CK = _load_rows(q + (wide * q_b + shared * q_h) * UNIT, q_t * UNIT, t_C, ks, length, K, DOT)
    k_CK = _load_rows(k + (wide * k_b + shared * k_h) * UNIT, k_t * UNIT, t_C, ks, length, K, DOT)
    seen = i[:, None] >= i[None, :]
    scores_CC = tl.where(seen, tl.dot(q_CK, tl.trans(k_CK), input_precision=PRECISION), 0.0).to(DOT)
    at_KV, in_KV = _state_tile(0, 0, V, 1, BK, BV, K, V)
    inside_CV = (t_C < length)[:, None] & (vs < V)[None, :]
    per_split = group // splits
    first = shared * group + split * per_split
    g_all = _decay_of_head(gate, batch, first, start, length, heads, gate_every, C, GATE)
    for head in tl.range(first, first + per_split, num_stages=STAGES):
        following = tl.minimum(head + 1, first + per_split - 1)
        g_next = _decay_of_head(gate, batch, following, start, length, heads, gate_every, C, GATE)
        v_CV = _load_rows(v + (wide * v_b + head * v_h) * UNIT, v_t * UNIT, t_C, vs, length, V, DOT)
        state_KV = tl.load(kept + ((wide * chunks + chunk) * heads + head) * K * V + at_KV, mask=in_KV, other=0.0)
        o_CV = tl.dot(q_CK, state_KV, input_precision=PRECISION)
        pairs_CC = scores_CC
        if GATE != NO_GATE:
            leave_C, rest_C, read_C, rough = _decays_of(
                gate, batch, head, g_all, t_C, start, length, heads, gate_every, GATE, False, DOT
            )
            v_CV = _scaled(v_CV, -leave_C, DOT)
            if rough:
                o_CV *= tl.exp2(read_C)[:, None]
                decay_CC = tl.exp2(tl.where(seen, rest_C[:, None] - rest_C[None, :], 0.0))
                pairs_CC = (pairs_CC.to(tl.float32) * decay_CC).to(DOT)
        o_CV = tl.dot(pairs_CC, v_CV, o_CV, input_precision=PRECISION)
        if GATE != NO_GATE:
            o_CV *= tl.exp2(leave_C)[:, None]
        at_CV = ((wide * length + t_C)[:, None] * heads + head) * V + vs[None, :]
        tl.store(o + at_CV, o_CV.to(o.dtype.element_ty), mask=inside_CV)
        g_all = g_next


@entry
def queries_kernel(
    q, k, v, do, gate, kept, dq, rowsums,
    q_b: tl.int64, q_t: tl.int64, q_h: tl.int64, k_b: tl.int64, k_t: tl.int64, k_h: tl.int64,
    v_b: tl.int64, v_t: tl.int64, v_h: tl.int64, do_b: tl.int64, do_t: tl.int64, do_h: tl.int64,
    length: tl.int32, chunks: tl.int32, heads: tl.int32, group: tl.int32, gate_every: tl.int32, splits: tl.int32,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, UNIT: tl.constexpr, C: tl.constexpr, GATE: tl.constexpr,
    GATE_GRAD: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Gradient of queries [B, T, G, splits, K], and into `rowsums` [B, H, T] q . dq of what comes from earlier chunks.

    Grid: (B * N * G * splits,).
    """
    batch, chunk, shared, split = _share(tl.program_id(0), chunks, heads // group, splits)
    wide, start = batch.to(tl.int64), chunk * C
    ks, vs, i = tl.arange(0, BK), tl.arange(0, BV), tl.arange(0, C)
    t_C = start + i
    k_CK = _load_rows(k + (wide * k_b + shared * k_h) * UNIT, k_t * UNIT, t_C, ks, length, K, DOT)
    q_CK = k_CK
    if GATE_GRAD:
        q_CK = _load_rows(q + (wide * q_b + shared * q_h) * UNIT, q_t * UNIT, t_C, ks, length, K, DOT)
    at_KV, in_KV = _state_tile(0, 0, V, 1, BK, BV, K, V)
    dq_CK = tl.zeros([C, BK], tl.float32)
    sum_CC = tl.zeros([C, C], tl.float32)
    seen = i[:, None] >= i[None, :]
    per_split = group // splits
    first = shared * group + split * per_split
    g_all = _decay_of_head(gate, batch, first, start, length, heads, gate_every, C, GATE)
    for head in tl.range(first, first + per_split, num_stages=STAGES):
        following = tl.minimum(head + 1, first + per_split - 1)
        g_next = _decay_of_head(gate, batch, following, start, length, heads, gate_every, C, GATE)
        v_CV = _load_rows(v + (wide * v_b + head * v_h) * UNIT, v_t * UNIT, t_C, vs, length, V, DOT)
        do_CV = _load_rows(do + (wide * do_b + head * do_h) * UNIT, do_t * UNIT, t_C, vs, length, V, DOT)
        state_KV = tl.load(kept + ((wide * chunks + chunk) * heads + head) * K * V + at_KV, mask=in_KV, other=0.0)
        read_CV, enter_CV = do_CV, v_CV
        if GATE != NO_GATE:
            leave_C, rest_C, read_C, rough = _decays_of(
                gate, batch, head, g_all, t_C, start, length, heads, gate_every, GATE, False, DOT
            )
            read_CV, enter_CV = _scaled(do_CV, leave_C, DOT), _scaled(v_CV, -leave_C, DOT)
        pairs_CC = tl.dot(read_CV, tl.trans(enter_CV), input_precision=PRECISION)
        if GATE != NO_GATE:
            if rough:
                pairs_CC *= tl.exp2(tl.where(seen, rest_C[:, None] - rest_C[None, :], 0.0))
                again_CV = _load_rows(do + (wide * do_b + head * do_h) * UNIT, do_t * UNIT, t_C, vs, length, V, DOT)
                read_CV = _scaled(again_CV, leave_C + read_C, DOT)
        sum_CC += pairs_CC
        dq_CK = tl.dot(read_CV, tl.trans(state_KV), dq_CK, input_precision=PRECISION)
        if GATE_GRAD:
            earlier_CV = tl.dot(q_CK, state_KV, input_precision=PRECISION)
            at_C = (wide * heads + head) * length + t_C
            tl.store(rowsums + at_C, tl.sum(earlier_CV * read_CV.to(tl.float32), 1), mask=t_C < length)
        g_all = g_next
    dq_CK = tl.dot(tl.where(seen, sum_CC, 0.0).to(DOT), k_CK, dq_CK, input_precision=PRECISION)
    at_CK = (((wide * length + t_C)[:, None] * (heads // group) + shared) * splits + split) * K + ks[None, :]
    tl.store(dq + at_CK, dq_CK.to(dq.dtype.element_ty), mask=(t_C < length)[:, None] & (ks < K)[None, :])


@entry
def keys_kernel(
    q, k, v, do, gate, dkept, dk, dv, rowsums,
    q_b: tl.int64, q_t: tl.int64, q_h: tl.int64, k_b: tl.int64, k_t: tl.int64, k_h: tl.int64,
    v_b: tl.int64, v_t: tl.int64, v_h: tl.int64, do_b: tl.int64, do_t: tl.int64, do_h: tl.int64,
    length: tl.int32, chunks: tl.int32, heads: tl.int32, group: tl.int32, gate_every: tl.int32, splits: tl.int32,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, UNIT: tl.constexpr, C: tl.constexpr, GATE: tl.constexpr,
    GATE_GRAD: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Gradients of keys [B, T, G, splits, K] and values, and into `rowsums` [B, H, T] the rest of q . dq - k . dk.

    Pairs inside of the chunk cancel as in `kernels.walk_gradients_triton._walk_keys_and_values`.

    Grid: (B * N * G * splits,).
    """
    batch, chunk, shared, split = _share(tl.program_id(0), chunks, heads // group, splits)
    wide, start = batch.to(tl.int64), chunk * C
    ks, vs, i = tl.arange(0, BK), tl.arange(0, BV), tl.arange(0, C)
    t_C = start + i
    q_CK = _load_rows(q + (wide * q_b + shared * q_h) * UNIT, q_t * UNIT, t_C, ks, length, K, DOT)
    k_CK = _load_rows(k + (wide * k_b + shared * k_h) * UNIT, k_t * UNIT, t_C, ks, length, K, DOT)
    seen = i[:, None] <= i[None, :]
    scores_CC = tl.where(seen, tl.dot(k_CK, tl.trans(q_CK), input_precision=PRECISION), 0.0).to(DOT)
    at_KV, in_KV = _state_tile(0, 0, V, 1, BK, BV, K, V)
    inside_CV = (t_C < length)[:, None] & (vs < V)[None, :]
    dk_CK = tl.zeros([C, BK], tl.float32)
    per_split = group // splits
    first = shared * group + split * per_split
    g_all = _decay_of_head(gate, batch, first, start, length, heads, gate_every, C, GATE)
    for head in tl.range(first, first + per_split, num_stages=STAGES):
        following = tl.minimum(head + 1, first + per_split - 1)
        g_next = _decay_of_head(gate, batch, following, start, length, heads, gate_every, C, GATE)
        v_CV = _load_rows(v + (wide * v_b + head * v_h) * UNIT, v_t * UNIT, t_C, vs, length, V, DOT)
        do_CV = _load_rows(do + (wide * do_b + head * do_h) * UNIT, do_t * UNIT, t_C, vs, length, V, DOT)
        dstate_KV = tl.load(dkept + ((wide * chunks + chunk) * heads + head) * K * V + at_KV, mask=in_KV, other=0.0)
        dv_CV = tl.dot(k_CK, dstate_KV, input_precision=PRECISION)
        kq_CC, write_CV, leave_CV, enter_CV = scores_CC, v_CV, v_CV, do_CV
        if GATE != NO_GATE:
            leave_C, rest_C, read_C, rough = _decays_of(
                gate, batch, head, g_all, t_C, start, length, heads, gate_every, GATE, True, DOT
            )
            leave_CV, enter_CV = _scaled(v_CV, leave_C, DOT), _scaled(do_CV, -leave_C, DOT)
            write_CV = leave_CV
        vo_CC = tl.dot(leave_CV, tl.trans(enter_CV), input_precision=PRECISION)
        if GATE != NO_GATE:
            if rough:
                decay_CC = tl.exp2(tl.where(seen, rest_C[:, None] - rest_C[None, :], 0.0))
                vo_CC *= decay_CC
                kq_CC = (kq_CC.to(tl.float32) * decay_CC).to(DOT)
                again_CV = _load_rows(v + (wide * v_b + head * v_h) * UNIT, v_t * UNIT, t_C, vs, length, V, DOT)
                write_CV = _scaled(again_CV, leave_C + read_C, DOT)
                dv_CV *= tl.exp2(read_C)[:, None]
        vo_CC = tl.where(seen, vo_CC, 0.0)
        if GATE_GRAD:
            pairs_CC = tl.where(i[:, None] == i[None, :], 0.0, scores_CC.to(tl.float32) * vo_CC)
            sum_C = tl.sum(pairs_CC, 0) - tl.sum(pairs_CC, 1) - tl.sum(dv_CV * leave_CV.to(tl.float32), 1)
            tl.store(rowsums + (wide * heads + head) * length + t_C, sum_C, mask=t_C < length)
        dk_CK = tl.dot(write_CV, tl.trans(dstate_KV), dk_CK, input_precision=PRECISION)
        dk_CK = tl.dot(vo_CC.to(DOT), q_CK, dk_CK, input_precision=PRECISION)
        dv_CV = tl.dot(kq_CC, enter_CV, dv_CV, input_precision=PRECISION)
        if GATE != NO_GATE:
            dv_CV *= tl.exp2(leave_C)[:, None]
        at_CV = ((wide * length + t_C)[:, None] * heads + head) * V + vs[None, :]
        tl.store(dv + at_CV, dv_CV.to(dv.dtype.element_ty), mask=inside_CV)
        g_all = g_next
    at_CK = (((wide * length + t_C)[:, None] * (heads // group) + shared) * splits + split) * K + ks[None, :]
    tl.store(dk + at_CK, dk_CK.to(dk.dtype.element_ty), mask=(t_C < length)[:, None] & (ks < K)[None, :])
