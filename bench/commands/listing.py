"""`bench list`: what there is, read from file names and docstrings."""

from __future__ import annotations

from functools import partial

from rich.table import Table

from bench import catalog
from bench.commands.console import Output
from bench.errors import unknown
from bench.judge.suites import descriptions
from bench.throughput.names import KERNELS

KINDS = {"mixers": "mixer", "tasks": "task", "recipes": "recipe"}


def kernels() -> dict[str, str]:
    """Every kernel of `bench throughput` with what it computes."""
    return {name: kernel.summary for name, kernel in KERNELS.items()}


def run(what: str, output: Output) -> int:
    """Lists one kind, or all.

    Raises:
        UserError: an unknown kind.
    """
    tables = {kinds: (kind, partial(catalog.names, kind)) for kinds, kind in KINDS.items()}
    tables |= {
        "conversions": ("conversion", catalog.conversions),
        "kernels": ("kernel", kernels),
        "suites": ("suite", descriptions),
    }
    if what not in (*tables, "all"):
        raise unknown("kind", what, [*tables, "all"])
    for kinds, (kind, names) in tables.items():
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
