"""Launchers stay those of their kernels, however many kernels share one and whatever threads ask for them.

Triton up to 3.6 compiles a C module for each signature of a kernel, all of one name, and imports it for each kernel. The first
import of a file makes a module. A second one gives out the module that has the name by then, which may be another launcher's,
and writes the file's functions into it: who reads its own launcher from there later reads another's, and its kernel fails
("function takes exactly 67 arguments (51 given)"). So what an import gave is copied before anything else is imported.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import wraps
from types import ModuleType
from typing import Any


def keep_apart() -> None:
    """Has Triton import its compiled modules by `apart`."""
    from triton.runtime import build

    if not hasattr(build._load_module_from_path, "__wrapped__"):
        build._load_module_from_path = apart(build._load_module_from_path)


def apart(load: Callable[[str, str], ModuleType]) -> Callable[[str, str], ModuleType]:
    """A function that imports a compiled module, and copies it before another thread can import one.

    Args:
        load: imports the file of a module, given its name and path.
    """
    lock = threading.Lock()

    @wraps(load)
    def loaded(name: str, path: str) -> ModuleType:
        copy = ModuleType(name)
        with lock:
            found: dict[str, Any] = vars(load(name, path))
            vars(copy).update(found)
        return copy

    return loaded
