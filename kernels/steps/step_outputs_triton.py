"""Pieces of the decoding step's kernel: what happens to outputs, and what the last program of a group does.

Shape legend: K key, V value width.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.steps.step_pieces_triton import (
    ALONE,
    LAYER_NORM,
    NO_OUTPUT_GATE,
    PER_HEAD,
    PER_ROW,
    RMS_NORM,
    ROW_NORM,
    SILU_GATE,
    SPAN,
    SUM_NORM,
    keep,
    move_on,
)


@triton.jit
def opened(y, gate, j, inside, OUTPUT_GATE: tl.constexpr):
    """An output times its gate."""
    if OUTPUT_GATE:
        x = tl.load(gate + j, mask=inside, other=0.0).to(tl.float32)
        y *= tl.sigmoid(x)
        if OUTPUT_GATE == SILU_GATE:
            y *= x
    return y


@triton.jit
def normed(y, mean, rstd, weight, bias, j, inside, WEIGHT: tl.constexpr, BIAS: tl.constexpr):
    """(y - mean) / deviation, and the affine map."""
    y = (y - mean) * rstd
    if WEIGHT:
        y *= tl.load(weight + j, mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        y += tl.load(bias + j, mask=inside, other=0.0).to(tl.float32)
    return y


@triton.jit
def norm_raw(
    raw, weight, bias, gate, o, width, eps,
    NORM: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, OUTPUT_GATE: tl.constexpr,
):  # fmt: skip
    """Norms `width` numbers that several programs wrote, reading past this SM's own cache."""
    mean = 0.0
    if NORM == LAYER_NORM:
        for start in range(0, width, SPAN):
            j = start + tl.arange(0, SPAN)
            mean += tl.sum(tl.load(raw + j, mask=j < width, other=0.0, cache_modifier=".cg"), 0)
        mean /= width
    square = 0.0
    for start in range(0, width, SPAN):
        j = start + tl.arange(0, SPAN)
        y = tl.load(raw + j, mask=j < width, other=mean, cache_modifier=".cg") - mean
        square += tl.sum(y * y, 0)
    rstd = tl.rsqrt(square / width + eps)
    for start in range(0, width, SPAN):
        j = start + tl.arange(0, SPAN)
        y = tl.load(raw + j, mask=j < width, other=0.0, cache_modifier=".cg")
        y = normed(y, mean, rstd, weight, bias, j, j < width, WEIGHT, BIAS)
        y = opened(y, gate, j, j < width, OUTPUT_GATE)
        tl.store(o + j, y.to(o.dtype.element_ty), mask=j < width)


@triton.jit
def write_output(
    y_V, raw, o, weight, bias, gate, j, in_values, eps,
    V: tl.constexpr, NORM: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr,
    OUTPUT_GATE: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """The output of these columns, or, where others are needed to norm them, its raw numbers."""
    HEAD_NORM: tl.constexpr = NORM == RMS_NORM or NORM == LAYER_NORM  # noqa: PLR1714 - Triton has no `in`
    if NORM == ROW_NORM:
        tl.store(raw + j, opened(y_V, gate, j, in_values, OUTPUT_GATE), mask=in_values)
    elif TOGETHER == PER_HEAD and HEAD_NORM:
        tl.store(raw + j, y_V, mask=in_values)
    else:
        if HEAD_NORM:
            mean = tl.sum(tl.where(in_values, y_V, 0.0), 0) / V if NORM == LAYER_NORM else 0.0
            centred_V = tl.where(in_values, y_V - mean, 0.0)
            rstd = tl.rsqrt(tl.sum(centred_V * centred_V, 0) / V + eps)
            y_V = normed(y_V, mean, rstd, weight, bias, j, in_values, WEIGHT, BIAS)
        y_V = opened(y_V, gate, j, in_values, OUTPUT_GATE)
        tl.store(o + j, y_V.to(o.dtype.element_ty), mask=in_values)


@triton.jit
def is_last(arrived, head_index, batch, heads, TILES: tl.constexpr, TOGETHER: tl.constexpr):
    """Whether no program of those that wait for each other is still to come."""
    if TOGETHER == ALONE:
        return True
    tl.debug_barrier()  # what this program wrote, all of its threads have written
    if TOGETHER == PER_HEAD:
        return tl.atomic_add(arrived + head_index, 1) == TILES - 1
    return tl.atomic_add(arrived + batch, 1) == heads * TILES - 1


@triton.jit
def finish(
    q_base, tail_base, taps, new_tail_base, q_at, k_at, width, channel, inside, channels, inputs, new_sums, sums_K, in_keys,
    raw_row, o_row, raw_head, o_head, row_width, weight, bias, weight_head, bias_head, gate_row, gate_head, eps,
    V: tl.constexpr, TAPS: tl.constexpr, NORM: tl.constexpr, NORM_WEIGHT: tl.constexpr, NORM_BIAS: tl.constexpr,
    OUTPUT_GATE: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """What only the last program of a group can do: overwrite what all have read, norm what all have written."""
    if NORM == SUM_NORM:
        tl.debug_barrier()
        tl.store(new_sums, sums_K.to(new_sums.dtype.element_ty), mask=in_keys)
    if TAPS > 1:
        if TOGETHER == PER_ROW:
            move_on(q_base, tail_base, taps, new_tail_base, q_at, q_at + width, channels, TAPS)
            move_on(q_base, tail_base, taps, new_tail_base, k_at, k_at + width, channels, TAPS)
        else:
            keep(new_tail_base, channel, inside, channels, inputs, TAPS)
    if NORM == ROW_NORM:
        norm_raw(raw_row, weight, bias, gate_row, o_row, row_width, eps, NORM, NORM_WEIGHT, NORM_BIAS, NO_OUTPUT_GATE)
    elif TOGETHER == PER_HEAD and (NORM == RMS_NORM or NORM == LAYER_NORM):  # noqa: PLR1714, SIM109 - Triton has no `in`
        norm_raw(raw_head, weight_head, bias_head, gate_head, o_head, V, eps, NORM, NORM_WEIGHT, NORM_BIAS, OUTPUT_GATE)
