"""`bench compare`: paired differences between two mixers or language models of one store, or between two stores."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import asdict
from pathlib import Path

from rich.table import Table

from bench.commands.compare_models import names_a_model, run_models
from bench.commands.console import Output
from bench.errors import UserError, unknown
from bench.points import Point, points
from bench.records import RunRecord
from bench.stats import paired_difference
from bench.store import Store

METRICS = ("accuracy", "loss")
Values = dict[str, dict[Hashable, float]]
"""Slice name to matched key to value."""


def run(a: str, b: str, fail: str | None, root: Path, output: Output) -> int:
    """Prints B minus A for every slice that both have.

    Returns:
        The exit code: 1 if `fail` names a metric whose mean difference is beyond the limit, else 0.

    Raises:
        UserError: an unknown mixer, nothing to pair, or a malformed limit.
    """
    metric, limit = parse_limit(fail)
    if names_a_model(a, Store(root)):
        return run_models(a, b, limit, Store(root), output)
    if Path(a).is_dir() and Path(b).is_dir():
        left, right = (_store_values(Path(path), metric, output) for path in (a, b))
    else:
        found = points(_load(root, output))
        left, right = (_mixer_values(found, name, metric) for name in (a, b))
    slices = [name for name in left if name in right]
    table = Table(title=f"{metric}: {b} minus {a}")
    for column in ("slice", "pairs", "mean difference", "95% interval", "p (sign flips)", "verdict"):
        table.add_column(column, justify="left" if column in ("slice", "verdict") else "right")
    worst = None
    for name in slices:
        difference = paired_difference(right[name], left[name])
        if difference.mean is None:
            continue
        interval = "-" if difference.low is None else f"{difference.low:+.4f} to {difference.high:+.4f}"
        chance = "-" if difference.p_value is None else f"{difference.p_value:.3f}"
        verdict = {"a is higher": f"{b} is higher", "b is higher": f"{a} is higher"}.get(difference.verdict, difference.verdict)
        table.add_row(name, str(difference.n), f"{difference.mean:+.4f}", interval, chance, verdict)
        output.emit("difference", {"metric": metric, "slice": name, **asdict(difference), "verdict": verdict})
        if name == "mean":
            worst = difference.mean
    if not table.row_count:
        raise UserError(f"{a!r} and {b!r} share no reported run: pairs need the same task, width and seed; train both first.")
    output.console.print(table)
    if limit is None or worst is None:
        return 0
    regressed = worst > limit if metric == "loss" else worst < limit
    output.say(f"Limit {metric}:{limit:+g}: {'regressed' if regressed else 'kept'} ({worst:+.4f}).")
    return 1 if regressed else 0


def parse_limit(text: str | None) -> tuple[str, float | None]:
    """`accuracy:-0.01` as metric and limit.

    Raises:
        UserError: an unknown metric or a limit that is not a number.
    """
    if text is None:
        return "accuracy", None
    metric, _, limit = text.partition(":")
    if metric not in METRICS:
        raise unknown("metric in --fail", metric, METRICS)
    try:
        number = float(limit)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):  # nothing is below such a limit, so it would never fail
        raise UserError(f"--fail {text!r} has no number after the colon; write it like accuracy:-0.01.")
    return metric, number


def _load(root: Path, output: Output) -> list[RunRecord]:
    records, warnings = Store(root).load()
    for warning in warnings:
        output.say(warning)
    if not records:
        raise UserError(f"The store {root} holds no runs; `bench synthetic --task mqar` makes some.")
    return records


def _store_values(root: Path, metric: str, output: Output) -> Values:
    """Every point of a store; a pair is the same point and seed in both stores."""
    values: Values = {}
    for point in points(_load(root, output)):
        _collect(values, point, metric, prefix=(point.id,))
    return values


def _mixer_values(found: list[Point], name: str, metric: str) -> Values:
    """The points of one mixer; a pair is the same task, width, depth and seed."""
    chosen = [point for point in found if name in (point.name, point.label)] or [p for p in found if p.mixer == name]
    if not chosen:
        raise unknown("mixer in the store", name, {point.label for point in found})
    values: Values = {}
    for point in chosen:
        model = point.spec.model
        key = (point.task, model.d_model, model.n_layers, model.frame)
        if any(known[:-1] == key for known in values.get("mean", {}) if isinstance(known, tuple)):
            labels = ", ".join(sorted({p.name for p in chosen}))
            raise UserError(f"{name!r} names several points of the same width ({labels}); give one of these labels in full.")
        _collect(values, point, metric, prefix=key)
    return values


def _collect(values: Values, point: Point, metric: str, *, prefix: tuple[Hashable, ...]) -> None:
    for record in point.reported:
        for item in record.metrics:
            if (item.split, item.name) == ("test", metric) and item.value is not None:
                values.setdefault(item.slice, {})[*prefix, record.spec.seed] = item.value
