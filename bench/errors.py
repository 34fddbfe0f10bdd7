"""User errors: one sentence that says what was given, what is allowed, the nearest match and the fix."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails


class UserError(ValueError):
    """Bad input; the command line prints its one sentence and exits with `exit_code`."""

    exit_code = 2


class Fault(UserError):
    """Something outside of the program that stops a command half-way, such as a full disk; what is stored is kept."""

    exit_code = 1


def unknown(kind: str, given: str, allowed: Iterable[str], *, fix: str = "") -> UserError:
    """The error for a name that is not one of `allowed`, with the nearest match."""
    names = sorted(allowed)
    listed = ", ".join(names) if names else "none"
    return UserError(f"Unknown {kind} {given!r}; allowed: {listed}.{nearest(given, names)}{' ' + fix if fix else ''}")


def nearest(given: str, allowed: Iterable[str]) -> str:
    """The question whether the nearest of `allowed` was meant, with a space before it; empty where none is near."""
    near = difflib.get_close_matches(given, allowed, n=1, cutoff=0.4)
    return f" Did you mean {near[0]!r}?" if near else ""


def nearest_literal(error: ErrorDetails) -> str:
    """The same for what pydantic refused because it is none of a few literal values."""
    if error["type"] != "literal_error":
        return ""
    return nearest(str(error["input"]), re.findall("'([^']*)'", str(error.get("ctx", {}).get("expected"))))
