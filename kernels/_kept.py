"""What a forward pass keeps for its backward pass in one tensor: autograd, allocator and dispatcher handle each tensor by itself.

Shape legend: B batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod

import torch
from torch import Tensor

ALIGNED = 128
"""Bytes on which each part starts; the tensor memory accelerator wants 16."""

Part = tuple[Sequence[int], torch.dtype]


def memory_for(parts: Sequence[Part], like: Tensor) -> Tensor:
    """Unwritten memory for parts that share their first axis, [B, bytes].

    Its rows are not those of the parts, but as many, so that a batch may be cut into members and joined again.

    Args:
        parts: shape and dtype of each; no elements, or B in the first axis.
        like: tells the device, and B.
    """
    return like.new_empty(like.shape[0], sum(_row_bytes(part) for part in parts), dtype=torch.uint8)


def parts_of(memory: Tensor, parts: Sequence[Part]) -> Iterator[Tensor]:
    """The parts that lie in memory made for them, each dense."""
    at, (batch, _) = 0, memory.shape
    flat = memory.view(-1)
    for shape, dtype in parts:
        size = dtype.itemsize * prod(shape)
        yield flat[at : at + size].view(dtype).view(*shape)
        at += batch * _row_bytes((shape, dtype))


def _row_bytes(part: Part) -> int:
    shape, dtype = part
    size = dtype.itemsize * prod(shape)
    return -(-size // (max(1, shape[0]) * ALIGNED)) * ALIGNED if size else 0
