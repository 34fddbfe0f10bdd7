"""Checks of arguments that cost no synchronisation: what a caller got wrong is said before any launch."""

from __future__ import annotations

from torch import Tensor


def check_arguments(x: Tensor, others: dict[str, tuple[Tensor | None, tuple[int, ...]]], *, first: str = "x") -> None:
    """Raises ValueError if a tensor has another shape than expected beside `x`, or is on another device.

    Args:
        x: the tensor that the expected shapes follow from.
        others: by argument name, a tensor or None, and its shape.
        first: name of `x`.
    """
    for name, (tensor, shape) in others.items():
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; with {first} of shape {tuple(x.shape)} it is {tuple(shape)}")
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device} and {first} on {x.device}; move them to one device")
