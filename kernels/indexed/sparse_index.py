"""The index of attention to chosen or patterned keys: bits for each token, and which pairs of tiles hold any.

Shape legend: R rows of the index, T queries, N blocks of keys, W words of a token, I tiles of queries, J tiles of keys.
"""

from __future__ import annotations

import inspect
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import _ahead
from kernels.sparse_masks import MASKS

ROWS_AT_ONCE = 1024
"""Rows of a static mask that exist at a time while it is packed into bits."""


class Listed(NamedTuple):
    """Which keys a token sees by choice.

    Args:
        words: [R, T, W] int32, bit n % 32 of word n // 32 is set if the token chose block n.
        tiles: [R, I, J] bytes, whether any token of a tile of queries chose a key of a tile of keys.
        block: keys of a block; a multiple or a divisor of the keys of a tile.
    """

    words: Tensor
    tiles: Tensor
    block: int


ROWS_TO_PACK, TILES_AT_ONCE = 64, 64
"""Tokens that a program packs into bits, and tiles of tokens that one looks at."""
KEPT = 32
"""Static indices that stay; the oldest goes when there is one more."""

_kept: dict[tuple[object, ...], Listed] = {}


def packed(chosen_RTN: Tensor, block: int, tile: tuple[int, int], n_keys: int) -> Listed:
    """The index of a choice for walks by query.

    Args:
        chosen_RTN: bool, whether a token chose a block.
        block: keys of a block.
        tile: tokens and keys of a tile.
        n_keys: number of keys.
    """
    tokens, keys = tile
    words, _ = pack(chosen_RTN)
    touched_RIN = _touched(words, chosen_RTN.shape[2], tokens)
    n_tiles = -(-n_keys // keys)
    if block >= keys:
        return Listed(
            words, touched_RIN.repeat_interleave(block // keys, -1)[..., :n_tiles] if block > keys else touched_RIN, block
        )
    wide = F.pad(touched_RIN, (0, -touched_RIN.shape[2] % (keys // block)))
    return Listed(words, wide.unflatten(-1, (-1, keys // block)).amax(-1)[..., :n_tiles], block)


def pack(chosen_RTN: Tensor) -> tuple[Tensor, Tensor]:
    """Bits of a choice [R, T, W], and how many of a token's come before a word, and in all, [R, T, W + 1]; both int32."""
    from kernels.indexed import chosen_lists_triton

    chosen = chosen_RTN.contiguous().view(torch.uint8)
    rows, length, n_blocks = chosen.shape
    n_words = -(-n_blocks // 32)
    words = chosen.new_empty(rows, length, n_words, dtype=torch.int32)
    before = words.new_empty(rows, length, n_words + 1)
    chosen_lists_triton.pack_kernel[(-(-rows * length // ROWS_TO_PACK),)](
        chosen, words, before, rows * length, n_blocks, n_words, ROWS=ROWS_TO_PACK, num_warps=4
    )
    return words, before


def _touched(words: Tensor, n_blocks: int, tokens: int) -> Tensor:
    """Whether any token of a tile chose a block, [R, I, N] bytes."""
    from kernels.indexed import chosen_lists_triton

    rows, length, n_words = words.shape
    tiles = words.new_empty(rows, -(-length // tokens), n_blocks, dtype=torch.uint8)
    chosen_lists_triton.tiles_kernel[(rows * -(-tiles.shape[1] // TILES_AT_ONCE) * n_words,)](
        words, tiles, length, n_blocks, n_words, tokens, TILES=TILES_AT_ONCE, num_warps=4
    )
    return tiles


def static_index(pattern: str, numbers: tuple[int, ...], length: int, tile: tuple[int, int], device: torch.device) -> Listed:
    """The index of a static pattern with these options, kept for the next call: it depends on the length alone."""
    key = (pattern, numbers, length, tile, device)
    if key in _kept:
        return _kept[key]
    mask, position = MASKS[pattern], torch.arange(length, device=device)
    options = dict(zip(option_names(pattern), numbers, strict=True))
    rows = -(-ROWS_AT_ONCE // tile[0]) * tile[0]
    parts = [packed(mask(query[:, None], position, **options)[None], 1, tile, length) for query in position.split(rows)]
    index = Listed(torch.cat([part.words for part in parts], 1), torch.cat([part.tiles for part in parts], 1), 1)
    is_capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()  # a graph owns what is made inside it
    if not is_capturing and not isinstance(_ahead.state(), _ahead.Wanted):  # which launches nothing, so nothing was written
        if len(_kept) == KEPT:
            del _kept[next(iter(_kept))]
        _kept[key] = index
    return index


def option_names(pattern: str) -> list[str]:
    """Names of a pattern's options, in order."""
    return [
        name for name, parameter in inspect.signature(MASKS[pattern]).parameters.items() if parameter.kind is parameter.KEYWORD_ONLY
    ]
