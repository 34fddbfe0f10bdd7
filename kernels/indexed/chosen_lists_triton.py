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
def pack_kernel(chosen, words, before, rows: tl.int32, n_blocks: tl.int32, n_words: tl.int32, ROWS: tl.constexpr):
    """Bits [rows, W] of a choice [rows, N], and how many come before a word, and in all, [rows, W + 1]. Grid: (tiles of rows,)."""
    row, bit = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, 32)
    inside = row < rows
    chosen += row.to(tl.int64)[:, None] * n_blocks
    words += row.to(tl.int64) * n_words
    before += row.to(tl.int64) * (n_words + 1)
    found = tl.zeros([ROWS], tl.int32)
    for n in range(n_words):
        block = (n * 32 + bit)[None, :]
        flag = (tl.load(chosen + block, mask=inside[:, None] & (block < n_blocks), other=0) != 0).to(tl.int32)
        tl.store(words + n, tl.sum(flag << bit[None, :], 1), mask=inside)
        tl.store(before + n, found, mask=inside)
        found += tl.sum(flag, 1)
    tl.store(before + n_words, found, mask=inside)


@entry
def tiles_kernel(
    words, tiles, length: tl.int32, n_blocks: tl.int32, n_words: tl.int32, tokens: tl.int32, TILES: tl.constexpr
):  # fmt: skip
    """Whether any of the tokens of a tile chose a block, bytes [R, I, N]. Grid: (R * groups of TILES tiles * W,)."""
    n_tiles = tl.cdiv(length, tokens)
    groups = tl.cdiv(n_tiles, TILES)
    program = tl.program_id(0)
    word, outer = program % n_words, program // n_words
    index_row, tile = (outer // groups).to(tl.int64), outer % groups * TILES + tl.arange(0, TILES)
    words += index_row * length * n_words + word
    any_T = tl.zeros([TILES], tl.int32)
    for n in range(tokens):
        t = tile * tokens + n
        any_T |= tl.load(words + t.to(tl.int64) * n_words, mask=t < length, other=0)
    bit = tl.arange(0, 32)
    block = (word * 32 + bit)[None, :]
    place = (index_row * n_tiles + tile)[:, None] * n_blocks + block
    tl.store(
        tiles + place, ((any_T[:, None] >> bit[None, :]) & 1).to(tl.uint8), mask=(tile < n_tiles)[:, None] & (block < n_blocks)
    )


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
