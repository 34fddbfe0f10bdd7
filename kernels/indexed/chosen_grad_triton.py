"""Gradients of keys and values that tokens chose block by block: a walk over exactly those tokens, cut into parts of one length.

A tile of keys lies in one block, so its queries are the tokens that chose the block, and no tile of queries holds any other.
Early blocks are chosen by many more tokens than late ones: a program walks over a part of the list, and parts are added up in
order by a second kernel, so that repeats are equal to the bit.

Shape legend and packing of heads: as in `kernels.indexed.indexed_triton`; P parts.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels._entry import entry
from kernels.indexed.by_key_triton import load_queries, products, store_gradients, through_weights
from kernels.indexed.indexed_triton import load_rows

STRIDES = tuple(f"{tensor}_{axis}" for tensor in ("q", "k", "v", "dy") for axis in "bht")
COUNTS = ("length", "n_keys", "kv_heads", "group", "pack", "past", "block", "index_rows", "n_rows", "share", "parts")
SIZES = (*STRIDES, *COUNTS)


@entry(do_not_specialize=("length", "n_words", "n_blocks"))
def choosers_kernel(words, tokens, counts, length: tl.int32, n_words: tl.int32, n_blocks: tl.int32, BLOCK: tl.constexpr):
    """Tokens that chose a block, in order, [index rows, blocks, T], and their number. Grid: (index rows * blocks,)."""
    row = tl.program_id(0).to(tl.int64)
    chosen = (row % n_blocks).to(tl.int32)
    words += row // n_blocks * length * n_words + chosen // 32
    found = 0
    for first in range(0, length, BLOCK):
        t = first + tl.arange(0, BLOCK)
        word = tl.load(words + t.to(tl.int64) * n_words, mask=t < length, other=0)
        flag = (word >> (chosen % 32)) & 1
        rank = found + tl.cumsum(flag, 0) - 1
        tl.store(tokens + row * length + rank, t, mask=flag != 0)
        found += tl.sum(flag, 0)
    tl.store(counts + row, found)


@triton.jit
def walk_tokens(
    k_NK, v_NV, q, dy, lse, delta, tokens, s, first, stop, first_head, batch,
    q_b, q_h, q_t, dy_b, dy_h, dy_t, length, heads, group, pack, past,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, UNIT: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dk, still without its scale, and dv of the keys at `s`, from the tokens first .. stop of a list."""
    i, e, r = tl.arange(0, BK), tl.arange(0, BV), tl.arange(0, M)
    dk_NK, dv_NV = tl.zeros([N, BK], tl.float32), tl.zeros([N, BV], tl.float32)
    visits = tl.cdiv(tl.maximum(stop - first, 0), M // pack)
    for n in tl.range(visits * (group // pack), num_stages=STAGES):
        place = first + n % visits * (M // pack) + r // pack
        head, inside = first_head + n // visits * pack + r % pack, place < stop
        t = tl.load(tokens + place, mask=inside, other=0)
        q_MK, dy_MV, lse_M, delta_M = load_queries(
            q, dy, lse, delta, batch, head, t, i, e, inside, q_b, q_h, q_t, dy_b, dy_h, dy_t, length, heads, K, V, UNIT, DOT
        )  # fmt: skip
        score_NM, dp_NM = products(k_NK, v_NV, q_MK, dy_MV, K, PRECISION)
        seen = inside[None, :] & (t[None, :] + past >= s[:, None])
        dv_NV, ds_NM = through_weights(dv_NV, score_NM, dp_NM, seen, lse_M, delta_M, dy_MV, DOT, PRECISION)
        dk_NK = tl.dot(ds_NM, q_MK, dk_NK, input_precision=PRECISION)
    return dk_NK, dv_NV


@entry(do_not_specialize=SIZES)
def chosen_key_kernel(
    q, k, v, tokens, counts, lse, dy, delta, dk, dv,
    q_b: tl.int64, q_h: tl.int64, q_t: tl.int64, k_b: tl.int64, k_h: tl.int64, k_t: tl.int64,
    v_b: tl.int64, v_h: tl.int64, v_t: tl.int64, dy_b: tl.int64, dy_h: tl.int64, dy_t: tl.int64,
    length: tl.int32, n_keys: tl.int32, kv_heads: tl.int32, group: tl.int32, pack: tl.int32, past: tl.int32,
    block: tl.int32, index_rows: tl.int32, n_rows: tl.int32, share: tl.int32, parts: tl.int32,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, UNIT: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Shares in the gradients dk [P, B, S, G, K] and dv [P, B, S, G, V]. Grid: (B * G * parts * tiles of keys,).

    A part is `share` tokens of the list; one that has none is not written, but for the first.
    """
    key_tiles = tl.cdiv(n_keys, N)
    program = tl.program_id(0)
    key_tile, outer = program % key_tiles, program // key_tiles
    part, kv_index = outer % parts, outer // parts
    batch, kv_head = (kv_index // kv_heads).to(tl.int64), kv_index % kv_heads
    row = (kv_index % index_rows).to(tl.int64) * tl.cdiv(n_keys, block) + key_tile * N // block
    first, stop = part * share, tl.minimum((part + 1) * share, tl.load(counts + row))
    if (part == 0) | (first < stop):
        s = key_tile * N + tl.arange(0, N)
        i, e = tl.arange(0, BK), tl.arange(0, BV)
        k_NK = load_rows(k, (batch * k_b + kv_head * k_h + s * k_t) * UNIT, i, s < n_keys, K).to(DOT)
        v_NV = load_rows(v, (batch * v_b + kv_head * v_h + s * v_t) * UNIT, e, s < n_keys, V).to(DOT)
        dk_NK, dv_NV = walk_tokens(
            k_NK, v_NV, q, dy, lse, delta, tokens + row * length, s, first, stop, kv_head * group, batch,
            q_b, q_h, q_t, dy_b, dy_h, dy_t, length, kv_heads * group, group, pack, past,
            K, V, BK, BV, UNIT, M, N, DOT, PRECISION, STAGES,
        )  # fmt: skip
        rows = part.to(tl.int64) * n_rows + (batch * n_keys + s) * kv_heads + kv_head
        store_gradients(dk, dv, rows, s < n_keys, i, e, dk_NK, dv_NV, K, V)


@triton.jit
def add_parts(parts, out, row_R, used_R, n_parts, n_rows, WIDTH: tl.constexpr, BW: tl.constexpr):
    """Rows of `out` as sums of the first `used_R` parts."""
    i = tl.arange(0, BW)
    place = row_R[:, None] * WIDTH + i[None, :]
    exists = (used_R > 0)[:, None] & (i < WIDTH)[None, :]
    total = tl.zeros([row_R.shape[0], BW], tl.float32)
    for part in range(n_parts):
        total += tl.load(parts + place, mask=exists & (part < used_R)[:, None], other=0.0)
        parts += n_rows.to(tl.int64) * WIDTH
    tl.store(out + place, total.to(out.dtype.element_ty), mask=exists)


@entry(do_not_specialize=COUNTS)
def add_parts_kernel(
    dk_parts, dv_parts, counts, dk, dv,
    n_keys: tl.int32, kv_heads: tl.int32, block: tl.int32, index_rows: tl.int32, n_rows: tl.int32, share: tl.int32, parts: tl.int32,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Dk [B, S, G, K] and dv [B, S, G, V]. Grid: (tiles of ROWS rows,)."""
    row_R = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    s_R, kv_R = row_R // kv_heads % n_keys, row_R // kv_heads // n_keys * kv_heads + row_R % kv_heads
    listed_R = kv_R % index_rows * tl.cdiv(n_keys, block) + s_R // block
    count_R = tl.load(counts + listed_R, mask=row_R < n_rows, other=0)
    used_R = tl.where(row_R < n_rows, tl.maximum(tl.cdiv(count_R, share), 1), 0)
    most = tl.max(used_R, 0)
    add_parts(dk_parts, dk, row_R, used_R, most, n_rows, K, BK)
    add_parts(dv_parts, dv, row_R, used_R, most, n_rows, V, BV)
