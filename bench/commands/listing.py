"""`bench list`: what there is, read from file names and docstrings."""

from __future__ import annotations

from rich.table import Table

from bench import catalog
from bench.commands.console import Output
from bench.errors import unknown

KINDS = {"mixers": "mixer", "tasks": "task", "recipes": "recipe"}


def run(what: str, output: Output) -> int:
    """Lists one kind, or all.

    Raises:
        UserError: an unknown kind.
    """
    if what != "all" and what not in KINDS:
        raise unknown("kind", what, [*KINDS, "all"])
    for kinds, kind in KINDS.items():
        if what not in ("all", kinds):
            continue
        table = Table(title=kinds, show_header=False, title_justify="left")
        table.add_column("name")
        table.add_column("description", overflow="fold")
        for name, description in catalog.names(kind).items():
            output.emit(kind, {"name": name, "description": description})
            table.add_row(name, description)
        output.console.print(table)
    return 0
