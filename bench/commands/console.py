"""Where output goes: people read stderr when `--json` is on, stdout otherwise; programs read JSON lines on stdout."""

from __future__ import annotations

import contextlib
import json
import sys
from typing import Any

from rich.console import Console

PLAIN_WIDTH = 120
"""Columns where there is no terminal to ask."""


class Output:
    """The two audiences of a command.

    Args:
        as_json: write JSON lines on stdout and everything for people on stderr.
    """

    def __init__(self, *, as_json: bool = False) -> None:
        self.as_json = as_json
        stream = sys.stderr if as_json else sys.stdout
        self.console = Console(stderr=as_json, highlight=False, width=None if stream.isatty() else PLAIN_WIDTH)

    def say(self, text: str = "") -> None:
        """One line for people."""
        self.console.print(text, markup=False, soft_wrap=True)

    def ours_alone(self) -> contextlib.AbstractContextManager[Any]:
        """Keeps what libraries print away from the programs that read stdout."""
        return contextlib.redirect_stdout(sys.stderr) if self.as_json else contextlib.nullcontext()

    def emit(self, kind: str, content: dict[str, Any]) -> None:
        """One JSON line for programs, if they listen."""
        if self.as_json:
            print(json.dumps({"kind": kind, **content}, allow_nan=False), flush=True)


def bytes_text(n: float) -> str:
    """Bytes as people write them: 512 B, 12.5 KiB, 3.1 MiB."""
    for unit in ("B", "KiB", "MiB"):
        if n < 1024:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024
    return f"{n:.1f} GiB"


def seconds_text(seconds: float) -> str:
    """Seconds as people write them: 8.2 s, 3 min 05 s, 2 h 10 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
