"""Static causal sparse attention patterns on token positions (block size 1).

Each pattern is a function of integer tensors: the query's and the key's position, broadcast against each other. It says
who sees whom, so a mask, a row of it for decoding, and a receptive field all come from the same definition. Every query
sees itself and nothing after it.
"""

from __future__ import annotations

import torch
from torch import Tensor


def dilated(query: Tensor, key: Tensor, *, window: int, dilation: int) -> Tensor:
    """The own token and every `dilation`-th before it, `window` keys in all (Beltagy et al. 2020, section 3.1)."""
    age = query - key
    return (age >= 0) & (age < window * dilation) & (age % dilation == 0)


def strided(query: Tensor, key: Tensor, *, stride: int) -> Tensor:
    """The last `stride` tokens and every `stride`-th before (Child et al. 2019, section 4.3, both heads united)."""
    age = query - key
    return (age >= 0) & ((age < stride) | (age % stride == 0))


def sink_window(query: Tensor, key: Tensor, *, window: int, sinks: int) -> Tensor:
    """The last `window` tokens and the first `sinks` (Xiao et al. 2023, StreamingLLM; "A-shape")."""
    age = query - key
    return (age >= 0) & ((age < window) | (key < sinks))


def longformer(query: Tensor, key: Tensor, *, window: int, dilation: int, sinks: int) -> Tensor:
    """A dilated window and global tokens (Beltagy et al. 2020, section 3.1).

    The global tokens are the first `sinks`; their own rows are dense there, which a causal mask already makes them here.
    """
    return dilated(query, key, window=window, dilation=dilation) | ((key < sinks) & (query >= key))


def bigbird(query: Tensor, key: Tensor, *, window: int, sinks: int, n_random: int, seed: int) -> Tensor:
    """Window, global tokens and random keys (Zaheer et al. 2020, section 2).

    Each query draws `n_random` keys, with replacement, from its own past. The draws hash the query's position and not a
    generator's state, so the mask of a sequence is a corner of the mask of any longer one.
    """
    visible = sink_window(query, key, window=window, sinks=sinks)
    for draw in range(n_random):
        visible = visible | (key == _hash(query * n_random + draw, seed) % (query + 1))
    return visible


def power(query: Tensor, key: Tensor, *, window: int, sinks: int) -> Tensor:
    """Window, sinks, and every key whose distance is a power of two (PowerAttention, 2025, here with blocks of one token).

    Any distance below T is a sum of at most ceil(log2 T) powers of two: that many layers see the whole past.
    """
    age = query - key
    return sink_window(query, key, window=window, sinks=sinks) | ((age > 0) & (age & (age - 1) == 0))


def _hash(number: Tensor, seed: int) -> Tensor:
    """32 well-mixed bits per non-negative integer (multiply, xor-shift, twice), held in int64 without overflow."""
    for _ in range(2):
        number = (number ^ (number >> 16) ^ seed) & 0xFFFFFFFF
        number = (number * 0x045D9F3B) & 0xFFFFFFFF
    return number ^ (number >> 16)


MASKS = {
    "dilated": dilated,
    "strided": strided,
    "longformer": longformer,
    "bigbird": bigbird,
    "power": power,
    "sink_window": sink_window,
}
"""Patterns by name."""


def mask(pattern: str, n_tokens: int, *, device: torch.device | str = "cpu", **options: int) -> Tensor:
    """The whole mask of a sequence.

    Args:
        pattern: a key of `MASKS`.
        n_tokens: T.
        device: where to build it.
        options: the pattern's options.

    Returns:
        [T, T], True where the row's query sees the column's key.
    """
    position = torch.arange(n_tokens, device=device)
    return MASKS[pattern](position[:, None], position, **options)
