"""One walk over chunks is the whole of linear attention with scalar decays.

With cumulated log decay G and rows a, b [T, D], c [T, E], a walk computes

    out_i = sum_{j <= i} exp(G_i - G_j) (a_i . b_j) c_j,        in reverse: sum_{j >= i} exp(G_j - G_i) (a_i . b_j) c_j

by holding the matrix state sum_j decay_j c_j b_j^T of everything before the chunk in registers. The four uses are

    o  = walk(q, k, v)       dv = reverse walk(k, q, do)
    dq = walk(do, v, k)      dk = reverse walk(v, do, q)

so that no score matrix, no feature and no state between chunks ever reaches memory. The columns of c are split over
programs, which need no reduction among them. The gradients are in `kernels.walk_gradients_triton`.

A row of tokens is walked whole, or in pieces by programs of their own: packed sequences, which start from states of their
own, or equal segments of one long sequence, whose entering states follow from what `segment_kernel` summed over each.

Shape legend: B batch, T time, H heads, P pieces, C tokens of a chunk, D width of a and b, E width of c.
"""

from __future__ import annotations

import triton
import triton.language as tl

NO_GATE, CONSTANT_GATE, SCALAR_GATE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
WHOLE, SEQUENCES, SEGMENTS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
NO_PROBE, STATE_PROBE, FULL_PROBE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
LOG2_E = tl.constexpr(1.4426950408889634)
UNSPECIALISED = (
    *("length", "batches", "heads", "group", "gate_every", "pieces", "segment"),
    *(f"{name}_{axis}" for name in ("q", "k", "v", "do", "b", "c", "gate") for axis in "bth"),
)
"""Sizes and strides of which neither a 1 nor a multiple of 16 may compile anything anew."""


@triton.jit
def _load_rows(base, stride, t_C, cols, length, WIDTH: tl.constexpr, DOT: tl.constexpr):
    """Rows t_C of a matrix with WIDTH columns, zero beyond its edges, in the dtype of the tensor cores."""
    mask = (t_C < length)[:, None] & (cols < WIDTH)[None, :]
    return tl.load(base + t_C[:, None].to(tl.int64) * stride + cols[None, :], mask=mask, other=0.0).to(DOT)


@triton.jit
def _log_decays(gate, gate_stride, t_C, start, length, C: tl.constexpr, SCALAR: tl.constexpr):
    """Log2 decays of a chunk: cumulated up to and with each token, and of the whole chunk; padding does not decay."""
    if SCALAR:
        step_C = tl.load(gate + t_C.to(tl.int64) * gate_stride, mask=t_C < length, other=0.0) * LOG2_E
        return tl.cumsum(step_C, 0), tl.sum(step_C, 0)
    step = tl.load(gate) * LOG2_E
    return step * (tl.minimum(t_C + 1, length) - start).to(tl.float32), step * tl.minimum(length - start, C).to(tl.float32)


@triton.jit
def _steps(gate, gate_stride, t_C, length, GATE: tl.constexpr):
    """Log2 decays of tokens t_C, zero where there are none; loaded a chunk ahead, since nothing else hides their latency."""
    if GATE == SCALAR_GATE:
        steps = tl.load(gate + t_C.to(tl.int64) * gate_stride, mask=(t_C >= 0) & (t_C < length), other=0.0) * LOG2_E
    elif GATE == CONSTANT_GATE:
        steps = tl.load(gate) * LOG2_E
    else:
        steps = tl.zeros([], tl.float32)
    return steps


@triton.jit
def _cumulated(steps, t_C, start, length, C: tl.constexpr, GATE: tl.constexpr):
    """What `_log_decays` gives, from `_steps`."""
    if GATE == SCALAR_GATE:
        g_C, g_all = tl.cumsum(steps, 0), tl.sum(steps, 0)
    else:
        g_C = steps * (tl.minimum(t_C + 1, length) - start).to(tl.float32)
        g_all = steps * tl.minimum(length - start, C).to(tl.float32)
    return g_C, g_all


@triton.jit
def _place(program, tiles, heads, pieces):
    """Which tile, head, piece and batch a program works on; neighbours read the same tokens."""
    rest = program // tiles
    return program % tiles, rest % heads, rest // heads % pieces, rest // heads // pieces


@triton.jit
def _bounds(starts, piece, segment, length, PIECES: tl.constexpr):
    """First token of a piece and its number of tokens."""
    if PIECES == SEQUENCES:
        begin = tl.load(starts + piece).to(tl.int32)
        count = tl.load(starts + piece + 1).to(tl.int32) - begin
    elif PIECES == SEGMENTS:
        begin = piece * segment
        count = tl.minimum(segment, length - begin)
    else:
        begin = 0
        count = length
    return begin, count


@triton.jit
def _state_of(batch, head, piece, heads, pieces, SIZE: tl.constexpr, PIECES: tl.constexpr):
    """Offset of a state that a caller gave or gets: one for each batch, or for each packed sequence."""
    owner = batch * pieces + piece if PIECES == SEQUENCES else batch
    return (owner.to(tl.int64) * heads + head) * SIZE


@triton.jit
def _state_tile(
    row_start, row_stride, col_stride, ROWS: tl.constexpr, COLS: tl.constexpr, N_ROWS: tl.constexpr, N_COLS: tl.constexpr
):  # fmt: skip
    """Offsets of a tile of a state, or of its transpose, from row `row_start` on, and which exist."""
    row, col = row_start + tl.arange(0, ROWS), tl.arange(0, COLS)
    return row[:, None] * row_stride + col[None, :] * col_stride, (row < N_ROWS)[:, None] & (col < N_COLS)[None, :]


@triton.jit
def _initial(
    given, sums, decays, batch, head, piece, heads, pieces, offsets, inside,
    SIZE: tl.constexpr, GIVEN: tl.constexpr, PIECES: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """A tile of the state that a piece starts from: the given one or zero, and what the segments between make of it."""
    state = tl.zeros(offsets.shape, tl.float32)
    if GIVEN:
        state += tl.load(given + _state_of(batch, head, piece, heads, pieces, SIZE, PIECES) + offsets, mask=inside, other=0.0)
    if PIECES == SEGMENTS:
        n_before = (pieces - 1 - piece) if REVERSE else piece
        for n in range(n_before):
            other = (pieces - 1 - n) if REVERSE else n
            index = (batch.to(tl.int64) * pieces + other) * heads + head
            summed = tl.load(sums + index * SIZE + offsets, mask=inside, other=0.0)
            state = state * tl.exp2(tl.load(decays + index)) + summed
    return state


@triton.jit
def _walk(
    a, a_stride, b, b_stride, c, c_stride, out, out_stride,
    gate, gate_stride, state_ED, probe, probe_stride, rowsum, rowsum_stride,
    length, e_start,
    D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, C: tl.constexpr, GATE: tl.constexpr,
    REVERSE: tl.constexpr, OUT: tl.constexpr, PROBE: tl.constexpr, SIGN: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One head's walk for columns e_start .. e_start + BE of c and out; see the module docstring.

    Everything is transposed, so that columns of c are the rows of every product: the scaled operand of the state's update then
    comes from registers and never returns to shared memory. Without OUT only the state is walked. A probe writes SIGN * sum_e
    probe * out for each row, which is this tile's part of the gradient of G: of what comes from the state, or of everything but
    what a token adds to itself. The latter has no decay, would cancel between q . dq and k . dk, and drown small gradients.

    Returns:
        The state after the last token, or in reverse before the first, and the log2 decay of the whole walk.
    """
    d = tl.arange(0, BD)
    e = e_start + tl.arange(0, BE)
    i = tl.arange(0, C)
    # scores[j, i] is what row j gives to row i
    seen = (i[:, None] >= i[None, :]) if REVERSE else (i[:, None] <= i[None, :])
    total = tl.zeros([], tl.float32)
    n_chunks = tl.cdiv(length, C)
    steps = _steps(gate, gate_stride, ((n_chunks - 1) * C if REVERSE else 0) + i, length, GATE)
    for n in tl.range(0, n_chunks, num_stages=STAGES):
        start = ((n_chunks - 1 - n) if REVERSE else n) * C
        t_C = start + i
        next_steps = _steps(gate, gate_stride, t_C + (-C if REVERSE else C), length, GATE)
        t_rows, in_out = t_C.to(tl.int64), (t_C < length)[None, :] & (e < E)[:, None]
        if PROBE != NO_PROBE:
            probe_EC = tl.load(probe + t_rows[None, :] * probe_stride + e[:, None], mask=in_out, other=0.0).to(DOT)
        b_CD = _load_rows(b, b_stride, t_C, d, length, D, DOT)
        c_CE = _load_rows(c, c_stride, t_C, e, length, E, DOT)
        if OUT:
            a_CD = _load_rows(a, a_stride, t_C, d, length, D, DOT)
            scores_CC = tl.dot(b_CD, tl.trans(a_CD), input_precision=PRECISION)
            out_EC = tl.dot(state_ED.to(DOT), tl.trans(a_CD), input_precision=PRECISION)
        write_EC = tl.trans(c_CE)
        if GATE != NO_GATE:
            g_C, g_all = _cumulated(steps, t_C, start, length, C, GATE)
            # Only exponents that are <= 0 are used; those of later tokens would overflow and are masked before.
            if REVERSE:
                pair_CC, read_C, keep_C = g_C[:, None] - g_C[None, :], g_all - g_C, g_C
            else:
                pair_CC, read_C, keep_C = g_C[None, :] - g_C[:, None], g_C, g_all - g_C
            if OUT:
                scores_CC = scores_CC * tl.exp2(tl.where(seen, pair_CC, float("-inf")))
                out_EC = out_EC * tl.exp2(read_C)[None, :]
            write_EC = (write_EC.to(tl.float32) * tl.exp2(keep_C)[None, :]).to(DOT)
            state_ED = state_ED * tl.exp2(g_all)
            total += g_all
        elif OUT:
            scores_CC = tl.where(seen, scores_CC, 0.0)
        if PROBE == STATE_PROBE:
            tl.store(rowsum + t_rows * rowsum_stride, SIGN * tl.sum(out_EC * probe_EC.to(tl.float32), 0), mask=t_C < length)
        if PROBE == FULL_PROBE:
            own_C = tl.sum(tl.where(i[:, None] == i[None, :], scores_CC, 0.0), 0)
            scores_CC = tl.where(i[:, None] == i[None, :], 0.0, scores_CC)
        if OUT:
            out_EC = tl.dot(tl.trans(c_CE), scores_CC.to(DOT), out_EC, input_precision=PRECISION)
        state_ED = tl.dot(write_EC, b_CD, state_ED, input_precision=PRECISION)
        if OUT:
            if PROBE == FULL_PROBE:
                tl.store(rowsum + t_rows * rowsum_stride, SIGN * tl.sum(out_EC * probe_EC.to(tl.float32), 0), mask=t_C < length)
                out_EC += own_C[None, :] * tl.trans(c_CE).to(tl.float32)
            tl.store(out + t_rows[None, :] * out_stride + e[:, None], out_EC.to(out.dtype.element_ty), mask=in_out)
        steps = next_steps
    return state_ED, total


@triton.jit(do_not_specialize=UNSPECIALISED)
def forward_kernel(
    q, k, v, gate, first, o, last, starts, sums, decays, entering,
    q_b: tl.int64, q_t: tl.int64, q_h: tl.int64, k_b: tl.int64, k_t: tl.int64, k_h: tl.int64,
    v_b: tl.int64, v_t: tl.int64, v_h: tl.int64,
    gate_b: tl.int64, gate_t: tl.int64,
    length: tl.int32, heads: tl.int32, group: tl.int32, gate_every: tl.int32, pieces: tl.int32, segment: tl.int32,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, UNIT: tl.constexpr, C: tl.constexpr,
    GATE: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr, PIECES: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Grid: (B * P * H * value tiles,). Strides of q, k, v count UNIT elements, which tells the compiler their alignment.

    `starts` are the bounds of packed sequences. `sums` and `decays` are those of `segment_kernel`; the state that enters each
    segment goes to `entering`, for the backward pass.
    """
    tile, head, piece, batch = _place(tl.program_id(0), (V + BV - 1) // BV, heads, pieces)
    begin, count = _bounds(starts, piece, segment, length, PIECES)
    wide, shared, skipped = batch.to(tl.int64), head // group, tl.cast(begin, tl.int64)
    state = _state_of(batch, head, piece, heads, pieces, K * V, PIECES)
    offsets, inside = _state_tile(tile * BV, 1, V, BV, BK, V, K)
    state_VK = _initial(first, sums, decays, batch, head, piece, heads, pieces, offsets, inside, K * V, FIRST, PIECES, False)
    if PIECES == SEGMENTS:
        index = (wide * pieces + piece) * heads + head
        tl.store(entering + index * K * V + offsets, state_VK, mask=inside)
    state_VK, _ = _walk(
        q + (wide * q_b + skipped * q_t + shared * q_h) * UNIT, q_t * UNIT,
        k + (wide * k_b + skipped * k_t + shared * k_h) * UNIT, k_t * UNIT,
        v + (wide * v_b + skipped * v_t + head * v_h) * UNIT, v_t * UNIT,
        o + ((wide * length + skipped) * heads + head) * V, heads * V,
        gate + (batch // gate_every) * gate_b + skipped * gate_t + head, gate_t, state_VK, q, 0, q, 0,
        count, tile * BV,
        K, V, BK, BV, C, GATE, False, True, NO_PROBE, 1, DOT, PRECISION, STAGES,
    )  # fmt: skip
    if LAST:
        tl.store(last + state + offsets, state_VK, mask=inside & ((PIECES != SEGMENTS) | (piece == pieces - 1)))


@triton.jit(do_not_specialize=UNSPECIALISED)
def segment_kernel(
    b, c, gate, sums, decays,
    b_b: tl.int64, b_t: tl.int64, b_h: tl.int64, c_b: tl.int64, c_t: tl.int64, c_h: tl.int64,
    gate_b: tl.int64, gate_t: tl.int64,
    length: tl.int32, heads: tl.int32, group: tl.int32, gate_every: tl.int32, pieces: tl.int32, segment: tl.int32,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, UNIT: tl.constexpr, C: tl.constexpr,
    GATE: tl.constexpr, REVERSE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """What a segment adds to the state, [B, P, H, K, V], and its log2 decay [B, P, H]; the last one to be walked is left out.

    Grid: (B * (P - 1) * H * value tiles,). Forward b and c are keys and values, in reverse queries and gradients of outputs.
    """
    tile, head, piece, batch = _place(tl.program_id(0), (V + BV - 1) // BV, heads, pieces - 1)
    if REVERSE:
        piece += 1
    begin, count = _bounds(b, piece, segment, length, SEGMENTS)
    wide, skipped = batch.to(tl.int64), tl.cast(begin, tl.int64)
    state_VK, total = _walk(
        b, 0, b + (wide * b_b + skipped * b_t + (head // group) * b_h) * UNIT, b_t * UNIT,
        c + (wide * c_b + skipped * c_t + head * c_h) * UNIT, c_t * UNIT, b, 0,
        gate + (batch // gate_every) * gate_b + skipped * gate_t + head, gate_t, tl.zeros([BV, BK], tl.float32), b, 0, b, 0,
        count, tile * BV,
        K, V, BK, BV, C, GATE, REVERSE, False, NO_PROBE, 1, DOT, PRECISION, STAGES,
    )  # fmt: skip
    offsets, inside = _state_tile(tile * BV, 1, V, BV, BK, V, K)
    index = (wide * pieces + piece) * heads + head
    tl.store(sums + index * K * V + offsets, state_VK, mask=inside)
    tl.store(decays + index, total)
