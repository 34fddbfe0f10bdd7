"""What a forward pass keeps for its backward pass in one tensor: autograd, allocator and dispatcher handle each tensor by itself.

Shape legend: B batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

Part = tuple[Sequence[int], torch.dtype]


def memory_for(parts: Sequence[Part], like: Tensor) -> Tensor:
    """Unwritten memory for parts that share their first axis, [B, bytes].

    Its rows are not those of the parts, but as many, so that a batch may be cut into members and joined again.

    Args:
        parts: shape and dtype of each; no elements, or B in the first axis.
        like: tells the device, and B.
    """
    return like.new_empty(like.shape[0], sum(_row_bytes(part) for part in parts), dtype=torch.uint8)


def parts_of(memory: Tensor, parts: Sequence[Part]) -> list[Tensor]:
    """The parts that lie in memory made for them, each dense.

    They lie one behind the other without gaps, first those whose rows are multiples of the largest power of two, so that each
    starts on a multiple of its own.
    """
    flat, at = memory.view(-1), 0
    found: dict[int, Tensor] = {}
    for number in sorted(range(len(parts)), key=lambda number: -_power_of_two(_row_bytes(parts[number]))):
        shape, dtype = parts[number]
        size = dtype.itemsize * prod(shape)
        found[number] = flat[at : at + size].view(dtype).view(*shape)
        at += size
    return [found[number] for number in range(len(parts))]


def _row_bytes(part: Part) -> int:
    shape, dtype = part
    return dtype.itemsize * prod(shape[1:]) if shape[0] else 0


def _power_of_two(size: int) -> int:
    """The largest that divides it."""
    return size & -size
