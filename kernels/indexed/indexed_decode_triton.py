"""Softmax attention of one token to a long cache: keys are split over programs, whose parts a second kernel joins.

A byte for each key says whether it is seen; what is unseen is not read. Query heads that share keys are the rows of one tile.

Shape legend: B batch, H heads of q, G heads of k and v, S keys, K width of q and k, V width of v, P parts, M query heads of a
tile, N keys of a tile.
"""

from __future__ import annotations

import triton.language as tl

from kernels._entry import entry
from kernels.indexed.indexed_triton import LOG2_E, load_rows

# Run-time integers: with these unspecialised, a new batch, cache or head count compiles nothing.
STRIDES = ("q_b", "q_h", "k_b", "k_h", "k_s", "v_b", "v_h", "v_s", "seen_b", "seen_h")
SIZES = (*STRIDES, "n_keys", "kv_heads", "group", "parts")


@entry(do_not_specialize=SIZES)
def part_kernel(
    q, k, v, seen, outputs, highest, totals,
    q_b: tl.int64, q_h: tl.int64, k_b: tl.int64, k_h: tl.int64, k_s: tl.int64, v_b: tl.int64, v_h: tl.int64, v_s: tl.int64,
    seen_b: tl.int64, seen_h: tl.int64, n_keys: tl.int32, kv_heads: tl.int32, group: tl.int32, parts: tl.int32,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, UNIT: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Weighted sum of values [B, H, P, V], and maximum and sum [B, H, P], over the keys of one part, in fp32 and base 2.

    Grid: (B * G * ceil(group / M) * P,).
    """
    bundles = tl.cdiv(group, M)
    program = tl.program_id(0)
    part, outer = program % parts, program // parts
    kv_index, bundle = outer // bundles, outer % bundles
    batch, kv_head = (kv_index // kv_heads).to(tl.int64), kv_index % kv_heads
    member = bundle * M + tl.arange(0, M)
    inside = member < group
    head = kv_head * group + member
    i, e = tl.arange(0, BK), tl.arange(0, BV)
    q_MK = load_rows(q, (batch * q_b + head * q_h) * UNIT, i, inside, K).to(DOT)
    k += (batch * k_b + kv_head * k_h) * UNIT
    v += (batch * v_b + kv_head * v_h) * UNIT
    seen += batch * seen_b + kv_head * seen_h
    highest_M = tl.full([M], float("-inf"), tl.float32)
    total_M = tl.zeros([M], tl.float32)
    o_MV = tl.zeros([M, BV], tl.float32)
    share = tl.cdiv(tl.cdiv(n_keys, N), parts) * N
    for first in tl.range(part * share, tl.minimum((part + 1) * share, n_keys), N, num_stages=STAGES):
        s = first + tl.arange(0, N)
        seen_N = tl.load(seen + s, mask=s < n_keys, other=0) != 0
        k_NK = load_rows(k, s.to(tl.int64) * k_s * UNIT, i, seen_N, K).to(DOT)
        v_NV = load_rows(v, s.to(tl.int64) * v_s * UNIT, e, seen_N, V).to(DOT)
        score_MN = tl.dot(q_MK, tl.trans(k_NK), input_precision=PRECISION) * (K**-0.5 * LOG2_E)
        score_MN = tl.where(seen_N[None, :], score_MN, float("-inf"))
        higher_M = tl.maximum(highest_M, tl.max(score_MN, 1))
        base_M = tl.where(higher_M == float("-inf"), 0.0, higher_M)
        p_MN = tl.exp2(score_MN - base_M[:, None])
        shrink_M = tl.exp2(highest_M - base_M)
        total_M = total_M * shrink_M + tl.sum(p_MN, 1)
        o_MV = tl.dot(p_MN.to(DOT), v_NV, o_MV * shrink_M[:, None], input_precision=PRECISION)
        highest_M = higher_M
    row = (batch * kv_heads * group + head) * parts + part
    tl.store(highest + row, highest_M, mask=inside)
    tl.store(totals + row, total_M, mask=inside)
    tl.store(outputs + row[:, None] * V + e[None, :], o_MV, mask=inside[:, None] & (e < V)[None, :])


@entry(do_not_specialize=["parts"])
def join_kernel(
    outputs, highest, totals, y, parts: tl.int32, V: tl.constexpr, BV: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """The output [B, H, V] of one head from its parts, at most P of them. Grid: (B * H,)."""
    row = tl.program_id(0).to(tl.int64)
    p, e = tl.arange(0, P), tl.arange(0, BV)
    highest_P = tl.load(highest + row * parts + p, mask=p < parts, other=float("-inf"))
    weight_P = tl.exp2(highest_P - tl.max(highest_P, 0))
    total = tl.sum(weight_P * tl.load(totals + row * parts + p, mask=p < parts, other=0.0), 0)
    in_parts = (p < parts)[:, None] & (e < V)[None, :]
    o_PV = tl.load(outputs + (row * parts + p)[:, None] * V + e[None, :], mask=in_parts, other=0.0)
    o_V = tl.sum(o_PV * weight_P[:, None], 0) / total
    tl.store(y + row * V + e, o_V.to(y.dtype.element_ty), mask=e < V)
