"""Launchers are built once, however many threads and processes want the same one.

Triton up to 3.6 compiles a C module for each signature of a kernel and imports it. Two that build the same one at once replace
each other's file in the cache. Python opens a module's file, remembers its inode, and then loads whatever has that path: if the
file was replaced in between, the inode it remembers is free, and the next launcher may get it. Python takes that one for the
module it knows, and a kernel is launched by another one's launcher ("function takes exactly 67 arguments (51 given)").
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import tempfile
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any


def build_once() -> None:
    """Makes Triton's driver for NVIDIA GPUs build one launcher of a source at a time; the next in line finds it in the cache."""
    from triton.backends.nvidia import driver

    if not hasattr(driver.compile_module_from_src, "__wrapped__"):
        driver.compile_module_from_src = one_at_a_time(driver.compile_module_from_src)


def one_at_a_time(build: Callable[..., Any], folder: Path | None = None) -> Callable[..., Any]:
    """A function of a source that no two threads or processes of this host run at once for the same source.

    Args:
        build: takes the source as `src`, or first.
        folder: where the locks are; None for one that all processes of a user share.
    """
    locks = folder or Path(tempfile.gettempdir()) / f"mixer-bench-{os.getuid()}"

    @wraps(build)
    def locked(src: str, *args: Any, **options: Any) -> Any:
        locks.mkdir(exist_ok=True)
        with (locks / f"launcher.{hashlib.sha256(src.encode()).hexdigest()[:16]}").open("wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            return build(src, *args, **options)

    return locked
