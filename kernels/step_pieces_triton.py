"""Pieces of the decoding step's kernel: what happens to a token around the state of its head, one flag each.

Shape legend: K key, V value width.
"""

from __future__ import annotations

import triton
import triton.language as tl

NO_GATE, SCALAR_GATE, VECTOR_GATE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
LOG, RATE, SIGMOID = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
NO_NORM, RMS_NORM, LAYER_NORM, ROW_NORM, SUM_NORM = (tl.constexpr(i) for i in range(5))
NO_OUTPUT_GATE, SILU_GATE, SIGMOID_GATE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
ALONE, PER_HEAD, PER_ROW = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
UNIT_EPS = tl.constexpr(1e-6)
SPAN = tl.constexpr(1024)
"""Channels that the last program of a group handles at once."""


@triton.jit
def softplus(x):
    """log(1 + exp(x)), without overflow."""
    return tl.maximum(x, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(x)))


@triton.jit
def filtered(
    x, tail, taps, bias, channel, inside, channels, TAPS: tl.constexpr, BIAS: tl.constexpr, SILU: tl.constexpr
):  # fmt: skip
    """Channels of the row `x` after the short convolution and its SiLU, and the last inputs, oldest first."""
    newest = tl.load(x + channel, mask=inside, other=0.0).to(tl.float32)
    y = newest
    first = newest
    second = newest
    if TAPS > 0:
        weights = taps + channel * TAPS
        y *= tl.load(weights + (TAPS - 1), mask=inside, other=0.0).to(tl.float32)
        for t in tl.static_range(TAPS - 1):
            past = tl.load(tail + t * channels + channel, mask=inside, other=0.0).to(tl.float32)
            y += past * tl.load(weights + t, mask=inside, other=0.0).to(tl.float32)
            if t == TAPS - 2:
                second = past
            elif t == TAPS - 3:
                first = past
    if BIAS:
        y += tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    if SILU:
        y *= tl.sigmoid(y)
    return y, first, second, newest


@triton.jit
def query_and_key(
    q, k, tail, taps, bias, q_place, k_place, i, in_keys, channels, TAPS: tl.constexpr, BIAS: tl.constexpr, SILU: tl.constexpr
):  # fmt: skip
    """Q and k as `filtered` makes them, then their channels, which of them exist, and their last inputs, side by side."""
    if TAPS > 0:
        # Both in one tile: Triton loads a tile of fewer elements than threads again for every row of the state.
        side = tl.arange(0, 2)[None, :]
        channel = tl.where(side == 0, q_place, k_place) + i[:, None]
        inside = in_keys[:, None] & (side < 2)
        qk, first, second, newest = filtered(q, tail, taps, bias, channel, inside, channels, TAPS, BIAS, SILU)
        q_K, k_K = tl.split(qk)
        return q_K, k_K, channel, inside, first, second, newest
    else:  # a branch of its own: Triton compiles what follows a return, and wants the same types of it
        q_K = filtered(q, tail, taps, bias, q_place + i, in_keys, channels, 0, False, SILU)[0]
        k_K = filtered(k, tail, taps, bias, k_place + i, in_keys, channels, 0, False, SILU)[0]
        return q_K, k_K, i, in_keys, q_K, q_K, q_K


@triton.jit
def keep(new_tail, channel, inside, channels, first, second, newest, TAPS: tl.constexpr):
    """Writes the inputs that the next token will see; every thread has read the old ones."""
    place = new_tail + channel
    if TAPS > 3:
        tl.store(place + (TAPS - 4) * channels, first.to(new_tail.dtype.element_ty), mask=inside)
    if TAPS > 2:
        tl.store(place + (TAPS - 3) * channels, second.to(new_tail.dtype.element_ty), mask=inside)
    tl.store(place + (TAPS - 2) * channels, newest.to(new_tail.dtype.element_ty), mask=inside)


@triton.jit
def move_on(x, tail, taps, bias, new_tail, first_channel, last_channel, channels, TAPS: tl.constexpr):
    """The same for channels that several programs have read; `tail` may be `new_tail`."""
    for start in range(first_channel, last_channel, SPAN):
        channel = start + tl.arange(0, SPAN)
        inside = channel < last_channel
        _, first, second, newest = filtered(x, tail, taps, bias, channel, inside, channels, TAPS, False, False)
        tl.debug_barrier()
        keep(new_tail, channel, inside, channels, first, second, newest, TAPS)


@triton.jit
def log_decay_of(x, bias, rate, scale, DECAY: tl.constexpr):
    """The log decay of what is given for it, and the time step on the way there."""
    time_step = softplus(x + bias) if DECAY == RATE else softplus(-x)
    if DECAY == RATE:
        x = -tl.exp(rate) * time_step
    elif DECAY == SIGMOID:
        x = -time_step * scale
    return x, time_step


@triton.jit
def decayed(
    state_KV, u_V, decay_base, decay_bias, log_rate, head, i, in_keys, scale,
    K: tl.constexpr, GATE: tl.constexpr, DECAY: tl.constexpr, STEPPED: tl.constexpr,
):  # fmt: skip
    """The decayed state, what is written to it, and the decay."""
    kept, bias, rate = 1.0, 0.0, 0.0
    if DECAY == RATE:
        rate = tl.load(log_rate + head).to(tl.float32)
    if GATE == SCALAR_GATE:
        if DECAY == RATE:
            bias = tl.load(decay_bias + head).to(tl.float32)
        log_decay, time_step = log_decay_of(tl.load(decay_base).to(tl.float32), bias, rate, scale, DECAY)
        if STEPPED:
            u_V *= time_step
        kept = tl.exp(log_decay)
        state_KV *= kept
    elif GATE == VECTOR_GATE:
        if DECAY == RATE:
            bias = tl.load(decay_bias + head * K + i, mask=in_keys, other=0.0).to(tl.float32)
        given_K = tl.load(decay_base + i, mask=in_keys, other=0.0).to(tl.float32)
        kept = tl.exp(log_decay_of(given_K, bias, rate, scale, DECAY)[0])
        state_KV *= kept[:, None]
    return state_KV, u_V, kept


@triton.jit
def written(state_KV, q_K, k_K, u_V, k_scale, beta, max_beta, DELTA: tl.constexpr, OPEN_BETA: tl.constexpr):
    """The state with the token, and what the query reads from it."""
    if DELTA:
        strength = tl.load(beta).to(tl.float32)
        if OPEN_BETA:
            strength = max_beta * tl.sigmoid(strength)
        u_V = strength * (u_V - k_scale * tl.sum(k_K[:, None] * state_KV, 0))
    u_V *= k_scale
    y_V = tl.sum(q_K[:, None] * state_KV, 0) + tl.sum(k_K * q_K, 0) * u_V
    return state_KV + k_K[:, None] * u_V[None, :], y_V


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
    V: tl.constexpr, NORM: tl.constexpr, HEAD_NORM: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr,
    OUTPUT_GATE: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """The output of these columns, or, where others are needed to norm them, its raw numbers."""
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
