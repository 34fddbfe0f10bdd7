"""The gradient of the log decays of `kernels.walks.walk_triton`, from what the walks back leave behind.

Shape legend: B batch, T time, H heads, P pieces, N chunks of C tokens.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels._entry import entry
from kernels.walks.walk_triton import LOG2_E, SCALAR_GATE, _bounds, _gate_of, _place

FORGOTTEN = tl.constexpr(-24.0)
"""Log2 decay of a chunk below which fp32 sees nothing of what entered it beside what is as large."""


@triton.jit
def _then(keeps_1, x_1, keeps_2, x_2):
    """One map s -> keeps_1 s + x_1, then s -> keeps_2 s + x_2."""
    return keeps_1 * keeps_2, keeps_2 * x_1 + x_2


@triton.jit
def _sums_from(x_N, stops_N, later):
    """Sums of each number and those behind it, up to the first that stops, or with `later` where none does."""
    keeps_N = tl.flip(tl.where(stops_N, 0.0, 1.0), 0)
    keeps_N, sums_N = tl.associative_scan((keeps_N, tl.flip(x_N, 0)), 0, _then)
    return tl.flip(sums_N + keeps_N * later, 0)


@entry
def decay_gradient_kernel(
    rowsums, gate, starts, ends, out, part_stride: tl.int64, head_stride: tl.int64,
    length: tl.int32, heads: tl.int32, gate_every: tl.int32, pieces: tl.int32, segment: tl.int32,
    PARTS: tl.constexpr, READS: tl.constexpr, GATE: tl.constexpr, ENDS: tl.constexpr, APART: tl.constexpr,
    PIECES: tl.constexpr, ROWS: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """dL/dlog_decay_t = sum of dL/dG_i over i >= t of the sequence, and `ends`, what crosses its end [B, H].

    Grid: (B * P * H,). A segment is whole chunks and sums what is behind it first, unless pieces have ends of their own, [B, P, H]
    (APART). `rowsums` is [parts, B * H, T] by its strides,
    `out` [B, T, H]. Where READS parts are what queries read from earlier chunks, the others sum over a chunk to what its keys give
    to later ones, less: pairs of the chunk cancel. If it forgets what entered it, that is all that crosses its end, and sums start
    anew there, from numbers that were rounded in one walk.
    """
    _, head, piece, batch = _place(tl.program_id(0), 1, heads, pieces)
    begin, count = _bounds(starts, piece, segment, length, PIECES)
    behind = begin + count if APART else length
    rowsums += (batch * heads + head) * head_stride
    out += batch.to(tl.int64) * length * heads + head
    gate = _gate_of(gate, batch, head, 0, length, heads, gate_every, GATE)
    token_NC = tl.arange(0, ROWS // C)[:, None] * C + tl.arange(0, C)[None, :]
    later = tl.zeros([], tl.float32)
    if ENDS:
        owner = batch * pieces + piece if APART else batch
        later += tl.load(ends + owner * heads + head)
    n_blocks = tl.cdiv(behind - begin, ROWS)
    for n in range(n_blocks):
        first = begin + (n_blocks - 1 - n) * ROWS
        t_NC = first + token_NC
        own_NC = tl.zeros(token_NC.shape, tl.float32)
        for part in tl.static_range(READS, PARTS):
            own_NC += tl.load(rowsums + part * part_stride + t_NC, mask=t_NC < behind, other=0.0)
        given_N = -tl.sum(own_NC, 1)
        for part in tl.static_range(READS):
            own_NC += tl.load(rowsums + part * part_stride + t_NC, mask=t_NC < behind, other=0.0)
        total_N = tl.sum(own_NC, 1)
        if READS > 0:
            if GATE == SCALAR_GATE:
                decay_NC = tl.load(gate + t_NC.to(tl.int64) * heads, mask=t_NC < behind, other=0.0)
            else:
                decay_NC = tl.where(t_NC < behind, tl.load(gate), 0.0)
            forgets_N = tl.sum(decay_NC, 1) * LOG2_E < FORGOTTEN
            starting_N = _sums_from(total_N + tl.where(forgets_N, given_N, 0.0), forgets_N, later)
            later_N = tl.where(forgets_N, given_N, starting_N - total_N)
        else:
            starting_N = later + tl.cumsum(total_N, 0, reverse=True)
            later_N = starting_N - total_N
        if first < begin + count:
            sums_NC = later_N[:, None] + tl.cumsum(own_NC, 1, reverse=True)
            tl.store(out + t_NC.to(tl.int64) * heads, sums_NC, mask=t_NC < begin + count)
        later = tl.sum(tl.where(tl.arange(0, ROWS // C) == 0, starting_N, 0.0), 0)
