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
from kernels.walks.walk_triton import (
    CONSTANT_GATE,
    LOG2_E,
    NO_GATE,
    SCALAR_GATE,
    SEGMENTS,
    _bounds,
    _initial,
    _load_rows,
    _place,
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
        tl.store(kept + tl.cast(chunk, tl.int64) * heads * K * V + at_KV, state_KV.to(DOT), mask=in_KV)
        write_KC = tl.trans(_load_rows(b, b_t * UNIT, t_C, ks, count, K, DOT))
        c_CV = _load_rows(c, c_t * UNIT, t_C, vs, count, V, DOT)
        if GATE != NO_GATE:
            g_C = _sums_at(gate, g_all, t_C, chunk * C, count, GATE == SCALAR_GATE)
            write_KC = (write_KC.to(tl.float32) * tl.exp2(g_C if REVERSE else g_all - g_C)[None, :]).to(DOT)
            state_KV *= tl.exp2(g_all)
        state_KV = tl.dot(write_KC, c_CV, state_KV, input_precision=PRECISION)
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
def _decay_pairs(pairs_CC, g_rows, g_cols, seen, GATE: tl.constexpr):
    """Pairs of tokens with their decay exp(g_rows - g_cols); those that do not see each other are zero."""
    if GATE == NO_GATE:
        return tl.where(seen, pairs_CC, 0.0)
    return pairs_CC * tl.exp2(tl.where(seen, g_rows[:, None] - g_cols[None, :], float("-inf")))


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
    scores_CC = tl.dot(q_CK, tl.trans(k_CK), input_precision=PRECISION)
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
        g_C = tl.zeros([C], tl.float32)
        if GATE != NO_GATE:
            own = _sums_of(gate, batch, head, length, heads, gate_every, GATE)
            g_C = _sums_at(own, g_all, t_C, start, length, GATE == SCALAR_GATE)
            o_CV *= tl.exp2(g_C)[:, None]
        pairs_CC = _decay_pairs(scores_CC, g_C, g_C, i[:, None] >= i[None, :], GATE)
        o_CV = tl.dot(pairs_CC.to(DOT), v_CV, o_CV, input_precision=PRECISION)
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
    per_split = group // splits
    first = shared * group + split * per_split
    g_all = _decay_of_head(gate, batch, first, start, length, heads, gate_every, C, GATE)
    for head in tl.range(first, first + per_split, num_stages=STAGES):
        following = tl.minimum(head + 1, first + per_split - 1)
        g_next = _decay_of_head(gate, batch, following, start, length, heads, gate_every, C, GATE)
        v_CV = _load_rows(v + (wide * v_b + head * v_h) * UNIT, v_t * UNIT, t_C, vs, length, V, DOT)
        do_CV = _load_rows(do + (wide * do_b + head * do_h) * UNIT, do_t * UNIT, t_C, vs, length, V, DOT)
        state_KV = tl.load(kept + ((wide * chunks + chunk) * heads + head) * K * V + at_KV, mask=in_KV, other=0.0)
        g_C = tl.zeros([C], tl.float32)
        read_CV = do_CV
        if GATE != NO_GATE:
            own = _sums_of(gate, batch, head, length, heads, gate_every, GATE)
            g_C = _sums_at(own, g_all, t_C, start, length, GATE == SCALAR_GATE)
            scaled_CV = do_CV.to(tl.float32) * tl.exp2(g_C)[:, None]
            read_CV = scaled_CV.to(DOT)
            if GATE_GRAD:
                earlier_CV = tl.dot(q_CK, state_KV, input_precision=PRECISION)
                at_C = (wide * heads + head) * length + t_C
                tl.store(rowsums + at_C, tl.sum(earlier_CV * scaled_CV, 1), mask=t_C < length)
        dq_CK = tl.dot(read_CV, tl.trans(state_KV), dq_CK, input_precision=PRECISION)
        pairs_CC = tl.dot(do_CV, tl.trans(v_CV), input_precision=PRECISION)
        pairs_CC = _decay_pairs(pairs_CC, g_C, g_C, i[:, None] >= i[None, :], GATE)
        dq_CK = tl.dot(pairs_CC.to(DOT), k_CK, dq_CK, input_precision=PRECISION)
        g_all = g_next
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

    Pairs inside of the chunk cancel as in `kernels.walks.walk_gradients_triton._walk_keys_and_values`.

    Grid: (B * N * G * splits,).
    """
    batch, chunk, shared, split = _share(tl.program_id(0), chunks, heads // group, splits)
    wide, start = batch.to(tl.int64), chunk * C
    ks, vs, i = tl.arange(0, BK), tl.arange(0, BV), tl.arange(0, C)
    t_C = start + i
    q_CK = _load_rows(q + (wide * q_b + shared * q_h) * UNIT, q_t * UNIT, t_C, ks, length, K, DOT)
    k_CK = _load_rows(k + (wide * k_b + shared * k_h) * UNIT, k_t * UNIT, t_C, ks, length, K, DOT)
    scores_CC = tl.dot(k_CK, tl.trans(q_CK), input_precision=PRECISION)
    at_KV, in_KV = _state_tile(0, 0, V, 1, BK, BV, K, V)
    inside_CV = (t_C < length)[:, None] & (vs < V)[None, :]
    seen = i[:, None] <= i[None, :]
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
        write_CV = v_CV
        g_C = tl.zeros([C], tl.float32)
        later_C = tl.zeros([C], tl.float32)
        if GATE != NO_GATE:
            own = _sums_of(gate, batch, head, length, heads, gate_every, GATE)
            g_C = _sums_at(own, g_all, t_C, start, length, GATE == SCALAR_GATE)
            keep_C1 = tl.exp2(g_all - g_C)[:, None]
            dv_CV *= keep_C1
            write_CV = (v_CV.to(tl.float32) * keep_C1).to(DOT)
        dk_CK = tl.dot(write_CV, tl.trans(dstate_KV), dk_CK, input_precision=PRECISION)
        if GATE_GRAD:
            later_C = tl.sum(dv_CV * v_CV.to(tl.float32), 1)
        kq_CC = _decay_pairs(scores_CC, -g_C, -g_C, seen, GATE)
        dv_CV = tl.dot(kq_CC.to(DOT), do_CV, dv_CV, input_precision=PRECISION)
        at_CV = ((wide * length + t_C)[:, None] * heads + head) * V + vs[None, :]
        tl.store(dv + at_CV, dv_CV.to(dv.dtype.element_ty), mask=inside_CV)
        vo_CC = _decay_pairs(tl.dot(v_CV, tl.trans(do_CV), input_precision=PRECISION), -g_C, -g_C, seen, GATE)
        if GATE_GRAD:
            pairs_CC = tl.where(i[:, None] == i[None, :], 0.0, scores_CC * vo_CC)
            at_C = (wide * heads + head) * length + t_C
            tl.store(rowsums + at_C, tl.sum(pairs_CC, 0) - tl.sum(pairs_CC, 1) - later_C, mask=t_C < length)
        dk_CK = tl.dot(vo_CC.to(DOT), q_CK, dk_CK, input_precision=PRECISION)
        g_all = g_next
    at_CK = (((wide * length + t_C)[:, None] * (heads // group) + shared) * splits + split) * K + ks[None, :]
    tl.store(dk + at_CK, dk_CK.to(dk.dtype.element_ty), mask=(t_C < length)[:, None] & (ks < K)[None, :])
