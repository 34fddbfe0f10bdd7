"""One walk over chunks is the whole of linear attention with scalar decays.

With cumulated log decay G and rows a, b [T, D], c [T, E], a walk computes

    out_i = sum_{j <= i} exp(G_i - G_j) (a_i . b_j) c_j,        in reverse: sum_{j >= i} exp(G_j - G_i) (a_i . b_j) c_j

by holding the matrix state sum_j decay_j b_j c_j^T of everything before the chunk in registers. The four uses are

    o  = walk(q, k, v)       dv = reverse walk(k, q, do)
    dq = walk(do, v, k)      dk = reverse walk(v, do, q)

so that no score matrix, no feature and no state between chunks ever reaches memory. The columns of c are split over
programs, which need no reduction among them.

A row of tokens is walked whole, or in pieces by programs of their own: packed sequences, which start from states of their
own, or equal segments of one long sequence, whose entering states follow from what `segment_kernel` summed over each.
Here are the walk and what its kernels share; `walk_forward_triton`, `walk_gradients_triton` and `walk_decays_triton` hold
these.

Shape legend: B batch, T time, H heads, P pieces, C tokens of a chunk, D width of a and b, E width of c.
"""

from __future__ import annotations

import triton
import triton.language as tl

NO_GATE, CONSTANT_GATE, SCALAR_GATE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
WHOLE, SEQUENCES, SEGMENTS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
NO_PROBE, STATE_PROBE, FULL_PROBE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _load_rows(base, stride, t_C, cols, length, WIDTH: tl.constexpr, DOT: tl.constexpr):
    """Rows t_C of a matrix with WIDTH columns, zero beyond its edges, in the dtype of the tensor cores."""
    mask = (t_C < length)[:, None] & (cols < WIDTH)[None, :]
    return tl.load(base + t_C[:, None].to(tl.int64) * stride + cols[None, :], mask=mask, other=0.0).to(DOT)


@triton.jit
def _gate_of(gate, batch, head, begin, length, heads, gate_every, GATE: tl.constexpr):
    """Where the log decays of a head start: one number, or one for each token, `heads` apart."""
    if GATE == SCALAR_GATE:
        return gate + (batch.to(tl.int64) * length + begin) * heads + head
    return gate + batch // gate_every * heads + head


@triton.jit
def _log_decays(gate, heads, t_C, start, length, C: tl.constexpr, SCALAR: tl.constexpr):
    """Log2 decays of a chunk: cumulated up to and with each token, and of the whole chunk; padding does not decay."""
    if SCALAR:
        step_C = tl.load(gate + t_C.to(tl.int64) * heads, mask=t_C < length, other=0.0) * LOG2_E
        return tl.cumsum(step_C, 0), tl.sum(step_C, 0)
    step = tl.load(gate) * LOG2_E
    return step * (tl.minimum(t_C + 1, length) - start).to(tl.float32), step * tl.minimum(length - start, C).to(tl.float32)


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
    row_start, col_start, row_stride, col_stride,
    ROWS: tl.constexpr, COLS: tl.constexpr, N_ROWS: tl.constexpr, N_COLS: tl.constexpr,
):  # fmt: skip
    """Offsets of a tile of a state [K, V] or of its transpose, and which of them exist."""
    row, col = row_start + tl.arange(0, ROWS), col_start + tl.arange(0, COLS)
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
    gate, gate_stride, state_DE, probe, probe_stride, rowsum, length, e_start,
    D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, C: tl.constexpr, GATE: tl.constexpr,
    REVERSE: tl.constexpr, OUT: tl.constexpr, PROBE: tl.constexpr, SIGN: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One head's walk for columns e_start .. e_start + BE of c and out; see the module docstring.

    Without OUT only the state is walked. A probe writes SIGN * sum_e probe * out for each row, which is this tile's part of the
    gradient of G: of what comes from the state, or of everything but what a token adds to itself. The latter has no decay, would
    cancel between q . dq and k . dk, and drown small gradients.

    Returns:
        The state after the last token, or in reverse before the first, and the log2 decay of the whole walk.
    """
    d = tl.arange(0, BD)
    e = e_start + tl.arange(0, BE)
    i = tl.arange(0, C)
    seen = (i[:, None] <= i[None, :]) if REVERSE else (i[:, None] >= i[None, :])
    total = tl.zeros([], tl.float32)
    n_chunks = tl.cdiv(length, C)
    for n in tl.range(0, n_chunks, num_stages=STAGES):
        start = ((n_chunks - 1 - n) if REVERSE else n) * C
        t_C = start + i
        b_CD = _load_rows(b, b_stride, t_C, d, length, D, DOT)
        c_CE = _load_rows(c, c_stride, t_C, e, length, E, DOT)
        if OUT:
            a_CD = _load_rows(a, a_stride, t_C, d, length, D, DOT)
            scores_CC = tl.dot(a_CD, tl.trans(b_CD), input_precision=PRECISION)
            out_CE = tl.dot(a_CD, state_DE.to(DOT), input_precision=PRECISION)
        write_DC = tl.trans(b_CD)
        if GATE != NO_GATE:
            g_C, g_all = _log_decays(gate, gate_stride, t_C, start, length, C, GATE == SCALAR_GATE)
            # Only exponents that are <= 0 are used; those of later tokens would overflow and are masked before.
            if REVERSE:
                pair_CC, read_C, keep_C = g_C[None, :] - g_C[:, None], g_all - g_C, g_C
            else:
                pair_CC, read_C, keep_C = g_C[:, None] - g_C[None, :], g_C, g_all - g_C
            if OUT:
                scores_CC = scores_CC * tl.exp2(tl.where(seen, pair_CC, float("-inf")))
                out_CE = out_CE * tl.exp2(read_C)[:, None]
            write_DC = (write_DC.to(tl.float32) * tl.exp2(keep_C)[None, :]).to(DOT)
            state_DE = state_DE * tl.exp2(g_all)
            total += g_all
        elif OUT:
            scores_CC = tl.where(seen, scores_CC, 0.0)
        t_rows, in_out = t_C.to(tl.int64), (t_C < length)[:, None] & (e < E)[None, :]
        if PROBE == STATE_PROBE:
            probe_CE = tl.load(probe + t_rows[:, None] * probe_stride + e[None, :], mask=in_out, other=0.0).to(DOT)
            tl.store(rowsum + t_rows, SIGN * tl.sum(out_CE * probe_CE.to(tl.float32), 1), mask=t_C < length)
        if PROBE == FULL_PROBE:
            own_C = tl.sum(tl.where(i[:, None] == i[None, :], scores_CC, 0.0), 1)
            scores_CC = tl.where(i[:, None] == i[None, :], 0.0, scores_CC)
        if OUT:
            out_CE = tl.dot(scores_CC.to(DOT), c_CE, out_CE, input_precision=PRECISION)
        state_DE = tl.dot(write_DC, c_CE, state_DE, input_precision=PRECISION)
        if OUT:
            if PROBE == FULL_PROBE:
                probe_CE = tl.load(probe + t_rows[:, None] * probe_stride + e[None, :], mask=in_out, other=0.0).to(DOT)
                tl.store(rowsum + t_rows, SIGN * tl.sum(out_CE * probe_CE.to(tl.float32), 1), mask=t_C < length)
                out_CE += own_C[:, None] * c_CE.to(tl.float32)
            tl.store(out + t_rows[:, None] * out_stride + e[None, :], out_CE.to(out.dtype.element_ty), mask=in_out)
    return state_DE, total
