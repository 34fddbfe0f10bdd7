"""A checked mode for what only values show: a gate that grows, a write strength out of range, a NaN, a label that is no class.

To look at values is to wait for the device, so nothing looks unless `checked_values` is on. Tests, `bench check` and
`bench doctor` switch it on; `kernels._arguments.check_arguments`, which all doors call, is where it looks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor


class Range(NamedTuple):
    """What an argument's values must be.

    Args:
        low: least value, or None.
        high: largest value, or None.
        meaning: the same in words.
    """

    low: float | None
    high: float | None
    meaning: str


RANGES = {
    "log_decay": Range(None, 0.0, "a log decay is at most 0: a state never grows"),
    "beta": Range(0.0, 2.0, "a write strength lies between 0 and 2"),
    "dt": Range(0.0, None, "a time step is at least 0"),
    "rate": Range(0.0, None, "a decay rate is at least 0"),
}
"""By argument name; every floating-point argument has to be finite besides."""

_checking = False


@contextmanager
def checked_values(on: bool = True) -> Iterator[None]:
    """Inside the block, the functions of this package raise ValueError for values that they cannot take.

    Values that do not exist are not looked at: of tensors on the meta device, of those that torch.compile traces, and of those
    that a CUDA graph records.

    Args:
        on: False switches the mode off inside a block that has it.
    """
    global _checking  # noqa: PLW0603 - one switch for the process, like torch's own backend switches
    before, _checking = _checking, on
    try:
        yield
    finally:
        _checking = before


def is_checking() -> bool:
    """Whether values are looked at."""
    return _checking and not torch.compiler.is_compiling()


def check_values(name: str, x: Tensor, *, bounded: bool = True) -> None:
    """Raises ValueError if `x` is not finite or out of its range.

    Args:
        name: of the argument, a key of `RANGES` if it has a range.
        x: its values; under vmap those of all members.
        bounded: False leaves the range out, for what is squashed into it later.
    """
    found = _concrete(x)
    if found is None or not found.is_floating_point():
        return
    finite = found.isfinite()
    if not bool(finite.all()):
        raise ValueError(
            f"{name} has {int((~finite).sum())} values of {found.numel()} that are not finite, {_first(found, ~finite)}"
        )
    limits = RANGES.get(name) if bounded else None
    if limits is None:
        return
    outside = torch.zeros_like(finite)
    outside |= found < limits.low if limits.low is not None else outside
    outside |= found > limits.high if limits.high is not None else outside
    if bool(outside.any()):
        raise ValueError(
            f"{name} has {int(outside.sum())} values of {found.numel()} out of range, {_first(found, outside)}; {limits.meaning}"
        )


def check_labels(name: str, labels: Tensor, classes: int, ignored: int) -> None:
    """Raises ValueError if a label is neither a class nor the one that is ignored."""
    found = _concrete(labels)
    if found is None:
        return
    outside = ((found < 0) | (found >= classes)) & (found != ignored)
    if bool(outside.any()):
        raise ValueError(
            f"{name} has {int(outside.sum())} that are no class, {_first(found, outside)}; they are 0 to {classes - 1} or {ignored}"
        )


def check_seen(name: str, seen: Tensor) -> None:
    """Raises ValueError if a row sees nothing, of which no softmax is defined."""
    found = _concrete(seen)
    if found is not None and not bool(found.any(-1).all()):
        raise ValueError(f"{name} has {int((~found.any(-1)).sum())} rows that see nothing; every row must see a key")


def _concrete(x: Tensor) -> Tensor | None:
    """The tensor under the wrappers of torch.func, or None if it has no values."""
    while torch._C._functorch.is_functorch_wrapped_tensor(x):
        x = torch._C._functorch.get_unwrapped(x)
    fake = type(x) not in (Tensor, torch.nn.Parameter) or x.is_meta
    recording = x.is_cuda and torch.cuda.is_current_stream_capturing()
    return None if fake or recording else x.detach()


def _first(x: Tensor, where: Tensor) -> str:
    """The first offending value and its place."""
    place = where.nonzero()[0].tolist()
    return f"the first {x[tuple(place)].item():g} at {place}"
