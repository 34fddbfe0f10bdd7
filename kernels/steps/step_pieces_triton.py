"""Pieces of the decoding step's kernel: what happens to a token on its way into the state of its head, one flag each.

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
def load_state(old, offsets, in_keys, in_values, WHOLE: tl.constexpr):
    """A tile of a state; WHOLE tiles need no mask."""
    if WHOLE:
        state_KV = tl.load(old + offsets).to(tl.float32)
    else:
        state_KV = tl.load(old + offsets, mask=in_keys[:, None] & in_values[None, :], other=0.0).to(tl.float32)
    return state_KV


@triton.jit
def store_state(new, offsets, state_KV, in_keys, in_values, WHOLE: tl.constexpr):
    """The reverse of `load_state`."""
    if WHOLE:
        tl.store(new + offsets, state_KV.to(new.dtype.element_ty))
    else:
        tl.store(new + offsets, state_KV.to(new.dtype.element_ty), mask=in_keys[:, None] & in_values[None, :])


@triton.jit
def scales_of(q_K, k_K, q_scale, k_scale, UNIT: tl.constexpr):
    """Factors of what queries read and of what keys write: sums over the state are linear in both and need not wait for lengths."""
    if UNIT:
        q_scale *= tl.rsqrt(tl.sum(q_K * q_K, 0) + UNIT_EPS)
        k_scale *= tl.rsqrt(tl.sum(k_K * k_K, 0) + UNIT_EPS)
    return q_scale, k_scale


@triton.jit
def inputs_of(newest, tail, taps, bias, channel, inside, channels, TAPS: tl.constexpr, BIAS: tl.constexpr):
    """What channels need to pass the short convolution: their last inputs, oldest first, the taps, and a bias.

    Loaded before the state is, so that nothing of it waits behind the state's bytes.
    """
    window, weights, offset = (), (), 0.0
    for t in tl.static_range(TAPS - 1):
        window = window + (tl.load(tail + t * channels + channel, mask=inside, other=0.0).to(tl.float32),)
    for t in tl.static_range(TAPS):
        weights = weights + (tl.load(taps + channel * TAPS + t, mask=inside, other=0.0).to(tl.float32),)
    if BIAS:
        offset = tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    return window + (newest,), weights, offset


@triton.jit
def query_and_key(q, k, q_place, k_place, i, in_keys, PLACES: tl.constexpr):
    """[K, PLACES], queries in the first place and keys in the second; their channels, and which of them exist."""
    place, side = beside(i, PLACES)
    inside = in_keys[:, None] & (side < 2)
    q_KP = tl.load(q + q_place + place, mask=inside & (side == 0), other=0.0).to(tl.float32)
    k_KP = tl.load(k + k_place + place, mask=inside & (side == 1), other=0.0).to(tl.float32)
    return q_KP + k_KP, tl.where(side == 0, q_place, k_place) + place, inside


@triton.jit
def value(v, j, in_values, PLACES: tl.constexpr):
    """[V, PLACES], values in the first place; their channels, and which of them exist."""
    channel, side = beside(j, PLACES)
    inside = in_values[:, None] & (side == 0)
    return tl.load(v + channel, mask=inside, other=0.0).to(tl.float32), channel, inside


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
