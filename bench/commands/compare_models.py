"""`bench compare` for language models: paired differences over the items that two of them answered."""

from __future__ import annotations

from dataclasses import asdict

from rich.table import Table

from bench.commands.console import Output
from bench.errors import UserError, unknown
from bench.judged import Comparison, JudgedRow, comparisons, difference
from bench.store import Store

SHARES = ("acc", "acc_norm", "exact_match", "contains", "em", "f1", "top1")
"""Metrics that are shares of right answers; --fail accuracy looks at their mean."""


def names_a_model(name: str, store: Store) -> bool:
    """Whether a store holds evaluations of a model of this name."""
    return any(record.model.name == name for record in store.load_evals()[0])


def run_models(a: str, b: str, limit: float | None, store: Store, output: Output) -> int:
    """Prints B minus A for every task that both have.

    Args:
        a: name of a model as the tables show it.
        b: another.
        limit: smallest allowed mean difference of accuracies, or None.
        store: the evaluations.
        output: where the table goes.

    Returns:
        The exit code: 1 if the mean difference over tasks is below the limit, else 0.

    Raises:
        UserError: unknown names, or nothing in common.
    """
    found, left, right = _pair(a, b, comparisons(store.load_evals()[0], store))
    table = Table(title=f"{b} minus {a}")
    for column in ("task", "metric", "items", "mean difference", "95% interval", "p", "verdict"):
        table.add_column(column, justify="left" if column in ("task", "metric", "verdict") else "right")
    means: list[float] = []
    for column in (*found.columns, *found.recall):
        cell = right.cell(column)
        made = difference(store, right, left, column)
        if made.mean is None or cell is None or left.cell(column) is None:
            continue
        interval = "-" if made.low is None else f"{made.low:+.4f} to {made.high:+.4f}"
        verdict = {"a is higher": f"{b} is higher", "b is higher": f"{a} is higher"}.get(made.verdict, made.verdict)
        p = "-" if made.p_value is None else f"{made.p_value:.3g}"
        table.add_row(column.name, cell.metric, str(made.n), f"{made.mean:+.4f}", interval, p, verdict)
        output.emit("difference", {"task": column.name, "metric": cell.metric, **asdict(made), "verdict": verdict})
        if column in found.columns and cell.metric in SHARES:
            means.append(made.mean)
    if not table.row_count:
        raise UserError(f"{a} and {b} were asked no common items; evaluate both with the same tasks, --limit and --lengths.")
    output.console.print(table)
    if limit is None or not means:
        return 0
    mean = sum(means) / len(means)
    output.say(f"Limit accuracy:{limit:+g} on the mean over tasks: {'regressed' if mean < limit else 'kept'} ({mean:+.4f}).")
    return 1 if mean < limit else 0


def _pair(a: str, b: str, found: list[Comparison]) -> tuple[Comparison, JudgedRow, JudgedRow]:
    """The comparison that holds both models.

    Raises:
        UserError: there is none.
    """
    known = {row.name for comparison in found for row in comparison.rows}
    for name in (a, b):
        if name not in known:
            raise unknown("model in the store", name, known)
    for comparison in found:
        rows = {row.name: row for row in comparison.rows}
        if a in rows and b in rows:
            return comparison, rows[a], rows[b]
    raise UserError(f"{a} and {b} share no teacher, so their items may differ; evaluate one with --teacher to relate them.")
