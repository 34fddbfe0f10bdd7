"""Kernels that a first call needs are compiled side by side, those of its backward pass among them.

A call launches one kernel after the other, and Triton compiles each when it is launched: with five of them a first call takes
the sum. `together` notices that a kernel is missing, runs the function once more without launching anything to learn what else
it needs, lets threads compile and load all of it, and then calls the function.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any, Literal

import torch

THREADS = 8
_thread = threading.local()


class Missing(Exception):
    """A kernel is not compiled."""


class Wanted:
    """Kernels that are being compiled instead of launched."""

    def __init__(self) -> None:
        self.found: list[tuple[Any, tuple[Any, ...], Any, tuple[Any, ...]]] = []

    def add(self, entry: Any, key: tuple[Any, ...], future: Any, constants: tuple[Any, ...]) -> None:
        """Takes a launch of `kernels._entry` that waits for its kernel."""
        self.found.append((entry, key, future, constants))

    def load(self, pool: ThreadPoolExecutor) -> None:
        """Loads what has been compiled; an error is told by the launch that needs the kernel."""
        device = torch.cuda.current_device() if torch.cuda.is_available() else None

        def load(entry: Any, key: tuple[Any, ...], future: Any, constants: tuple[Any, ...]) -> None:
            if device is not None:
                torch.cuda.set_device(device)
            with suppress(Exception):
                compiled = future.result() if hasattr(future, "result") else future
                assert compiled.run is not None  # looked up, the launcher is built
                entry.launched[key] = compiled, constants

        list(pool.map(lambda one: load(*one), self.found))


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


def together(fn: Callable[..., Any], args: tuple[Any, ...], then: Callable[[Any], None] | None) -> Any:
    """fn(*args).

    Args:
        fn: allocates, launches kernels of `kernels._entry` and calls torch operators, and changes nothing else.
        args: its arguments.
        then: gets results without values, and calls what will need kernels later.
    """
    if state() is not None:
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
            found = fn(*args)
            if then is not None:
                with suppress(Exception):  # what fails here fails again where it is needed
                    then(found)
        wanted.load(pool)
    return fn(*args)
