"""`bench synthetic --recipe R --check`: published values beside ours, agree, differs or not run."""

from __future__ import annotations

from rich.table import Table

from bench.commands.console import Output
from bench.commands.request import Request, named_sweep
from bench.errors import UserError
from bench.outcome import identity_of
from bench.points import Point
from bench.published import Compared, Comparison, Figure, compare, load, sweep_points
from bench.records import RunRecord
from bench.selection import published_selection
from bench.store import Store
from bench.sweep import Sweep

STYLES = {"agree": "green", "differs": "bold red", "not run": "dim"}


def published_figure(request: Request, sweep: Sweep) -> Figure:
    """The figure that a request wants its sweep to be checked against.

    Raises:
        UserError: the request names no recipe, or one without published values, or its sweep cannot be compared with them.
    """
    if request.recipe is None:
        raise UserError("--check compares a recipe with published values; name one with --recipe (see results/published).")
    figure = load(request.recipe)
    compare(figure, sweep, [])  # says now what would make the comparison ambiguous
    if not any(target.fits(experiment) for target in figure.targets for experiment in sweep.experiments):
        raise UserError(
            f"--check has nothing to compare: no model of this sweep is one of the published ones; see {figure.recipe}.csv in "
            "results/published, or leave out --mixer and --set."
        )
    return figure


def check(figure: Figure, sweep: Sweep, request: Request, output: Output) -> bool:
    """Compares what the store holds of a sweep with the published figure, and prints it.

    Returns:
        Whether no hard target is missed.
    """
    records, warnings = Store(request.store).load()
    shown = sweep_points(sweep, records)
    comparison = compare(figure, sweep, shown)
    _print_values(comparison, output)
    _print_orders(comparison, output)
    published = {experiment.point_id() for experiment in named_sweep(request).experiments}
    if not all(experiment.point_id() in published for experiment in sweep.experiments):
        changed = ", ".join([*request.mixers, *request.settings])
        output.say(f"Not the recipe's own settings ({changed}): this compares, and does not reproduce.")
    older = _of_older_code(shown, records)
    for text in (*warnings, *older, *(f"{point.name}: {text}." for point in shown for text in point.warnings)):
        output.say(f"Warning: {text}")
    _print_summary(comparison, output)
    return not comparison.missed


def _of_older_code(shown: list[Point], records: list[RunRecord]) -> list[str]:
    """Points whose every run was made by a mixer or task that reads otherwise now."""
    by_point: dict[str, list[RunRecord]] = {point.id: [] for point in shown}
    for record in records:
        by_point.get(record.spec.point_id(), []).append(record)
    return [
        f"{point.name}: all of its runs are of older mixer or task code; without --dry-run this command trains them again."
        for point in shown
        if not any(identity_of(record.spec) == record.run_id for record in by_point[point.id])
    ]


def _print_values(comparison: Comparison, output: Output) -> None:
    table = Table(title=f"Published values of {comparison.figure.recipe} beside ours")
    for column in ("point", "published", "ours", "low to high", "seeds", "published selection", "+-", "target", "verdict"):
        table.add_column(column, justify="left" if column in ("point", "target", "verdict") else "right", no_wrap=column != "point")
    for item in comparison.values:
        output.emit("published", _value_content(item))
        if item.point is None:
            ours = ("-", "-", "-", "-")
        else:
            mean, best = item.point.accuracy, published_selection(item.point).accuracy.mean
            ends = "-" if mean.low is None or mean.high is None else f"{mean.low:.3f} to {mean.high:.3f}"
            ours = (f"{mean.mean:.3f}", ends, str(mean.n), "-" if best is None else f"{best:.3f}")
        target = item.target
        verdict = f"[{STYLES[item.verdict]}]{item.verdict}[/]"
        table.add_row(target.point, f"{target.value:.3f}", *ours, f"{target.tolerance:g}", target.target, verdict)
    output.console.print(table)


def _value_content(item: Compared) -> dict[str, object]:
    """A compared value for programs."""
    mean = None if item.point is None else item.point.accuracy
    selection = None if item.point is None else published_selection(item.point)
    return {
        "point": item.target.point,
        "published": item.target.value,
        "tolerance": item.target.tolerance,
        "target": item.target.target,
        "source": item.target.source,
        "verdict": item.verdict,
        "label": None if item.point is None else item.point.label,
        "accuracy": None if mean is None else mean.mean,
        "low": None if mean is None else mean.low,
        "high": None if mean is None else mean.high,
        "seeds": 0 if mean is None else mean.n,
        "published_selection": None if selection is None else selection.accuracy.mean,
        "best_of_k_bias": None if selection is None else selection.bias,
    }


def _print_orders(comparison: Comparison, output: Output) -> None:
    for item in comparison.orders:
        content = {"order": item.order.text, "target": item.order.target, "verdict": item.verdict, "reversed": list(item.reversed)}
        output.emit("order", content)
        why = f": {'; '.join(item.reversed)}" if item.reversed else ""
        output.say(f"Order ({item.order.target}) {item.verdict}{why} | {item.order.text}")


def _print_summary(comparison: Comparison, output: Output) -> None:
    verdicts = [item.verdict for item in (*comparison.values, *comparison.orders)]
    counts = ", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in STYLES)
    output.say(
        "Agree: the mean is within +- of the published value, or that value inside the 95 % interval of three or more seeds. "
        "Published selection: best of all learning rates on the test set."
    )
    missed = comparison.missed
    run = "no hard target is missed among those that have run."
    output.say(f"{counts}; " + (f"hard targets missed: {'; '.join(missed)}." if missed else run))
    output.emit("check", {"recipe": comparison.figure.recipe, "missed": missed})
