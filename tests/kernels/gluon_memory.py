"""The memory of a Gluon kernel that `gluon_on_cpu` follows: addresses, blocks that copies move, shared memory, barriers."""

from __future__ import annotations

import types
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


class Pointer:
    """An address in a flat tensor, or a tensor of addresses."""

    def __init__(self, flat: Tensor, at: Any = 0):
        self.flat, self.at = flat, at
        self.dtype = types.SimpleNamespace(element_ty=flat.dtype)

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.flat, self.at + offset)

    def __sub__(self, offset: Any) -> Pointer:
        return Pointer(self.flat, self.at - offset)


@dataclass
class Descriptor:
    """What `tma` moves blocks of."""

    base: Tensor
    block: list[int]

    def inside(self, coordinates: list[Any], block: Tensor) -> tuple[Tensor, Tensor]:
        """The part of the tensor that a block covers, and that part of the block."""
        starts = [int(c) for c in coordinates]
        assert all(start >= 0 for start in starts), coordinates
        limits = zip(starts, self.block, self.base.shape, strict=True)
        stops = [max(start, min(start + size, limit)) for start, size, limit in limits]
        spans = [slice(start, stop) for start, stop in zip(starts, stops, strict=True)]
        part = block.view(self.block)[tuple(slice(0, stop - start) for start, stop in zip(starts, stops, strict=True))]
        return self.base[tuple(spans)], part


class Shared:
    """A view of shared memory; `unfenced` is common to all views of an allocation, a number has `size` bytes."""

    def __init__(self, x: Tensor, unfenced: set[int], size: int = 2):
        self.x, self.unfenced, self.size = x, unfenced, size

    def index(self, i: Any) -> Shared:
        return Shared(self.x[int(i)], self.unfenced, self.size)

    def permute(self, order: list[int]) -> Shared:
        return Shared(self.x.permute(order), self.unfenced, self.size)

    def reshape(self, shape: list[int]) -> Shared:
        return Shared(self.x.view(shape), self.unfenced, self.size)

    def _reinterpret(self, _: Any, shape: list[int], __: Any) -> Shared:
        return self.reshape(shape)

    def slice(self, start: int, length: int, dim: int = 0) -> Shared:
        return Shared(self.x.narrow(dim, start, length), self.unfenced, self.size)

    def load(self, _: Any) -> Tensor:
        return self.x.clone()

    def store(self, x: Tensor) -> None:
        self.x.copy_(x)
        self.unfenced.add(self.x.untyped_storage().data_ptr())

    def of_accelerators(self) -> Tensor:
        """The memory as tensor cores and copies see it."""
        assert self.x.untyped_storage().data_ptr() not in self.unfenced, "read by an accelerator before a fence"
        return self.x


@dataclass
class Barrier:
    """Counts bytes or arrivals, so many a phase; copies wait in it for the thread that waits.

    A phase is waited for by its parity, which is also that of the phase before the last, so who waits has to see every phase.
    """

    count: int = 1
    arrived: int = 0
    expected: int = 0
    phase: int = 0
    copies: list[Any] = field(default_factory=list)
    filled: bool = False
