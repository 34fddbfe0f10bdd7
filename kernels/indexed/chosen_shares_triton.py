"""Gradients of attention to chosen blocks in one walk by key: dk and dv stay on chip, a token's dq is left in shares.

Where neighbouring tokens choose different blocks, a tile of queries that visits the keys of its tokens reads all keys of a
block for one token. Here a program keeps a tile of keys and takes the tokens of a span that chose it from a list, recomputes
scores and weights once for all three gradients, and leaves a share of their dq; a second kernel adds up a token's shares. Of
each launch span p adds what it finds to part p of dk and dv, in fp32, behind the launches before, and a third kernel adds up
the parts. All sums have one order, so repeats are equal to the bit.

A token's share has a slot, t * most + rank, rank being the number of blocks before this one that it chose; the list of a block
is one of slots. A block is `ratio` tiles of keys, each with a share of its own. A launch has room for the shares of some spans.

Shape legend and packing of heads: as in `kernels.indexed.indexed_triton`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels._entry import entry
from kernels.indexed.by_key_triton import products, through_weights
from kernels.indexed.indexed_triton import load_rows, packed_rows

STRIDES = tuple(f"{tensor}_{axis}" for tensor in ("q", "k", "v", "dy") for axis in "bht")
COUNTS = (
    "n_index", "length", "n_keys", "kv_heads", "group", "pack", "past", "block", "index_rows",
    "most", "span", "spans", "first_span", "room", "parts", "n_rows",
)  # fmt: skip
SIZES = (*STRIDES, *COUNTS)


@entry
def delta_kernel(
    y, dy, delta, y_b: tl.int64, y_h: tl.int64, y_t: tl.int64, dy_b: tl.int64, dy_h: tl.int64, dy_t: tl.int64,
    rows: tl.int64, length: tl.int32, heads: tl.int32, V: tl.constexpr, BV: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Products y . dy of the rows, [B, H, T]. Grid: (tiles of ROWS rows,), heads innermost."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside, e = row < rows, tl.arange(0, BV)
    head, t, batch = row % heads, row // heads % length, row // heads // length
    y_RV = load_rows(y, (batch * y_b + head * y_h + t * y_t) * UNIT, e, inside, V).to(tl.float32)
    dy_RV = load_rows(dy, (batch * dy_b + head * dy_h + t * dy_t) * UNIT, e, inside, V).to(tl.float32)
    tl.store(delta + (batch * heads + head) * length + t, tl.sum(y_RV * dy_RV, 1), mask=inside)


@triton.jit
def walk_choosers(
    k_NK, v_NV, q, dy, lse, delta, dq_shares, slots, count, s, kv_head, batch, first_slot,
    q_b, q_h, q_t, dy_b, dy_h, dy_t, length, heads, group, pack, past, most, ratio,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, UNIT: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dk, still without its scale, and dv of the keys at `s`, from the tokens of a list, whose shares of dq are stored."""
    i, e, r = tl.arange(0, BK), tl.arange(0, BV), tl.arange(0, M)
    dk_NK, dv_NV = tl.zeros([N, BK], tl.float32), tl.zeros([N, BV], tl.float32)
    visits = tl.cdiv(count, M // pack)
    q += (batch * q_b + kv_head * group * q_h) * UNIT
    dy += (batch * dy_b + kv_head * group * dy_h) * UNIT
    lse += (batch * heads + kv_head * group) * length
    delta += (batch * heads + kv_head * group) * length
    dq_shares += first_slot * group * K
    for n in tl.range(visits * (group // pack), num_stages=STAGES):
        place, member = n % visits * (M // pack) + r // pack, n // visits * pack + r % pack
        inside = place < count
        slot = tl.load(slots + place, mask=inside, other=0)
        t = slot // most
        q_MK = load_rows(q, (member * q_h + t * q_t) * UNIT, i, inside, K).to(DOT)
        dy_MV = load_rows(dy, (member * dy_h + t * dy_t) * UNIT, e, inside, V).to(DOT)
        scalar = member.to(tl.int64) * length + t
        lse_M = tl.load(lse + scalar, mask=inside, other=0.0)
        delta_M = tl.load(delta + scalar, mask=inside, other=0.0)
        score_NM, dp_NM = products(k_NK, v_NV, q_MK, dy_MV, K, PRECISION)
        seen = inside[None, :] & (t[None, :] + past >= s[:, None])
        dv_NV, ds_NM = through_weights(dv_NV, score_NM, dp_NM, seen, lse_M, delta_M, dy_MV, DOT, PRECISION)
        dk_NK = tl.dot(ds_NM, q_MK, dk_NK, input_precision=PRECISION)
        dq_MK = tl.trans(tl.dot(tl.trans(k_NK), ds_NM, input_precision=PRECISION))  # keys' width is a tensor core's 64 rows
        share = slot.to(tl.int64) * (ratio * group) + member
        dq_MK = (dq_MK * K**-0.5).to(DOT)
        tl.store(dq_shares + share[:, None] * K + i[None, :], dq_MK, mask=inside[:, None] & (i < K)[None, :])
    return dk_NK, dv_NV


@triton.jit
def add_rows(base, x_NW, rows, cols, inside_N, started, WIDTH: tl.constexpr):
    """Adds to rows of a matrix that holds something, or begins them."""
    place = base + rows[:, None] * WIDTH + cols[None, :]
    mask = inside_N[:, None] & (cols < WIDTH)[None, :]
    tl.store(place, x_NW + tl.load(place, mask=mask & started, other=0.0), mask=mask)


@entry(do_not_specialize=SIZES)
def shares_kernel(
    q, k, v, slots, counts, lse, dy, delta, dq_shares, dk, dv,
    q_b: tl.int64, q_h: tl.int64, q_t: tl.int64, k_b: tl.int64, k_h: tl.int64, k_t: tl.int64,
    v_b: tl.int64, v_h: tl.int64, v_t: tl.int64, dy_b: tl.int64, dy_h: tl.int64, dy_t: tl.int64,
    n_index: tl.int32, length: tl.int32, n_keys: tl.int32, kv_heads: tl.int32, group: tl.int32, pack: tl.int32, past: tl.int32,
    block: tl.int32, index_rows: tl.int32, most: tl.int32, span: tl.int32, spans: tl.int32, first_span: tl.int32, room: tl.int32,
    parts: tl.int32, n_rows: tl.int32,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, UNIT: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Adds to the parts of dk [parts, B, S, G, K] and dv [parts, B, S, G, V], and makes shares of dq [B G, room, group, K].

    A part holds nothing until a token of its spans has chosen the tile of keys. Grid: (spans * B * G * tiles of keys,).
    """
    ratio = block // N
    key_tiles = tl.cdiv(n_keys, block) * ratio
    program = tl.program_id(0)
    key_tile, outer = program % key_tiles, program // key_tiles
    kv_index, span_index = outer % n_index, first_span + outer // n_index
    batch, kv_head = (kv_index // kv_heads).to(tl.int64), kv_index % kv_heads
    row = ((kv_index % index_rows).to(tl.int64) * spans + span_index) * tl.cdiv(n_keys, block) + key_tile // ratio
    count = tl.load(counts + row)
    if count > 0:
        first_slot = kv_index.to(tl.int64) * room + key_tile % ratio - first_span.to(tl.int64) * span * most * ratio
        s = key_tile * N + tl.arange(0, N)
        i, e = tl.arange(0, BK), tl.arange(0, BV)
        k_NK = load_rows(k, (batch * k_b + kv_head * k_h + s * k_t) * UNIT, i, s < n_keys, K).to(DOT)
        v_NV = load_rows(v, (batch * v_b + kv_head * v_h + s * v_t) * UNIT, e, s < n_keys, V).to(DOT)
        dk_NK, dv_NV = walk_choosers(
            k_NK, v_NV, q, dy, lse, delta, dq_shares, slots + row * span, count, s, kv_head, batch, first_slot,
            q_b, q_h, q_t, dy_b, dy_h, dy_t, length, kv_heads * group, group, pack, past, most, ratio,
            K, V, BK, BV, UNIT, M, N, DOT, PRECISION, STAGES,
        )  # fmt: skip
        n_blocks, earlier = tl.cdiv(n_keys, block), 0
        for n in range(1, first_span // parts + 1):
            earlier += tl.load(counts + row - n * parts * n_blocks)
        rows = (span_index % parts).to(tl.int64) * n_rows + (batch * n_keys + s) * kv_heads + kv_head
        add_rows(dk, dk_NK * K**-0.5, rows, i, s < n_keys, earlier > 0, K)
        add_rows(dv, dv_NV, rows, e, s < n_keys, earlier > 0, V)


@triton.jit
def sum_parts(parts, out, counts, list_R, row_R, inside_R, n_parts, spans, n_blocks, n_rows, WIDTH: tl.constexpr, BW: tl.constexpr):
    """Rows of `out` as sums of the parts that hold something."""
    i = tl.arange(0, BW)
    place = row_R[:, None] * WIDTH + i[None, :]
    total = tl.zeros([row_R.shape[0], BW], tl.float32)
    for part in range(n_parts):
        count_R = tl.zeros_like(row_R)
        for span in range(part, spans, n_parts):
            count_R += tl.load(counts + list_R + span * n_blocks, mask=inside_R, other=0)
        total += tl.load(parts + place, mask=(count_R > 0)[:, None] & (i < WIDTH)[None, :], other=0.0)
        parts += n_rows.to(tl.int64) * WIDTH
    tl.store(out + place, total.to(out.dtype.element_ty), mask=inside_R[:, None] & (i < WIDTH)[None, :])


@entry
def sum_parts_kernel(
    dk_parts, dv_parts, counts, dk, dv,
    n_keys: tl.int32, kv_heads: tl.int32, block: tl.int32, index_rows: tl.int32, parts: tl.int32, spans: tl.int32, n_rows: tl.int32,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Dk [B, S, G, K] and dv [B, S, G, V]. Grid: (tiles of ROWS rows,)."""
    row_R = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    s_R, kv_R = row_R // kv_heads % n_keys, row_R // kv_heads // n_keys * kv_heads + row_R % kv_heads
    n_blocks = tl.cdiv(n_keys, block)
    list_R = kv_R % index_rows * spans * n_blocks + s_R // block
    inside_R = row_R < n_rows
    sum_parts(dk_parts, dk, counts, list_R, row_R, inside_R, parts, spans, n_blocks, n_rows, K, BK)
    sum_parts(dv_parts, dv, counts, list_R, row_R, inside_R, parts, spans, n_blocks, n_rows, V, BV)


@entry
def sum_shares_kernel(
    shares, before, dq,
    length: tl.int32, kv_heads: tl.int32, group: tl.int32, pack: tl.int32, index_rows: tl.int32, n_words: tl.int32,
    ratio: tl.int32, most: tl.int32, first: tl.int32, stop: tl.int32, room: tl.int64,
    K: tl.constexpr, BK: tl.constexpr, M: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Dq [B, T, H, K] of the tokens first .. stop from their shares. Grid: (B * G * bundles * tiles of M rows,)."""
    bundles, tiles = group // pack, tl.cdiv(stop - first, M // pack)
    program = tl.program_id(0)
    tile, outer = program % tiles, program // tiles
    kv_index, bundle = outer // bundles, outer % bundles
    batch, kv_head = (kv_index // kv_heads).to(tl.int64), kv_index % kv_heads
    t, member, _ = packed_rows(tile, bundle * pack, pack, length, M)
    t += first
    inside, i = t < stop, tl.arange(0, BK)
    index_row = (kv_index % index_rows).to(tl.int64)
    count = tl.load(before + (index_row * length + t) * (n_words + 1) + n_words, mask=inside, other=0)
    count = tl.minimum(count, most) * ratio
    share = (kv_index.to(tl.int64) * room + (t - first).to(tl.int64) * most * ratio) * group + member
    dq_MK = tl.zeros([M, BK], tl.float32)
    for n in tl.range(tl.max(count, 0), num_stages=STAGES):
        dq_MK += load_rows(shares, (share + n * group) * K, i, n < count, K).to(tl.float32)
    rows = (batch * length + t) * kv_heads * group + kv_head * group + member
    tl.store(dq + rows[:, None] * K + i[None, :], dq_MK.to(dq.dtype.element_ty), mask=inside[:, None] & (i < K)[None, :])
