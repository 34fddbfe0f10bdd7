"""Launchers are loaded once in a process, however many kernels share one and whatever threads ask for it.

Triton up to 3.6 compiles a C module for each signature of a kernel, all of one name, and imports it for each kernel. The first
import of a file makes a module. A second one gives out the module that has the name by then, which may be another launcher's,
and writes the file's functions into it: a thread that is about to read its own launcher from there reads another's, and its
kernel fails ("function takes exactly 67 arguments (51 given)").
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import wraps
from typing import Any


def load_once() -> None:
    """Makes Triton's driver for NVIDIA GPUs compile and import a launcher's source once in this process."""
    from triton.backends.nvidia import driver

    if not hasattr(driver.compile_module_from_src, "__wrapped__"):
        driver.compile_module_from_src = once(driver.compile_module_from_src)


def once(build: Callable[..., Any]) -> Callable[..., Any]:
    """A function of a source that runs once for each, for all threads; different sources run side by side.

    Args:
        build: takes the source as `src`, or first.
    """
    locks: dict[str, threading.Lock] = {}
    built: dict[str, Any] = {}

    @wraps(build)
    def built_once(src: str, *args: Any, **options: Any) -> Any:
        with locks.setdefault(src, threading.Lock()):
            if src not in built:
                built[src] = build(src, *args, **options)
            return built[src]

    return built_once
