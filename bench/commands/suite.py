"""`bench synthetic --suite`: the sweep of a family of tasks, and its table of scores."""

from __future__ import annotations

from typing import get_args

from rich.table import Table

from bench import catalog
from bench.commands.console import Output
from bench.errors import UserError, unknown
from bench.families import OVERALL, FamilyTable, family_table
from bench.points import Point
from bench.sweep import Sweep


def suite_sweep(suite: str | None, preset: str | None, *, others: tuple[str | None, ...]) -> Sweep:
    """The sweep of a suite.

    Args:
        suite: its name; None where only a preset was given.
        preset: its size; None takes the smallest.
        others: other choices of what to run, which must be None.

    Raises:
        UserError: unknown names, or a combination that makes no sense.
    """
    if suite is None:
        raise UserError(f"--preset {preset} is the size of a suite; add --suite, or leave out --preset.")
    if any(other is not None for other in others):
        raise UserError(f"--suite {suite} chooses the tasks and their recipe; leave out --task and --recipe, or --suite.")
    recipe = catalog.load("recipe", "suite")
    given = {"suite": suite, "preset": preset or "quick"}
    for name, parameter in catalog.options_of(recipe).items():
        if given[name] not in get_args(parameter.annotation):
            raise unknown(name, given[name], get_args(parameter.annotation))
    return recipe(**given)


def print_families(points: list[Point], output: Output) -> None:
    """Scores of every mixer on every task, and their means by family."""
    found = family_table(points)
    table = Table(title="Score by task: test accuracy from chance (0) to the exact solver (100), mean over difficulty cells")
    table.add_column("task", no_wrap=True)
    for name in found.names:
        table.add_column(name, justify="right")
    titles = {point.task: point.spec.task.name for point in points}
    for family, tasks in found.tasks.items():
        for task in tasks:
            table.add_row(titles[task], *(_percent(found.scores.get((name, task))) for name in found.names))
        _mean_row(table, found, family)
    if len(found.tasks) > 1:
        _mean_row(table, found, OVERALL)
    output.console.print(table)
    for (name, family), value in found.means.items():
        output.emit("family", {"name": name, "family": family, "score": value})


def _mean_row(table: Table, found: FamilyTable, family: str) -> None:
    values = (_percent(found.means[name, family]) for name in found.names)
    table.add_row(f"mean of {family}", *values, style="bold", end_section=True)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"
