"""How vmap rules fold members: E mapped calls become one call on a longer batch."""

from __future__ import annotations

from torch import Tensor


def stack_members(tensor: Tensor, axis: int | None, members: int) -> Tensor:
    """[E, ...], with the mapped axis first; a tensor that all members share is expanded without a copy."""
    return tensor.expand(members, *tensor.shape) if axis is None else tensor.movedim(axis, 0)


def fold_members(tensor: Tensor, axis: int | None, members: int) -> Tensor:
    """[E B, ...] from a mapped [B, ...]."""
    return stack_members(tensor, axis, members).flatten(0, 1)


def even_rows(x_BTD: Tensor) -> Tensor:
    """The same tensor if its tokens lie at equal distances and its channels side by side, as in a slice of a projection."""
    batch_stride, token_stride, channel_stride = x_BTD.stride()
    regular = channel_stride == 1 and batch_stride == x_BTD.shape[1] * token_stride
    return x_BTD if regular else x_BTD.contiguous()
