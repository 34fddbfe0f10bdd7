"""Kernels that a first call needs are compiled side by side, those of its backward pass and of other sizes among them.

A call launches one kernel after the other, and Triton compiles each when it is launched: with five of them a first call takes
the sum. `together` notices that a kernel is missing, runs the function once more without launching anything to learn what else
it needs, lets threads compile and load all of it, and then calls the function. Where other sizes take other kernels, the
function runs for these as well, so that later calls compile nothing.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

THREADS = 8
_thread = threading.local()


class Missing(Exception):
    """A kernel is not compiled."""


class Wanted:
    """Kernels that are being compiled instead of launched."""

    def __init__(self) -> None:
        self.found: dict[tuple[Any, tuple[Any, ...]], tuple[Any, tuple[Any, ...]]] = {}

    def add(self, entry: Any, key: tuple[Any, ...], compile: Callable[[], Any], constants: tuple[Any, ...]) -> None:
        """Has the kernel of a launch of `kernels._entry` compiled, once for each description."""
        if (entry, key) not in self.found:
            self.found[entry, key] = compile(), constants

    def load(self, pool: ThreadPoolExecutor) -> None:
        """Loads what has been compiled; an error is told by the launch that needs the kernel."""
        device = torch.cuda.current_device() if torch.cuda.is_initialized() else None

        def load(entry: Any, key: tuple[Any, ...], future: Any, constants: tuple[Any, ...]) -> None:
            if device is not None:
                torch.cuda.set_device(device)
            with suppress(Exception):
                compiled = future.result() if hasattr(future, "result") else future
                assert compiled.run is not None  # looked up, the launcher is built
                entry.launched[key] = compiled, constants

        list(pool.map(lambda one: load(*one[0], *one[1]), self.found.items()))


def state() -> Wanted | Literal["look"] | None:
    """What a launch of this thread is to do with a kernel that is not compiled: be compiled beside others, raise, or neither."""
    return getattr(_thread, "state", None)


@contextmanager
def _set(to: Wanted | Literal["look"]):
    _thread.state = to
    try:
        yield
    finally:
        _thread.state = None


SIZES = ((16, 64, 16), (1, 4096, 1))
"""Batch, length and heads of keys at which operators take other kernels than elsewhere: many short sequences, one long one."""


class Sizes(NamedTuple):
    """Other sizes than those of a call.

    Args:
        B: batch.
        T: length.
        G: heads of keys.
        H: heads of values, in the proportion of the call.
    """

    B: int
    T: int
    G: int
    H: int

    def of(self, x: Tensor | None, axes: str) -> Tensor | None:
        """An unwritten tensor like `x`, with the first axes of these sizes; "1" keeps one row."""
        if x is None:
            return None
        sizes = [1 if axis == "1" else getattr(self, axis) for axis in axes]
        return x.new_empty(*sizes, *x.shape[len(axes) :]).requires_grad_(x.requires_grad)


def other_sizes(groups: int, heads: int) -> list[Sizes]:
    """`SIZES` for a call with so many heads of keys and of values."""
    return [Sizes(batch, length, number, number * heads // groups) for batch, length, number in SIZES]


class Later(NamedTuple):
    """What else is compiled when a kernel of a call is missing.

    Args:
        others: from a call's arguments to those of calls of other sizes.
        then: gets arguments and results without values, and calls what will need kernels later, as a backward pass does.
    """

    others: Callable[..., Iterable[tuple[Any, ...]]]
    then: Callable[[tuple[Any, ...], Any], None] | None = None


def _every_size(args: tuple[Any, ...], later: Later) -> Iterable[tuple[Any, ...]]:
    """A call's arguments, then those of other sizes as far as there is memory for them."""
    yield args
    with suppress(torch.OutOfMemoryError):
        yield from later.others(*args)


def together(fn: Callable[..., Any], args: tuple[Any, ...], later: Later) -> Any:
    """fn(*args).

    Args:
        fn: allocates, launches kernels of `kernels._entry` and calls torch operators, and changes nothing else.
        args: its arguments.
        later: what else to compile if a kernel is missing.
    """
    if state() is not None or (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()):
        return fn(*args)
    try:
        with _set("look"):
            return fn(*args)
    except Missing:
        pass
    from triton import AsyncCompileMode

    wanted = Wanted()
    with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:
        with AsyncCompileMode(pool, ignore_errors=True), _set(wanted):
            for sized in _every_size(args, later):
                with suppress(Exception):  # what fails here fails again where it is needed
                    found = fn(*sized)
                    if later.then is not None:
                        later.then(sized, found)
        wanted.load(pool)
    return fn(*args)
