"""Points as rows of plain values: what the charts, the tables and the CSV of the page are made of."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from bench.families import mean_ceilings, task_score
from bench.points import Point
from bench.records import RunRecord
from bench.report.charts import AXES
from bench.report.families import ceiling_columns, shortcut_lines
from bench.selection import published_selection
from bench.speed_records import SpeedRecord
from bench.stats import pareto_front
from bench.store import Store

MAX_CURVE_POINTS = 200
MAX_CURVE_SEEDS = 5


def task_rows(points: Sequence[Point]) -> list[dict[str, Any]]:
    """One row a task: titles, cells and the lines that the Pareto plot draws."""
    groups: dict[str, list[Point]] = {}
    for point in points:
        groups.setdefault(point.task, []).append(point)
    names = [group[0].spec.task.name for group in groups.values()]
    rows = []
    for index, (key, group) in enumerate(groups.items()):
        cells = group[0].cells
        hardest = max(cells, key=lambda cell: cell.bits_needed)
        name = group[0].spec.task.name
        ceilings = mean_ceilings(cells)
        rows.append(
            {
                "id": f"t{index}",
                "key": key,
                "title": name if names.count(name) == 1 else key,
                "cells": [
                    {"name": c.name, "axes": c.axes, "bits": c.bits_needed, "ceilings": c.ceilings, "trained": c.trained}
                    for c in cells
                ],
                "beyond": [c.name for c in cells if not c.trained],
                "bits": hardest.bits_needed,
                "bits_cell": hardest.name,
                "ceilings": ceilings,
                "lines": shortcut_lines(ceilings),
                "metrics": list(dict.fromkeys(name for point in group for name in point.metrics)),
                "points": len(group),
                "runs": sum(len(point.records) for point in group),
            }
        )
    return rows


def point_rows(points: Sequence[Point], tasks: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a point, with the flags that say on which fronts of its task it lies."""
    by_key = {task["key"]: task for task in tasks}
    rows = [_point_row(index, point, by_key[point.task]) for index, point in enumerate(points)]
    for axis, (field, _) in AXES.items():
        for task in tasks:
            group = [row for row in rows if row["task"] == task["id"] and row["accuracy"] is not None and row[field] > 0]
            flags = pareto_front([row[field] for row in group], [row["accuracy"] for row in group])
            for row, flag in zip(group, flags, strict=True):
                row[f"front_{axis}"] = flag
    return rows


def _point_row(index: int, point: Point, task: dict[str, Any]) -> dict[str, Any]:
    accuracy, state, selection = point.accuracy, point.state, published_selection(point)
    newest = point.reported[-1] if point.reported else point.records[-1]
    return {
        "id": f"p{index}",
        "task": task["id"],
        "task_title": task["title"],
        "mixer": point.mixer,
        "label": point.label,
        "name": point.name,
        "d_model": point.spec.model.d_model,
        "layers": point.spec.model.n_layers,
        "parameters": point.parameters,
        "state_bytes": state.true_bytes,
        "published_bytes": state.published_bytes,
        "read_bytes": state.read_bytes,
        "bits_needed": round(point.bits_needed, 1),
        "state_efficiency": _rounded(point.bits_needed / (8 * state.true_bytes), 9) if state.true_bytes else None,
        "accuracy": accuracy.mean,
        "low": accuracy.low,
        "high": accuracy.high,
        "interval": accuracy.kind,
        "n": accuracy.n,
        **ceiling_columns(task["ceilings"]),
        "lr": point.lr,
        "lr_source": point.lr_source,
        "published_selection": _rounded(selection.accuracy.mean, 5),
        "best_of_k": selection.rates,
        "best_of_k_bias": _rounded(selection.bias, 5),
        "train_seconds": _rounded(point.train_seconds, 2),
        "examples_per_second": _rounded(point.examples_per_second, 1),
        **{f"front_{axis}": False for axis in AXES},
        "runs": len(point.records),
        "not_done": len(point.failures),
        "hardware": hardware(newest),
        "device": newest.device,
        "commit": (newest.provenance.commit or "unknown")[:10] + (" + changes" if newest.provenance.dirty else ""),
        "slices": {name: round(value, 5) for name, value in point.slices.items()},
        "metrics": {name: round(value, 5) for name, value in point.metrics.items()},
        "score": _rounded(task_score(point), 5),
        "score_trained": _rounded(task_score(point, trained=True), 5),
        "score_beyond": _rounded(task_score(point, trained=False), 5),
        "seeds": {str(seed): value for seed, value in sorted(point.seeds.items())},
        "warnings": point.warnings,
        "point_id": point.id,
        **_texts(point),
    }


def _texts(point: Point) -> dict[str, str]:
    """The values of the tooltip and the table as a reader wants them."""
    accuracy = point.accuracy
    return {
        "accuracy_text": percent(accuracy.mean),
        "interval_text": (f"{percent(accuracy.low)} to {percent(accuracy.high)}, " if accuracy.low is not None else "")
        + accuracy.kind,
        "state_text": f"{human_bytes(point.state.true_bytes)} ({point.state.true_bytes:,} B, {point.state.dtype})",
        "published_text": f"{human_bytes(point.state.published_bytes)} ({point.state.published_bytes:,} B)",
        "read_text": f"{human_bytes(point.state.read_bytes)} ({point.state.read_bytes:,} B)",
        "parameters_text": f"{point.parameters:,}",
        "lr_text": "none" if point.lr is None else f"{point.lr:g}",
        "speed_text": "unknown" if point.examples_per_second is None else f"{point.examples_per_second:,.0f}",
    }


def csv_text(rows: Sequence[dict[str, Any]]) -> str:
    """All points as CSV: the display texts left out, slices, further metrics and seeds as columns of their own."""
    import pandas as pd

    texts = ("_text", "task_title")
    flat = []
    for row in rows:
        plain = {key: value for key, value in row.items() if not key.endswith(texts) and not isinstance(value, dict | list)}
        plain["task"] = row["task_title"]
        plain |= {f"accuracy:{name}": value for name, value in row["slices"].items()}
        plain |= row["metrics"]
        plain |= {f"seed:{seed}": value for seed, value in row["seeds"].items()}
        flat.append(plain | {"warnings": "; ".join(row["warnings"])})
    return pd.DataFrame(flat).drop(columns="id").to_csv(index=False)


def slice_names(points: Sequence[Point]) -> list[str]:
    """The slices of a task's points: its cells in their order, easiest first, then groups within cells."""
    cells = [cell.name for point in points[:1] for cell in point.cells]
    groups = {name for point in points for name in point.slices} - set(cells)
    return [cell for cell in cells if any(cell in point.slices for point in points)] + sorted(groups)


def curve_rows(points: Sequence[Point], rows: Sequence[dict[str, Any]], store: Store) -> tuple[list[dict[str, Any]], list[str]]:
    """Learning curves, mean and range over the reported seeds, thinned; and a warning for each unreadable file.

    Returns:
        For each point that has curves: its row's id and name, columns step, examples, mean, low, high, and milestones.
    """
    found: list[dict[str, Any]] = []
    warnings: list[str] = []
    sizes: dict[tuple[str, str], list[tuple[int, dict[str, Any]]]] = defaultdict(list)
    for point, row in zip(points, rows, strict=True):
        curves = []
        for record in point.reported[:MAX_CURVE_SEEDS]:
            try:
                curve = _read_curve(store, record)
            except (OSError, ValueError, KeyError) as error:
                path = store.path(record.run_id) / "curve.parquet"
                warnings.append(f"Skipped {path}: not a readable learning curve ({type(error).__name__}).")
                continue
            if curve is not None:
                curves.append(curve)
        if curves:
            found.append({"point": row["id"], "n": len(curves), **_mean_curve(curves)})
            sizes[row["task"], point.mixer].append((point.state.true_bytes, found[-1]))
    for same in sizes.values():
        for rank, (_, curve) in enumerate(sorted(same, key=lambda one: one[0])):
            curve["variant"] = rank % 4
    return found, warnings


def _read_curve(store: Store, record: RunRecord) -> tuple[Any, Any, Any] | None:
    """Step, examples and validation accuracy of a run as arrays, rows without a value left out.

    Read by pyarrow directly: over hundreds of small files the detour through pandas costs more than the reading.
    """
    import numpy as np
    from pyarrow import parquet

    path = store.path(record.run_id) / "curve.parquet"
    if not path.exists():
        return None
    table = parquet.ParquetFile(path).read(columns=["step", "examples", "valid_accuracy"], use_threads=False)
    columns = [np.asarray(table[name].to_numpy(), dtype=float) for name in ("step", "examples", "valid_accuracy")]
    keep = np.isfinite(np.stack(columns)).all(axis=0) & (columns[0] > 0)
    step, examples, accuracy = (column[keep] for column in columns)
    return (step, examples, accuracy) if len(step) else None


def _mean_curve(curves: Sequence[tuple[Any, Any, Any]]) -> dict[str, Any]:
    """Mean and range of several runs' curves on common steps; a run that stopped early keeps its last value."""
    import numpy as np

    grid = np.unique(np.concatenate([step for step, _, _ in curves]))
    if len(grid) > MAX_CURVE_POINTS:
        picks = np.geomspace(1, len(grid), MAX_CURVE_POINTS).round().astype(int) - 1
        grid = grid[np.unique(picks)]
    longest = max(curves, key=lambda curve: curve[0][-1])
    values = np.stack([np.interp(grid, step, accuracy) for step, _, accuracy in curves])
    mean = values.mean(axis=0)
    reached = {f"{int(100 * goal)}": _first(grid, mean >= goal) for goal in (0.5, 0.9, 0.99)}
    return {
        "step": [int(step) for step in grid],
        "examples": [int(count) for count in np.interp(grid, longest[0], longest[1])],
        "mean": [round(float(v), 4) for v in mean],
        "low": [round(float(v), 4) for v in values.min(axis=0)],
        "high": [round(float(v), 4) for v in values.max(axis=0)],
        "reached": reached,
        "best": round(float(mean.max()), 4),
    }


def _first(grid: Any, reached: Any) -> int | None:
    """The first step at which a condition holds, or None."""
    return int(grid[reached.argmax()]) if reached.any() else None


def hardware(record: RunRecord | SpeedRecord) -> str:
    """The processor that a record comes from."""
    found = record.provenance.hardware
    return found.get("gpu") or found.get("cpu") or record.device


def metric_text(value: float) -> str:
    """A metric that need not be a share, with three significant digits."""
    return f"{value:.3g}"


def percent(value: float | None) -> str:
    """A share in per cent with one decimal."""
    return "none" if value is None else f"{100 * value:.1f} %"


def signed(value: float | None) -> str:
    """A difference of shares in percentage points, with its sign."""
    return "–" if value is None else f"{round(100 * value, 1) + 0.0:+.1f}"


def human_bytes(count: float) -> str:
    """A byte count with a binary unit and three significant digits, or all digits before the point."""
    units = ["B", "KiB", "MiB", "GiB"]
    while count >= 1024 and len(units) > 1:
        count /= 1024
        del units[0]
    return f"{count:.0f} {units[0]}" if count >= 100 else f"{count:.3g} {units[0]}"


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)
