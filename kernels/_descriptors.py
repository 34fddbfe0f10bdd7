"""Descriptors for the tensor memory accelerator in repeated calls: encoded once for each address instead of at every launch."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import _disable_current_modes

MOST = 64
"""Addresses for which one descriptor is kept encoded; then all of them are forgotten."""
_thread = threading.local()


class Place(NamedTuple):
    """A tensor of a call: the arguments come first, then what the call makes."""

    at: int


class Described(NamedTuple):
    """A descriptor without its tensor, and the place of that."""

    template: Any
    base: Place
    device: torch.device


class Encoder:
    """What stands for a descriptor among the arguments of a launch, by address of its tensor.

    Args:
        described: all that does not change.
        meta: how Triton's C function wants it encoded; None for the descriptor itself, which Triton's Python encodes.
    """

    def __init__(self, described: Described, meta: Any) -> None:
        self.described, self.meta = described, meta
        self.known: dict[int, Sequence[Any]] = {}

    def encode(self, address: int) -> Sequence[Any]:
        """The arguments for a tensor at this address, which are remembered."""
        give_context(self.described.device)
        found: Sequence[Any] = (with_base(self.described.template, _Address(address)),)
        if self.meta is not None:
            from triton.backends.nvidia.driver import make_tensordesc_arg

            found = make_tensordesc_arg(found[0], self.meta)
        if len(self.known) >= MOST:
            self.known.clear()
        self.known[address] = found
        return found


class _Address(NamedTuple):
    """Stands for a tensor of which only the address is asked."""

    address: int

    def data_ptr(self) -> int:
        """See `torch.Tensor.data_ptr`."""
        return self.address


def with_base(descriptor: Any, base: Any) -> Any:
    """The descriptor of another tensor of the same kind; what its class checks was checked for the first."""
    made = object.__new__(type(descriptor))
    made.__dict__.update(descriptor.__dict__, base=base)
    return made


def give_context(device: torch.device) -> None:
    """Gives the thread a CUDA context: a launch sees to it itself, but descriptors of tensors are made before.

    Autograd's thread has none where all kernels were loaded by other threads.
    """
    if getattr(_thread, "context", None) is None:
        with _disable_current_modes():
            _thread.context = torch.zeros(1, device=device)
