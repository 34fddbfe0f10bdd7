"""Public Triton kernels tune themselves at the first shape they see, and some take another width for the same shape."""

from __future__ import annotations

from functools import cache
from typing import Any

WIDTHS = ("K", "V", "hdim", "dstate")
"""What public kernels call the widths of their heads and states."""


@cache
def tune_by_width() -> None:
    """Makes widths part of what every Triton autotuner remembers that is made from now on."""
    from triton.runtime.autotuner import Autotuner

    make = Autotuner.__init__

    def changed(self: Any, *args: Any, **named: Any) -> None:
        make(self, *args, **named)
        self.keys = [*self.keys, *(name for name in WIDTHS if name not in self.keys)]

    Autotuner.__init__ = changed  # type: ignore[method-assign]
