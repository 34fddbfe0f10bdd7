"""Softmax attention to chosen blocks, walked by key: a tile of keys is read once for all tokens of a span that chose it.

Where neighbouring tokens choose different blocks, a tile of queries that visits the keys of its tokens reads all keys of a
block for one token. Here a program keeps a tile of keys, takes the tokens that chose it from a list, and leaves a share of
their outputs and its log-sum-exp; a second kernel joins a token's shares in order, so that repeats are equal to the bit.

A token's share has a slot, t * most + rank, rank being the number of blocks before this one that it chose; the list of a block
is one of slots. A block is `ratio` tiles of keys, each with a share of its own. A launch has room for the shares of some spans.

Shape legend and packing of heads: as in `kernels.indexed_triton`; P spans of tokens.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels._entry import entry
from kernels.indexed_triton import LOG2_E, load_rows, packed_rows

STRIDES = tuple(f"{tensor}_{axis}" for tensor in ("q", "k", "v") for axis in "bht")
COUNTS = (
    "n_index", "length", "n_keys", "kv_heads", "group", "pack", "past", "block", "index_rows",
    "most", "span", "spans", "first_span", "room",
)  # fmt: skip
SIZES = (*STRIDES, *COUNTS)


@triton.jit
def place_of(key_tile, kv_index, span_index, index_rows, spans, n_keys, block, N: tl.constexpr):
    """The list of a tile of keys."""
    return ((kv_index % index_rows).to(tl.int64) * spans + span_index) * tl.cdiv(n_keys, block) + key_tile * N // block


@entry(do_not_specialize=SIZES)
def chosen_forward_kernel(
    q, k, v, slots, counts, shares, lse_shares,
    q_b: tl.int64, q_h: tl.int64, q_t: tl.int64, k_b: tl.int64, k_h: tl.int64, k_t: tl.int64,
    v_b: tl.int64, v_h: tl.int64, v_t: tl.int64,
    n_index: tl.int32, length: tl.int32, n_keys: tl.int32, kv_heads: tl.int32, group: tl.int32, pack: tl.int32, past: tl.int32,
    block: tl.int32, index_rows: tl.int32, most: tl.int32, span: tl.int32, spans: tl.int32, first_span: tl.int32, room: tl.int32,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, UNIT: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Shares in the outputs [B G, room, group, V] and their base-2 log-sum-exp [B G, room, group], of spans from `first_span` on.

    Grid: (spans * B * G * tiles of keys,).
    """
    SCALE: tl.constexpr = K**-0.5 * LOG2_E
    ratio = block // N
    key_tiles = tl.cdiv(n_keys, block) * ratio
    program = tl.program_id(0)
    key_tile, outer = program % key_tiles, program // key_tiles
    kv_index, span_index = outer % n_index, first_span + outer // n_index
    batch, kv_head = (kv_index // kv_heads).to(tl.int64), kv_index % kv_heads
    row = place_of(key_tile, kv_index, span_index, index_rows, spans, n_keys, block, N)
    count, slots = tl.load(counts + row), slots + row * span
    if count > 0:
        first_slot = kv_index.to(tl.int64) * room + key_tile % ratio - first_span.to(tl.int64) * span * most * ratio
        s = key_tile * N + tl.arange(0, N)
        i, e, r = tl.arange(0, BK), tl.arange(0, BV), tl.arange(0, M)
        k_NK = load_rows(k, (batch * k_b + kv_head * k_h + s * k_t) * UNIT, i, s < n_keys, K).to(DOT)
        v_NV = load_rows(v, (batch * v_b + kv_head * v_h + s * v_t) * UNIT, e, s < n_keys, V).to(DOT)
        visits = tl.cdiv(count, M // pack)
        q += (batch * q_b + kv_head * group * q_h) * UNIT
        shares += first_slot * group * V
        lse_shares += first_slot * group
        for n in tl.range(visits * (group // pack), num_stages=STAGES):
            place, member = n % visits * (M // pack) + r // pack, n // visits * pack + r % pack
            inside = place < count
            slot = tl.load(slots + place, mask=inside, other=0)
            t = slot // most
            q_MK = load_rows(q, (member * q_h + t * q_t) * UNIT, i, inside, K).to(DOT)
            score_MN = tl.dot(q_MK, tl.trans(k_NK), input_precision=PRECISION)
            score_MN = tl.where(t[:, None] + past >= s[None, :], score_MN, float("-inf"))
            highest_M = tl.max(score_MN, 1) * SCALE
            base_M = tl.where(highest_M == float("-inf"), 0.0, highest_M)
            p_MN = tl.exp2(score_MN * SCALE - base_M[:, None])
            total_M = tl.sum(p_MN, 1)
            safe_M = tl.where(total_M == 0.0, 1.0, total_M)
            o_MV = tl.dot(p_MN.to(DOT), v_NV, input_precision=PRECISION) / safe_M[:, None]
            share = slot.to(tl.int64) * (ratio * group) + member
            tl.store(shares + share[:, None] * V + e[None, :], o_MV.to(DOT), mask=inside[:, None] & (e < V)[None, :])
            tl.store(lse_shares + share, highest_M + tl.log2(safe_M), mask=inside)


@entry
def join_kernel(
    shares, lse_shares, before, y, lse,
    length: tl.int32, kv_heads: tl.int32, group: tl.int32, pack: tl.int32, index_rows: tl.int32, n_words: tl.int32,
    ratio: tl.int32, most: tl.int32, first: tl.int32, stop: tl.int32, room: tl.int64,
    V: tl.constexpr, BV: tl.constexpr, M: tl.constexpr, WEIGHTED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Rows [B, T, H, V] of the tokens first .. stop from their shares, and lse [B, H, T].

    WEIGHTED: shares are outputs with a log-sum-exp each; else gradients of q, to be added. Grid: (B * G * bundles * tiles,).
    """
    bundles, tiles = group // pack, tl.cdiv(stop - first, M // pack)
    program = tl.program_id(0)
    tile, outer = program % tiles, program // tiles
    kv_index, bundle = outer // bundles, outer % bundles
    batch, kv_head = (kv_index // kv_heads).to(tl.int64), kv_index % kv_heads
    t, member, _ = packed_rows(tile, bundle * pack, pack, length, M)
    t += first
    inside, head = t < stop, kv_head * group + member
    index_row = (kv_index % index_rows).to(tl.int64)
    count = tl.load(before + (index_row * length + t) * (n_words + 1) + n_words, mask=inside, other=0)
    count = tl.minimum(count, most) * ratio
    share = (kv_index.to(tl.int64) * room + (t - first).to(tl.int64) * most * ratio) * group + member
    e = tl.arange(0, BV)
    highest_M = tl.full([M], float("-inf"), tl.float32)
    total_M = tl.zeros([M], tl.float32)
    o_MV = tl.zeros([M, BV], tl.float32)
    for n in tl.range(tl.max(count, 0), num_stages=STAGES):
        place, exists = share + n * group, n < count
        share_MV = load_rows(shares, place * V, e, exists, V).to(tl.float32)
        if WEIGHTED:
            lse_M = tl.load(lse_shares + place, mask=exists, other=float("-inf"))
            higher_M = tl.maximum(highest_M, lse_M)
            base_M = tl.where(higher_M == float("-inf"), 0.0, higher_M)
            shrink_M, weight_M = tl.exp2(highest_M - base_M), tl.exp2(lse_M - base_M)
            total_M = total_M * shrink_M + weight_M
            o_MV = o_MV * shrink_M[:, None] + share_MV * weight_M[:, None]
            highest_M = higher_M
        else:
            o_MV += share_MV
    rows = (batch * length + t) * kv_heads * group + head
    if WEIGHTED:
        safe_M = tl.where(total_M == 0.0, 1.0, total_M)
        o_MV = o_MV / safe_M[:, None]
        tl.store(lse + (batch * kv_heads * group + head) * length + t, highest_M + tl.log2(safe_M), mask=inside)
    tl.store(y + rows[:, None] * V + e[None, :], o_MV.to(y.dtype.element_ty), mask=inside[:, None] & (e < V)[None, :])
