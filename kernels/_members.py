"""How vmap rules fold members: E mapped calls become one call on a longer batch."""

from __future__ import annotations

from torch import Tensor


def stack_members(tensor: Tensor, axis: int | None, members: int) -> Tensor:
    """[E, ...], with the mapped axis first; a tensor that all members share is expanded without a copy."""
    return tensor.expand(members, *tensor.shape) if axis is None else tensor.movedim(axis, 0)


def fold_members(tensor: Tensor, axis: int | None, members: int) -> Tensor:
    """[E B, ...] from a mapped [B, ...]."""
    return stack_members(tensor, axis, members).flatten(0, 1)
