"""Dropout without a generator: what is kept is a hash of the run's seed, the step, the example and the place.

A member's draws are therefore the same alone and in any fleet, on every device and after any restart, nothing is stored, and a
compiler can make them again in the backward pass instead of keeping them.

Shape legend: E members, B batch, T time, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Multipliers of a 32-bit mixer with low bias (Wellons 2018, "Prospecting for hash functions"), as signed integers.
FIRST, SECOND = 0x7FEB352D, 0x846CA68B - 2**32


def _mix(x: Tensor) -> Tensor:
    """A bijection of int32 in which every input bit flips every output bit about half of the time."""
    x = (x ^ (x >> 16 & 0xFFFF)) * FIRST
    x = (x ^ (x >> 15 & 0x1FFFF)) * SECOND
    return x ^ (x >> 16 & 0xFFFF)


def example_keys(seeds_E: Tensor, step: Tensor, batch: int) -> Tensor:
    """A key for every example of every member at a step, [E, B] int32.

    Args:
        seeds_E: int32.
        step: int32, one number.
        batch: B.
    """
    examples_B = torch.arange(batch, device=seeds_E.device, dtype=torch.int32)
    return _mix(_mix(seeds_E + _mix(step))[:, None] + examples_B)


def dropout(x_BTD: Tensor, key_B: Tensor, rate: float) -> Tensor:
    """Zeroes elements at a rate and scales up the others.

    Args:
        x_BTD: fewer than 2^31 elements an example.
        key_B: from `example_keys`.
        rate: in [0, 1).
    """
    length, width = x_BTD.shape[1:]
    place_TD = torch.arange(length * width, device=x_BTD.device, dtype=torch.int32).view(length, width)
    uniform_BTD = _mix(key_B[:, None, None] + place_TD)  # over all of int32
    return torch.where(uniform_BTD >= round(rate * 2**32) - 2**31, x_BTD / (1 - rate), 0.0).to(x_BTD.dtype)
