"""Where a report goes: refused before there is anything to lose."""

from __future__ import annotations

import os
from pathlib import Path

from bench.errors import UserError


def require_place(out: Path, option: str) -> None:
    """Refuses a path at which no file can be made.

    Args:
        out: the HTML file that is to be written.
        option: the one that named it.

    Raises:
        UserError: it is a folder, or no folder that it lies in can be written.
    """
    if out.is_dir():
        raise unwritable(out, "it is a folder", option)
    nearest = next((parent for parent in out.absolute().parents if parent.exists()), Path("/"))
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise unwritable(out, f"{nearest} is no folder that can be written", option)


def unwritable(out: Path, reason: str, option: str) -> UserError:
    """The error of a report that has no place."""
    return UserError(f"The report {out} cannot be written ({reason}); choose another path with {option}.")
