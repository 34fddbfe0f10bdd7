"""What the commands share: options that several take, values in commas, errors as one sentence, completion of names."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from bench.errors import UserError, unknown
from kernels.backends import BACKENDS, VARIABLE

what, shape, data, how, output = (
    partial(typer.Option, rich_help_panel=panel) for panel in ("What", "Shape", "Data", "How", "Output")
)
"""Options by the panel of the help that they stand in."""

DeviceOption = Annotated[str, how(help="auto, cpu, cuda or cuda:0.")]
DryRunOption = Annotated[bool, how("--dry-run", help="Print the plan and stop.")]
TrustOption = Annotated[bool, how("--trust-remote-code", help="Run code that the model folder brings along.")]
ReportOption = Annotated[Path | None, output(help="Where the HTML report goes.", show_default=False)]
NoReportOption = Annotated[bool, output("--no-report", help="Write no report.")]
StoreOption = Annotated[Path, output("--store", help="Folder of stored runs.")]
JsonOption = Annotated[bool, output("--json", help="JSON lines on stdout, text on stderr.")]
DebugOption = Annotated[bool, output("--debug", help="Show the traceback of an error.")]
DEFAULT_STORE = Path("results/runs")


def guard(debug: bool, command: Callable[[], int]) -> None:
    """Runs a command; bad input becomes one sentence and exit code 2."""
    try:
        _require_backend()
        code = command()
    except UserError as error:
        if debug:
            traceback.print_exc()
        typer.echo(f"bench: {error}", err=True)
        code = error.exit_code
    except KeyboardInterrupt:
        typer.echo("bench: interrupted", err=True)
        code = 130
    raise typer.Exit(code)


def _require_backend() -> None:
    """Refuses what the variable that forces a form of kernels has, before they are imported."""
    name = os.environ.get(VARIABLE)
    if name and name not in BACKENDS:
        raise unknown(f"value of {VARIABLE}", name, BACKENDS)


def names(values: list[str] | None) -> list[str]:
    """The names of an option that is repeated or holds several, separated by commas."""
    return [part.strip() for value in values or [] for part in value.split(",") if part.strip()]


def sizes(option: str, text: str | None) -> list[int]:
    """`512,2048` as numbers.

    Raises:
        UserError: one of them is not a positive whole number.
    """
    if text is None:
        return []
    parts = text.split(",")
    if not all(part.strip().isdigit() and int(part) > 0 for part in parts):
        raise UserError(f"{option} {text!r} must be positive whole numbers separated by commas, as in {option} 512,2048.")
    return [int(part) for part in parts]


def complete(kind: str) -> Callable[[str], list[str]]:
    """Completes the last of several comma-separated names of a kind."""

    def last_name(incomplete: str) -> list[str]:
        from bench import catalog

        done, comma, last = incomplete.rpartition(",")
        return [f"{done}{comma}{name}" for name in catalog.names(kind) if name.startswith(last)]

    return last_name
