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

import triton.language as tl

from kernels._entry import entry
from kernels.steps.step_outputs_triton import finish, is_last, write_output
from kernels.steps.step_pieces_triton import (
    RMS_NORM,
    SUM_NORM,
    apart,
    decay_of,
    decayed,
    filtered,
    first_place,
    inputs_of,
    keep,
    load_state,
    query_and_key,
    scales_of,
    store_state,
    value,
    written,
)

INTEGERS = (
    *(f"{name}_{axis}" for name in ("q", "k", "v", "decay", "beta", "a", "b") for axis in ("row", "head")),
    *("gate_row", "q_at", "k_at", "v_at", "channels", "heads", "group"),
)


@entry(do_not_specialize=INTEGERS)
def step_kernel(
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
    KEY_PLACES: tl.constexpr, VALUE_PLACES: tl.constexpr,
):  # fmt: skip
    """Grid: (B * H * value tiles,).

    `old` and `new` may be the same tensor, and so may the tails and the sums.
    """
    TILES: tl.constexpr = (V + BV - 1) // BV
    WHOLE: tl.constexpr = K == BK and V % BV == 0
    program = tl.program_id(0)
    head_index, tile = program // TILES, program % TILES
    batch, head = (head_index // heads).to(tl.int64), (head_index % heads).to(tl.int64)
    shared = head // group
    i, j = tl.arange(0, BK), tile * BV + tl.arange(0, BV)
    in_keys, in_values = i < K, j < V
    offsets = head_index.to(tl.int64) * K * V + (i[:, None] * V + j[None, :])
    tail_base, new_tail_base = tail + batch * (TAPS - 1) * channels, new_tail + batch * (TAPS - 1) * channels
    q_base, v_base = q + batch * q_row, v + batch * v_row
    qk_KP, channel, inside = query_and_key(
        q_base, k + batch * k_row, q_at + shared * q_head, k_at + shared * k_head, i, in_keys, KEY_PLACES
    )
    qk, qk_taps, qk_offset = inputs_of(qk_KP, tail_base, taps, conv_bias, channel, inside, channels, TAPS, CONV_BIAS)
    v_VP, v_channel, v_inside = value(v_base, v_at + head * v_head + j, in_values, VALUE_PLACES)
    v_inputs, v_taps, v_offset = inputs_of(v_VP, tail_base, taps, conv_bias, v_channel, v_inside, channels, TAPS, CONV_BIAS)
    decay_base = decay + batch * decay_row + head * decay_head
    given, bias, rate = decay_of(decay_base, decay_bias, log_rate, head, i, in_keys, K, GATE, DECAY, KEY_PLACES)
    state_KV = load_state(old, offsets, in_keys, in_values, WHOLE)

    q_K, k_K = apart(filtered(qk, qk_taps, qk_offset, TAPS, SILU), KEY_PLACES)
    v_V = first_place(filtered(v_inputs, v_taps, v_offset, TAPS, SILU), VALUE_PLACES)
    q_scale, k_scale = scales_of(q_K, k_K, scale, key_scale, UNIT)
    if RANK_ONE:
        a_K = tl.load(a + batch * a_row + head * a_head + i, mask=in_keys, other=0.0).to(tl.float32)
        b_K = tl.load(b + batch * b_row + head * b_head + i, mask=in_keys, other=0.0).to(tl.float32)
        turned_V = tl.sum(b_K[:, None] * state_KV, 0)
    state_KV, u_V, kept = decayed(state_KV, v_V, given, bias, rate, decay_scale, GATE, DECAY, STEPPED, KEY_PLACES)
    beta_base = beta + batch * beta_row + head * beta_head
    state_KV, y_V = written(state_KV, q_K, k_K, u_V, k_scale, beta_base, max_beta, DELTA, OPEN_BETA)
    if RANK_ONE:
        y_V += tl.sum(a_K * q_K, 0) * turned_V
        state_KV += a_K[:, None] * turned_V[None, :]
    y_V *= q_scale
    store_state(new, offsets, state_KV, in_keys, in_values, WHOLE)

    if SKIP:
        y_V += tl.load(skip + head).to(tl.float32) * v_V
    sums_base = head_index.to(tl.int64) * K + i
    sums_K = q_K
    if NORM == SUM_NORM:
        sums_K = kept * tl.load(sums + sums_base, mask=in_keys, other=0.0).to(tl.float32) + k_scale * k_K
        y_V /= q_scale * tl.sum(q_K * sums_K, 0) + eps
    o_base, row = head_index.to(tl.int64) * V, batch * heads * V
    norm_base = 0 if NORM == RMS_NORM else head * V
    gate_base = gate + batch * gate_row + head * V
    write_output(
        y_V, raw + o_base, o + o_base, norm_weight + norm_base, norm_bias + norm_base, gate_base, j, in_values, eps,
        V, NORM, NORM_WEIGHT, NORM_BIAS, OUTPUT_GATE, TOGETHER,
    )  # fmt: skip
    if TAPS > 1:
        tl.debug_barrier()
        keep(new_tail_base, v_channel, v_inside, channels, v_inputs, TAPS)
    if is_last(arrived, head_index, batch, heads, TILES, TOGETHER):
        finish(
            q_base, tail_base, taps, new_tail_base, q_at, k_at, heads // group * K, channel, inside, channels, qk,
            new_sums + sums_base, sums_K, in_keys, raw + row, o + row, raw + o_base, o + o_base, heads * V,
            norm_weight, norm_bias, norm_weight + norm_base, norm_bias + norm_base, gate, gate_base, eps,
            V, TAPS, NORM, NORM_WEIGHT, NORM_BIAS, OUTPUT_GATE, TOGETHER,
        )  # fmt: skip
