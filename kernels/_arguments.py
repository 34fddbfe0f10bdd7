"""Checks of arguments that cost no synchronisation: what a caller got wrong is said before any launch.

What only the values show is looked for by `kernels.values`, in a mode of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from kernels.values import check_values, is_checking

REMEMBERED = 1024
"""Descriptions of arguments that a check remembers; then it forgets all of them."""

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
INDICES = (torch.int64, torch.int32)
"""What torch takes as places to read from."""
BOOLS = (torch.bool,)
_NAMES = {dtype: str(dtype).removeprefix("torch.") for dtype in (*FLOATS, *INTEGERS, *BOOLS)}


def check_rank(name: str, x: Tensor, axes: str) -> None:
    """Raises ValueError unless `x` has as many axes as `axes` has words; some may be empty."""
    if x.ndim != axes.count(" ") + 1:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; it must be [{axes.replace(' ', ', ')}]")


def check_axes(name: str, x: Tensor, axes: str) -> None:
    """Raises ValueError unless `x` has as many axes as `axes` has words, none of them empty.

    Args:
        name: of the argument.
        x: the tensor.
        axes: their names, as "B T D".
    """
    if x.ndim != axes.count(" ") + 1 or 0 in x.shape:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; it must be [{axes.replace(' ', ', ')}], none of them 0")


def check_same(name: str, x: Tensor, other: str, y: Tensor) -> None:
    """Raises ValueError unless two tensors have one shape."""
    if x.shape != y.shape:
        raise ValueError(f"{name} has shape {tuple(x.shape)} and {other} {tuple(y.shape)}; it must be the same")


def check_dtype(name: str, x: Tensor, allowed: tuple[torch.dtype, ...] = FLOATS) -> None:
    """Raises ValueError unless the dtype of `x` is one of those allowed."""
    if x.dtype not in allowed:
        raise ValueError(f"{name} has dtype {x.dtype}; it must be {' or '.join(_NAMES[dtype] for dtype in allowed)}")


def check_arguments(
    x: Tensor,
    others: dict[str, tuple[Tensor | None, tuple[int, ...]]],
    *,
    first: str = "x",
    dtypes: dict[str, tuple[torch.dtype, ...]] | None = None,
    unbounded: tuple[str, ...] = (),
    values: bool = True,
) -> None:
    """Raises ValueError if a tensor has another shape than expected beside `x`, another dtype, or is on another device.

    Args:
        x: the tensor that the expected shapes follow from.
        others: by argument name, a tensor or None, and its shape.
        first: name of `x`.
        dtypes: by argument name, the dtypes allowed where they are not `FLOATS`.
        unbounded: arguments that the checked mode looks at without their range.
        values: whether it looks at all; logits may be infinite, and a NaN among them is told by the loss.
    """
    dtypes = dtypes or {}
    check_dtype(first, x, dtypes.get(first, FLOATS))
    for name, (tensor, shape) in others.items():
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; with {first} of shape {tuple(x.shape)} it is {tuple(shape)}")
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device} and {first} on {x.device}; move them to one device")
        check_dtype(name, tensor, dtypes.get(name, FLOATS))
    if values and is_checking():
        for name, tensor in {first: x, **{name: tensor for name, (tensor, _) in others.items()}}.items():
            if tensor is not None:
                check_values(name, tensor, bounded=name not in unbounded)


def remembered(check: Callable[..., None]) -> Callable[..., None]:
    """A check of shapes, dtypes and devices that passes over arguments described like others that have passed.

    Args:
        check: gets tensors, numbers, None, and tuples of these by position; looks at no values but in the checked mode.
    """
    passed: set[Any] = set()

    @wraps(check)
    def checked(*args: Any) -> None:
        if torch.compiler.is_compiling() or is_checking():
            check(*args)
            return
        key = _described(args)
        try:
            if key in passed:
                return
        except TypeError:  # sizes that are symbols
            check(*args)
            return
        check(*args)
        if len(passed) >= REMEMBERED:
            passed.clear()
        passed.add(key)

    return checked


def _described(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(
        [(x.shape, x.dtype, x.device) if isinstance(x, Tensor) else _described(x) if isinstance(x, tuple) else x for x in args]
    )
