"""The index of attention to chosen or patterned keys: bits for each token, and which pairs of tiles hold any.

Shape legend: R rows of the index, T queries, N blocks of keys, W words of a token, I tiles of queries, J tiles of keys.
"""

from __future__ import annotations

import inspect
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.sparse_masks import MASKS

ROWS_AT_ONCE = 1024
"""Rows of a static mask that exist at a time while it is packed into bits."""


class Listed(NamedTuple):
    """Which keys a token sees by choice.

    Args:
        words: [R, T, W] int32, bit n % 32 of word n // 32 is set if the token chose block n.
        tiles: [R, I, J] bool, whether any token of a tile of queries chose a key of a tile of keys.
        block: keys of a block; a multiple or a divisor of the keys of a tile.
    """

    words: Tensor
    tiles: Tensor
    block: int


KEPT = 32
"""Static indices that stay; the oldest goes when there is one more."""

_kept: dict[tuple[object, ...], Listed] = {}


def packed(chosen_RTN: Tensor, block: int, tile: tuple[int, int], n_keys: int) -> Listed:
    """The index of a choice.

    Args:
        chosen_RTN: bool, whether a token chose a block.
        block: keys of a block.
        tile: tokens and keys of a tile.
        n_keys: number of keys.
    """
    tokens, keys = tile
    length, n_blocks = chosen_RTN.shape[1:]
    bits = F.pad(chosen_RTN, (0, -n_blocks % 32)).unflatten(-1, (-1, 32)).to(torch.int32)
    words = (bits << torch.arange(32, dtype=torch.int32, device=bits.device)).sum(-1, dtype=torch.int32)
    any_RIN = F.pad(chosen_RTN, (0, 0, 0, -length % tokens)).unflatten(1, (-1, tokens)).any(2)
    if block >= keys:
        tiles = any_RIN.repeat_interleave(block // keys, -1)
    else:
        tiles = F.pad(any_RIN, (0, -n_blocks % (keys // block))).unflatten(-1, (-1, keys // block)).any(-1)
    return Listed(words, tiles[..., : -(-n_keys // keys)], block)


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
    if not (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):  # a graph owns what is made inside it
        if len(_kept) == KEPT:
            del _kept[next(iter(_kept))]
        _kept[key] = index
    return index


def option_names(pattern: str) -> list[str]:
    """Names of a pattern's options, in order."""
    return [
        name for name, parameter in inspect.signature(MASKS[pattern]).parameters.items() if parameter.kind is parameter.KEYWORD_ONLY
    ]
