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
def inputs_of(newest, tail, taps, bias, channel, inside, channels, TAPS: tl.constexpr, BIAS: tl.constexpr):
    """What channels need to pass the short convolution: their last inputs, oldest first, the taps, and a bias.

    Loaded before the state is, so that nothing of it waits behind the state's bytes.
    """
    window, weights, offset = (), (), 0.0
    for t in tl.static_range(TAPS - 1):
        window = window + (tl.load(tail + t * channels + channel, mask=inside, other=0.0).to(tl.float32),)  # noqa: RUF005
    for t in tl.static_range(TAPS):
        weights = weights + (tl.load(taps + channel * TAPS + t, mask=inside, other=0.0).to(tl.float32),)  # noqa: RUF005
    if BIAS:
        offset = tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    return window + (newest,), weights, offset  # noqa: RUF005


@triton.jit
def query_and_key(q, k, q_place, k_place, i, in_keys, PLACES: tl.constexpr):
    """[K, PLACES], queries in the first place and keys in the second; their channels, and which of them exist."""
    place, side = beside(i, PLACES)
    inside = in_keys[:, None] & (side < 2)
    q_KP = tl.load(q + q_place + place, mask=inside & (side == 0), other=0.0).to(tl.float32)
    k_KP = tl.load(k + k_place + place, mask=inside & (side == 1), other=0.0).to(tl.float32)
    return q_KP + k_KP, tl.where(side == 0, q_place, k_place) + place, inside


@triton.jit
def apart(qk_KP, PLACES: tl.constexpr):
    """Queries [K] and keys [K]."""
    q_KP, k_KP = tl.split(tl.reshape(qk_KP, [qk_KP.shape[0], PLACES // 2, 2]))
    return first_place(q_KP, PLACES // 2), first_place(k_KP, PLACES // 2)


@triton.jit
def filtered(inputs, weights, offset, TAPS: tl.constexpr, SILU: tl.constexpr):
    """The channels of `inputs_of` after the short convolution and its SiLU."""
    if TAPS > 0:
        y = inputs[0] * weights[0]
        for t in tl.static_range(1, TAPS):
            y += inputs[t] * weights[t]
    else:
        y = inputs[0]
    y += offset
    if SILU:
        y *= tl.sigmoid(y)
    return y


@triton.jit
def beside(i, PLACES: tl.constexpr):
    """[i, PLACES]: so many places beside each element, and which they are.

    Triton loads a tile of fewer elements than threads again for every row of the state, and computes with all of them what one
    would have to; with places beside them, of which not all are used, the elements are enough.
    """
    side = tl.arange(0, PLACES)[None, :]
    return i[:, None] + 0 * side, side


@triton.jit
def keep(new_tail, channel, inside, channels, inputs, TAPS: tl.constexpr):
    """Writes the inputs that the next token will see; every thread has read the old ones."""
    for t in tl.static_range(TAPS - 1):
        tl.store(new_tail + t * channels + channel, inputs[t + 1].to(new_tail.dtype.element_ty), mask=inside)


@triton.jit
def move_on(x, tail, taps, new_tail, first_channel, last_channel, channels, TAPS: tl.constexpr):
    """The same for channels that several programs have read; `tail` may be `new_tail`."""
    for start in range(first_channel, last_channel, SPAN):
        channel = start + tl.arange(0, SPAN)
        inside = channel < last_channel
        newest = tl.load(x + channel, mask=inside, other=0.0).to(tl.float32)
        inputs, _, _ = inputs_of(newest, tail, taps, taps, channel, inside, channels, TAPS, False)
        tl.debug_barrier()
        keep(new_tail, channel, inside, channels, inputs, TAPS)


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
def decay_of(
    decay_base, decay_bias, log_rate, head, i, in_keys,
    K: tl.constexpr, GATE: tl.constexpr, DECAY: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    """What is given for the decay, its bias and the head's log rate; [K, PLACES] for a vector, whose first place counts."""
    given, bias, rate = 0.0, 0.0, 0.0
    if GATE == VECTOR_GATE:
        place, side = beside(i, PLACES)
        inside = in_keys[:, None] & (side == 0)
        given = tl.load(decay_base + place, mask=inside, other=0.0).to(tl.float32)
        if DECAY == RATE:
            bias = tl.load(decay_bias + head * K + place, mask=inside, other=0.0).to(tl.float32)
    elif GATE == SCALAR_GATE:
        given = tl.load(decay_base).to(tl.float32)
        if DECAY == RATE:
            bias = tl.load(decay_bias + head).to(tl.float32)
    if GATE and DECAY == RATE:
        rate = tl.load(log_rate + head).to(tl.float32)
    return given, bias, rate


@triton.jit
def first_place(x_KP, PLACES: tl.constexpr):
    """[K] of [K, PLACES]."""
    if PLACES == 1:
        x_K = tl.reshape(x_KP, [x_KP.shape[0]])
    else:
        even_KP, _ = tl.split(tl.reshape(x_KP, [x_KP.shape[0], PLACES // 2, 2]))
        x_K = first_place(even_KP, PLACES // 2)
    return x_K


@triton.jit
def decayed(
    state_KV, u_V, given, bias, rate, scale, GATE: tl.constexpr, DECAY: tl.constexpr, STEPPED: tl.constexpr, PLACES: tl.constexpr
):  # fmt: skip
    """The decayed state, what is written to it, and the decay."""
    kept = 1.0
    if GATE:
        log_decay, time_step = log_decay_of(given, bias, rate, scale, DECAY)
        kept = tl.exp(log_decay)
        if GATE == VECTOR_GATE:
            kept = tl.sum(tl.where(tl.arange(0, PLACES)[None, :] == 0, kept, 0.0), 1)
            state_KV *= kept[:, None]
        else:
            state_KV *= kept
        if STEPPED:
            u_V *= time_step
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
