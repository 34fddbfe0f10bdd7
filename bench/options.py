"""What the commands share: options that several take, errors as one sentence, completion of names."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from bench.errors import UserError

StoreOption = Annotated[Path, typer.Option("--store", help="Folder of stored runs.", rich_help_panel="Output")]
JsonOption = Annotated[bool, typer.Option("--json", help="JSON lines on stdout, text on stderr.", rich_help_panel="Output")]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.", rich_help_panel="Output")]
DEFAULT_STORE = Path("results/runs")


def guard(debug: bool, command: Callable[[], int]) -> None:
    """Runs a command; bad input becomes one sentence and exit code 2."""
    try:
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


def complete(kind: str) -> Callable[[str], list[str]]:
    """Completes the last of several comma-separated names of a kind."""

    def last_name(incomplete: str) -> list[str]:
        from bench import catalog

        done, comma, last = incomplete.rpartition(",")
        return [f"{done}{comma}{name}" for name in catalog.names(kind) if name.startswith(last)]

    return last_name
