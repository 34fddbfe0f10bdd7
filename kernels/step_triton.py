"""The decoding step: a program owns some value columns of one head's state, reads them once and writes them once.

With the decayed state D = decay S and u = beta (v - D^T k), or u = v without the delta rule, the new state is D + k u^T and
its read is o = D^T q + (k . q) u. So both sums over keys are formed from the tile as it was loaded, and neither waits for
the other. A rank-one transition (RWKV-7) adds a r^T with r = b^T S to the state, and (a . q) r to the read.

What a layer does around its recurrence (`kernels.layer_step`) is done by the same program: it is a few numbers a channel.
Where several programs read what one of them has to overwrite (the inputs of a convolution), or write what one of them has to
norm, the last of them to arrive does it; a counter in memory tells which that is.

Shape legend: K key, V value width, BK the padded key width, BV value columns of a program.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels._entry import entry

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


INTEGERS = (
    *(f"{name}_{axis}" for name in ("q", "k", "v", "decay", "beta", "a", "b") for axis in ("row", "head")),
    *("gate_row", "q_at", "k_at", "v_at", "channels", "heads", "group"),
)


@entry(do_not_specialize=INTEGERS)
def step_kernel(  # noqa: PLR0912, PLR0915 - one token of every layer; flags cut it down
    q, k, v, decay, decay_bias, log_rate, beta, a, b, old, new,
    taps, conv_bias, tail, new_tail, sums, new_sums, skip, norm_weight, norm_bias, gate, raw, arrived, o,
    q_row: tl.int64, q_head: tl.int64, k_row: tl.int64, k_head: tl.int64, v_row: tl.int64, v_head: tl.int64,
    decay_row: tl.int64, decay_head: tl.int64, beta_row: tl.int64, beta_head: tl.int64,
    a_row: tl.int64, a_head: tl.int64, b_row: tl.int64, b_head: tl.int64, gate_row: tl.int64,
    q_at: tl.int32, k_at: tl.int32, v_at: tl.int32, channels: tl.int32, heads: tl.int32, group: tl.int32,
    scale: tl.float32, key_scale: tl.float32, decay_scale: tl.float32, max_beta: tl.float32, eps: tl.float32,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    GATE: tl.constexpr, DECAY: tl.constexpr, STEPPED: tl.constexpr, DELTA: tl.constexpr, OPEN_BETA: tl.constexpr,
    RANK_ONE: tl.constexpr, TAPS: tl.constexpr, CONV_BIAS: tl.constexpr, SILU: tl.constexpr, UNIT: tl.constexpr, SKIP: tl.constexpr,
    NORM: tl.constexpr, NORM_WEIGHT: tl.constexpr, NORM_BIAS: tl.constexpr, OUTPUT_GATE: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """Grid: (B * H * value tiles,). `old` and `new` may be the same tensor, and so may the tails and the sums."""
    TILES: tl.constexpr = (V + BV - 1) // BV
    HEAD_NORM: tl.constexpr = NORM == RMS_NORM or NORM == LAYER_NORM  # noqa: PLR1714 - Triton has no `in`
    WHOLE: tl.constexpr = K == BK and V % BV == 0
    program = tl.program_id(0)
    head_index, tile = program // TILES, program % TILES
    batch, head = (head_index // heads).to(tl.int64), (head_index % heads).to(tl.int64)
    shared = head // group
    i, j = tl.arange(0, BK), tile * BV + tl.arange(0, BV)
    in_keys, in_values = i < K, j < V
    offsets = head_index.to(tl.int64) * K * V + (i[:, None] * V + j[None, :])
    if WHOLE:
        state_KV = tl.load(old + offsets).to(tl.float32)
    else:
        state_KV = tl.load(old + offsets, mask=in_keys[:, None] & in_values[None, :], other=0.0).to(tl.float32)

    tail_base, new_tail_base = tail + batch * (TAPS - 1) * channels, new_tail + batch * (TAPS - 1) * channels
    q_base, k_base, v_base = q + batch * q_row, k + batch * k_row, v + batch * v_row
    q_place, k_place, v_place = q_at + shared * q_head, k_at + shared * k_head, v_at + head * v_head
    if TAPS > 0:
        # Both in one tile: Triton loads a tile of fewer elements than threads again for every row of the state.
        side = tl.arange(0, 2)[None, :]
        channel = tl.where(side == 0, q_place, k_place) + i[:, None]
        inside = in_keys[:, None] & (side < 2)
        qk, qk_first, qk_second, qk_newest = filtered(
            q_base, tail_base, taps, conv_bias, channel, inside, channels, TAPS, CONV_BIAS, SILU
        )  # fmt: skip
        q_K, k_K = tl.split(qk)
    else:
        q_K = filtered(q_base, tail_base, taps, conv_bias, q_place + i, in_keys, channels, 0, False, SILU)[0]
        k_K = filtered(k_base, tail_base, taps, conv_bias, k_place + i, in_keys, channels, 0, False, SILU)[0]
    v_V, v_first, v_second, v_newest = filtered(
        v_base, tail_base, taps, conv_bias, v_place + j, in_values, channels, TAPS, CONV_BIAS, SILU
    )  # fmt: skip
    # Sums over the state are linear in q and k: they need not wait for the lengths of the two.
    q_scale, k_scale = scale, key_scale
    if UNIT:
        q_scale *= tl.rsqrt(tl.sum(q_K * q_K, 0) + UNIT_EPS)
        k_scale *= tl.rsqrt(tl.sum(k_K * k_K, 0) + UNIT_EPS)
    u_V = v_V
    if RANK_ONE:
        a_K = tl.load(a + batch * a_row + head * a_head + i, mask=in_keys, other=0.0).to(tl.float32)
        b_K = tl.load(b + batch * b_row + head * b_head + i, mask=in_keys, other=0.0).to(tl.float32)
        turned_V = tl.sum(b_K[:, None] * state_KV, 0)
    decay_base = decay + batch * decay_row + head * decay_head
    kept, bias, rate = 1.0, 0.0, 0.0
    if DECAY == RATE:
        rate = tl.load(log_rate + head).to(tl.float32)
    if GATE == SCALAR_GATE:
        if DECAY == RATE:
            bias = tl.load(decay_bias + head).to(tl.float32)
        log_decay, time_step = log_decay_of(tl.load(decay_base).to(tl.float32), bias, rate, decay_scale, DECAY)
        if STEPPED:
            u_V *= time_step
        kept = tl.exp(log_decay)
        state_KV *= kept
    elif GATE == VECTOR_GATE:
        if DECAY == RATE:
            bias = tl.load(decay_bias + head * K + i, mask=in_keys, other=0.0).to(tl.float32)
        given_K = tl.load(decay_base + i, mask=in_keys, other=0.0).to(tl.float32)
        kept = tl.exp(log_decay_of(given_K, bias, rate, decay_scale, DECAY)[0])
        state_KV *= kept[:, None]
    if DELTA:
        strength = tl.load(beta + batch * beta_row + head * beta_head).to(tl.float32)
        if OPEN_BETA:
            strength = max_beta * tl.sigmoid(strength)
        u_V = strength * (u_V - k_scale * tl.sum(k_K[:, None] * state_KV, 0))
    u_V *= k_scale
    y_V = tl.sum(q_K[:, None] * state_KV, 0) + tl.sum(k_K * q_K, 0) * u_V
    state_KV += k_K[:, None] * u_V[None, :]
    if RANK_ONE:
        y_V += tl.sum(a_K * q_K, 0) * turned_V
        state_KV += a_K[:, None] * turned_V[None, :]
    y_V *= q_scale
    if WHOLE:
        tl.store(new + offsets, state_KV.to(new.dtype.element_ty))
    else:
        tl.store(new + offsets, state_KV.to(new.dtype.element_ty), mask=in_keys[:, None] & in_values[None, :])

    if SKIP:
        y_V += tl.load(skip + head).to(tl.float32) * v_V
    if NORM == SUM_NORM:
        sums_base = head_index.to(tl.int64) * K + i
        sums_K = kept * tl.load(sums + sums_base, mask=in_keys, other=0.0).to(tl.float32) + k_scale * k_K
        y_V /= q_scale * tl.sum(q_K * sums_K, 0) + eps
    o_base = head_index.to(tl.int64) * V
    norm_base = 0 if NORM == RMS_NORM else head * V
    gate_base = gate + batch * gate_row + head * V
    if NORM == ROW_NORM:
        y_V = opened(y_V, gate_base, j, in_values, OUTPUT_GATE)
    if NORM == ROW_NORM or (TOGETHER == PER_HEAD and HEAD_NORM):
        tl.store(raw + o_base + j, y_V, mask=in_values)
    else:
        if HEAD_NORM:
            mean = tl.sum(tl.where(in_values, y_V, 0.0), 0) / V if NORM == LAYER_NORM else 0.0
            centred_V = tl.where(in_values, y_V - mean, 0.0)
            rstd = tl.rsqrt(tl.sum(centred_V * centred_V, 0) / V + eps)
            y_V = normed(y_V, mean, rstd, norm_weight + norm_base, norm_bias + norm_base, j, in_values, NORM_WEIGHT, NORM_BIAS)
        y_V = opened(y_V, gate_base, j, in_values, OUTPUT_GATE)
        tl.store(o + o_base + j, y_V.to(o.dtype.element_ty), mask=in_values)

    if TAPS > 1:
        tl.debug_barrier()
        keep(new_tail_base, v_place + j, in_values, channels, v_first, v_second, v_newest, TAPS)
    last = True
    if TOGETHER != ALONE:
        tl.debug_barrier()  # what this program wrote, all of its threads have written
        if TOGETHER == PER_HEAD:
            last = tl.atomic_add(arrived + head_index, 1) == TILES - 1
        else:
            last = tl.atomic_add(arrived + batch, 1) == heads * TILES - 1
    if last:
        if NORM == SUM_NORM:
            tl.debug_barrier()
            tl.store(new_sums + sums_base, sums_K.to(new_sums.dtype.element_ty), mask=in_keys)
        if TAPS > 1:
            if TOGETHER == PER_ROW:
                width = heads // group * K
                move_on(q_base, tail_base, taps, conv_bias, new_tail_base, q_at, q_at + width, channels, TAPS)
                move_on(q_base, tail_base, taps, conv_bias, new_tail_base, k_at, k_at + width, channels, TAPS)
            else:
                keep(new_tail_base, channel, inside, channels, qk_first, qk_second, qk_newest, TAPS)
        if NORM == ROW_NORM:
            row = batch * heads * V
            norm_raw(raw + row, norm_weight, norm_bias, gate, o + row, heads * V, eps, NORM, NORM_WEIGHT, NORM_BIAS, NO_OUTPUT_GATE)
        elif TOGETHER == PER_HEAD and HEAD_NORM:
            norm_raw(
                raw + o_base, norm_weight + norm_base, norm_bias + norm_base, gate_base, o + o_base, V, eps,
                NORM, NORM_WEIGHT, NORM_BIAS, OUTPUT_GATE,
            )  # fmt: skip
