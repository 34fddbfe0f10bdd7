"""The states that enter the segments of a sequence, from what each segment does to a state: R S + C.

What the segments do is found by `kernels.delta_rule.delta_hopper_carry`, or by the walks of vector gates without their outputs.

Shape legend: B batch, H heads, K key, V value width.
"""

from __future__ import annotations

import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels._entry import entry


@entry
def combine_kernel(
    ends, first, states, segments: tl.int32,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, TILE: tl.constexpr, FIRST: tl.constexpr,
    BETWEEN: tl.constexpr,
):  # fmt: skip
    """Grid: (B * H * tiles of TILE columns,). Writes the state that enters each segment [B * H, segments, K, V] in fp32.

    BETWEEN: may start beside the kernel before it, and the next one beside it, if they are launched so.
    """
    if BETWEEN:
        gdc_launch_dependents()
        gdc_wait()
    VALUES: tl.constexpr = (V + BV - 1) // BV * BV
    WIDTH: tl.constexpr = VALUES + (K + BV - 1) // BV * BV
    TILES: tl.constexpr = (V + TILE - 1) // TILE
    head_index = (tl.program_id(0) // TILES).to(tl.int64)
    d, e = tl.arange(0, BK), (tl.program_id(0) % TILES) * TILE + tl.arange(0, TILE)
    inside = (d < K)[:, None] & (e < V)[None, :]
    offsets = d[:, None] * V + e[None, :]
    states += head_index * segments * K * V
    ends += head_index * (segments - 1) * K * WIDTH
    state_KV = tl.zeros([BK, TILE], tl.float32)
    if FIRST:
        state_KV = tl.load(first + head_index * K * V + offsets, mask=inside, other=0.0)
    tl.store(states + offsets, state_KV, mask=inside)
    state_KV = tl.load(ends + d[:, None] * WIDTH + e[None, :], mask=inside, other=0.0)
    tl.store(states + K * V + offsets, state_KV, mask=inside)
    for part in range(1, segments - 1):
        step = ends + tl.cast(part, tl.int64) * K * WIDTH
        among = (d < K)[:, None] & (d < K)[None, :]
        r_KK = tl.load(step + d[:, None] * WIDTH + VALUES + d[None, :], mask=among, other=0.0)
        c_KV = tl.load(step + d[:, None] * WIDTH + e[None, :], mask=inside, other=0.0)
        state_KV = tl.dot(r_KK, state_KV, c_KV, input_precision="tf32x3")
        tl.store(states + (tl.cast(part, tl.int64) + 1) * K * V + offsets, state_KV, mask=inside)
