"""Who chose a block of keys: bits of a choice, ranks of a token's blocks, and the tokens of each block.

Shape legend: R rows of the index, T tokens, N blocks, W words of a token, I tiles of tokens, P spans of tokens.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels._entry import entry


@triton.jit
def ones(word):
    """Number of set bits of a word."""
    x = word.to(tl.uint32)
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24).to(tl.int32)


@entry
def pack_kernel(
    chosen, words, other, length: tl.int32, n_blocks: tl.int32, n_words: tl.int32, TOKENS: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """Bits [R, T, W] of a choice [R, T, N], and another tensor. Grid: (R * tiles of ROWS tokens,).

    For walks by query it says whether any of the TOKENS tokens of a tile, which divide ROWS, chose a block, [R, I, N]; for those
    by key, where TOKENS is 0, how many blocks a token chose in earlier words, and in all, [R, T, W + 1].
    """
    row_tiles = tl.cdiv(length, ROWS)
    program = tl.program_id(0)
    index_row, first = (program // row_tiles).to(tl.int64), program % row_tiles * ROWS
    t, bit = first + tl.arange(0, ROWS), tl.arange(0, 32)
    row = index_row * length + t
    found = tl.zeros([ROWS], tl.int32)
    for n in range(n_words):
        block = n * 32 + bit
        inside = (t < length)[:, None] & (block < n_blocks)[None, :]
        flag = (tl.load(chosen + row[:, None] * n_blocks + block[None, :], mask=inside, other=0) != 0).to(tl.int32)
        tl.store(words + row * n_words + n, tl.sum(flag << bit[None, :], 1), mask=t < length)
        if TOKENS:
            tile = first // TOKENS + tl.arange(0, ROWS // TOKENS)
            place = (index_row * tl.cdiv(length, TOKENS) + tile)[:, None] * n_blocks + block[None, :]
            exists = (tile * TOKENS < length)[:, None] & (block < n_blocks)[None, :]
            tl.store(other + place, tl.max(tl.reshape(flag, [ROWS // TOKENS, TOKENS, 32]), 1).to(tl.uint8), mask=exists)
        else:
            tl.store(other + row * (n_words + 1) + n, found, mask=t < length)
            found += tl.sum(flag, 1)
    if not TOKENS:
        tl.store(other + row * (n_words + 1) + n_words, found, mask=t < length)


@entry
def slots_kernel(
    words, before, slots, counts, length: tl.int32, n_words: tl.int32, n_blocks: tl.int32, most: tl.int32,
    span: tl.int32, spans: tl.int32, BLOCKS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Slots of a span's tokens that chose a block, in order, [R, P, N, span], and their number [R, P, N].

    The slot of token t is t * most + its rank of the block. Grid: (R * P * groups of BLOCKS blocks,). BLOCKS divides 32.
    """
    groups = tl.cdiv(n_blocks, BLOCKS)
    program = tl.program_id(0)
    outer = (program // groups).to(tl.int64)
    block = program % groups * BLOCKS + tl.arange(0, BLOCKS)
    word, exists = program % groups * BLOCKS // 32, block < n_blocks
    words += outer // spans * length * n_words + word
    before += outer // spans * length * (n_words + 1) + word
    lists = (outer * n_blocks + block) * span
    first = (outer % spans).to(tl.int32) * span
    found = tl.zeros([BLOCKS], tl.int32)
    for start in range(0, span, TOKENS):
        place = start + tl.arange(0, TOKENS)
        t = first + place
        inside = (place < span) & (t < length)
        word_T = tl.load(words + t.to(tl.int64) * n_words, mask=inside, other=0).to(tl.uint32)
        before_T = tl.load(before + t.to(tl.int64) * (n_words + 1), mask=inside, other=0)
        bit = block % 32
        rank = before_T[:, None] + ones(word_T[:, None] << (31 - bit)[None, :] << 1)
        flag = (word_T[:, None] >> bit[None, :]).to(tl.int32) & (rank < most).to(tl.int32) & exists[None, :].to(tl.int32)
        position = found[None, :] + tl.cumsum(flag, 0) - 1
        tl.store(slots + lists[None, :] + position, t[:, None] * most + rank, mask=flag != 0)
        found += tl.sum(flag, 0)
    tl.store(counts + outer * n_blocks + block, found, mask=exists)
