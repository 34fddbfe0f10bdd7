"""The forward walk, and what segments of a long row add to its state; see `kernels.walks.walk_triton`.

Shape legend: B batch, T time, H heads, P pieces, C tokens of a chunk, K key, V value width.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels._entry import entry
from kernels.walks.walk_triton import (
    NO_PROBE,
    SEGMENTS,
    _bounds,
    _gate_of,
    _initial,
    _place,
    _state_of,
    _state_tile,
    _walk,
)
from kernels.walks.walk_turned_triton import _walk_turned


@triton.jit
def _walk_either(
    a, a_stride, b, b_stride, c, c_stride, out, out_stride,
    gate, gate_stride, state, probe, probe_stride, rowsum, length, e_start,
    D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, C: tl.constexpr, GATE: tl.constexpr,
    REVERSE: tl.constexpr, PROBE: tl.constexpr, SIGN: tl.constexpr, TURNED: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The walk with or without transposed outputs, whose state has rows of c or of b; returns the last state."""
    if TURNED:
        state = _walk_turned(
            a, a_stride, b, b_stride, c, c_stride, out, out_stride,
            gate, gate_stride, state, probe, probe_stride, rowsum, length, e_start,
            D, E, BD, BE, C, GATE, REVERSE, PROBE, SIGN, DOT, PRECISION, STAGES,
        )  # fmt: skip
    else:
        state, _ = _walk(
            a, a_stride, b, b_stride, c, c_stride, out, out_stride,
            gate, gate_stride, state, probe, probe_stride, rowsum, length, e_start,
            D, E, BD, BE, C, GATE, REVERSE, True, PROBE, SIGN, DOT, PRECISION, STAGES,
        )  # fmt: skip
    return state


@entry
def forward_kernel(
    q, k, v, gate, first, o, last, starts, sums, decays, entering,
    q_b: tl.int64, q_t: tl.int64, q_h: tl.int64, k_b: tl.int64, k_t: tl.int64, k_h: tl.int64,
    v_b: tl.int64, v_t: tl.int64, v_h: tl.int64,
    length: tl.int32, heads: tl.int32, group: tl.int32, gate_every: tl.int32, pieces: tl.int32, segment: tl.int32,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, UNIT: tl.constexpr, C: tl.constexpr,
    GATE: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr, PIECES: tl.constexpr, TURNED: tl.constexpr,
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
    if TURNED:
        offsets, inside = _state_tile(tile * BV, 0, 1, V, BV, BK, V, K)
    else:
        offsets, inside = _state_tile(0, tile * BV, V, 1, BK, BV, K, V)
    first_tile = _initial(first, sums, decays, batch, head, piece, heads, pieces, offsets, inside, K * V, FIRST, PIECES, False)
    if PIECES == SEGMENTS:
        index = (wide * pieces + piece) * heads + head
        tl.store(entering + index * K * V + offsets, first_tile, mask=inside)
    last_tile = _walk_either(
        q + (wide * q_b + skipped * q_t + shared * q_h) * UNIT, q_t * UNIT,
        k + (wide * k_b + skipped * k_t + shared * k_h) * UNIT, k_t * UNIT,
        v + (wide * v_b + skipped * v_t + head * v_h) * UNIT, v_t * UNIT,
        o + ((wide * length + skipped) * heads + head) * V, heads * V,
        _gate_of(gate, batch, head, begin, length, heads, gate_every, GATE), heads, first_tile, q, 0, q,
        count, tile * BV,
        K, V, BK, BV, C, GATE, False, NO_PROBE, 1, TURNED, DOT, PRECISION, STAGES,
    )  # fmt: skip
    if LAST:
        tl.store(last + state + offsets, last_tile, mask=inside & ((PIECES != SEGMENTS) | (piece == pieces - 1)))


@entry
def segment_kernel(
    b, c, gate, sums, decays,
    b_b: tl.int64, b_t: tl.int64, b_h: tl.int64, c_b: tl.int64, c_t: tl.int64, c_h: tl.int64,
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
    state_KV, total = _walk(
        b, 0, b + (wide * b_b + skipped * b_t + (head // group) * b_h) * UNIT, b_t * UNIT,
        c + (wide * c_b + skipped * c_t + head * c_h) * UNIT, c_t * UNIT, b, 0,
        _gate_of(gate, batch, head, begin, length, heads, gate_every, GATE), heads, tl.zeros([BK, BV], tl.float32), b, 0, b,
        count, tile * BV,
        K, V, BK, BV, C, GATE, REVERSE, False, NO_PROBE, 1, DOT, PRECISION, STAGES,
    )  # fmt: skip
    offsets, inside = _state_tile(0, tile * BV, V, 1, BK, BV, K, V)
    index = (wide * pieces + piece) * heads + head
    tl.store(sums + index * K * V + offsets, state_KV, mask=inside)
    tl.store(decays + index, total)
