"""`bench list`: what there is, read from file names and docstrings."""

from __future__ import annotations

from functools import partial

from rich.table import Table

from bench import catalog
from bench.commands.console import Output
from bench.errors import unknown
from bench.judge.suites import descriptions

KINDS = {"mixers": "mixer", "tasks": "task", "recipes": "recipe"}


def run(what: str, output: Output) -> int:
    """Lists one kind, or all.

    Raises:
        UserError: an unknown kind.
    """
    if what not in (*KINDS, "conversions", "suites", "all"):
        raise unknown("kind", what, [*KINDS, "conversions", "suites", "all"])
    tables = {kinds: (kind, partial(catalog.names, kind)) for kinds, kind in KINDS.items()}
    others = {"conversions": ("conversion", catalog.conversions), "suites": ("suite", descriptions)}
    for kinds, (kind, names) in (tables | others).items():
        if what not in ("all", kinds):
            continue
        table = Table(title=kinds, show_header=False, title_justify="left")
        table.add_column("name")
        table.add_column("description", overflow="fold")
        for name, description in names().items():
            output.emit(kind, {"name": name, "description": description})
            table.add_row(name, description)
        output.console.print(table)
    return 0
