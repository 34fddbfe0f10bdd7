"""User errors: one sentence that says what was given, what is allowed, the nearest match and the fix."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input; the command line prints its one sentence and exits with `exit_code`."""

    exit_code = 2


class Fault(UserError):
    """Something outside of the program that stops a command half-way, such as a full disk; what is stored is kept."""

    exit_code = 1


def unknown(kind: str, given: str, allowed: Iterable[str], *, fix: str = "") -> UserError:
    """The error for a name that is not one of `allowed`, with the nearest match."""
    names = sorted(allowed)
    near = difflib.get_close_matches(given, names, n=1, cutoff=0.4)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    listed = ", ".join(names) if names else "none"
    return UserError(f"Unknown {kind} {given!r}; allowed: {listed}.{hint}{' ' + fix if fix else ''}")
