"""Published figures beside ours as rows of plain values: the panels of their charts and the lines of their tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench.points import Point
from bench.published import Compared, Comparison, reproductions
from bench.report.frames import percent, signed
from bench.selection import published_selection


def figure_rows(points: Sequence[Point], rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One entry for each published figure that the points reproduce.

    Args:
        points: all points of the page.
        rows: their rows (`bench.report.frames.point_rows`).

    Returns:
        For each figure `recipe`, `panels` (a chart for each task), `values`, `orders`, `not_run`, `counts` and `hard_missed`.
    """
    by_id = {point.id: row for point, row in zip(points, rows, strict=True)}
    return [_figure(index, comparison, by_id) for index, comparison in enumerate(reproductions(points))]


def _figure(index: int, comparison: Comparison, by_id: dict[str, dict[str, Any]]) -> dict[str, Any]:
    values = [_value(item, by_id[item.point.id] if item.point else None) for item in comparison.values]
    verdicts = [item.verdict for item in (*comparison.values, *comparison.orders)]
    return {
        "recipe": comparison.figure.recipe,
        "panels": _panels(index, comparison, values),
        "values": sorted((v for v in values if v["verdict"] != "not run"), key=lambda v: v["verdict"] != "differs"),
        "not_run": [value["name"] for value in values if value["verdict"] == "not run"],
        "orders": [
            {"text": item.order.text, "target": item.order.target, "verdict": item.verdict, "reversed": list(item.reversed)}
            for item in comparison.orders
        ],
        "counts": {verdict: verdicts.count(verdict) for verdict in ("agree", "differs", "not run")},
        "hard_missed": len(comparison.missed),
    }


def _panels(index: int, comparison: Comparison, values: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A chart for each task of a figure on which we have a point; it is titled with what tells the tasks apart."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for item, value in zip(comparison.values, values, strict=True):
        title = ", ".join(f"{key} {text}" for key, text in item.target.task.options.items() if key != "protocol")
        groups.setdefault(title, []).append(value)
    panels = []
    for number, (title, group) in enumerate(groups.items()):
        tasks = [value["task"] for value in group if value["point"]]
        if tasks:
            axis = "state" if all(value["state_bytes"] for value in group) else "width"
            shown = [{**value, "x": value["state_bytes" if axis == "state" else "d_model"]} for value in group]
            panels.append({"id": f"r{index}-{number}", "title": title, "axis": axis, "task": tasks[0], "values": shown})
    return panels


def _value(item: Compared, row: dict[str, Any] | None) -> dict[str, Any]:
    """A published value beside the row of our point, None where it has not run."""
    target = item.target
    found: dict[str, Any] = {
        "name": target.point,
        "d_model": target.mixers[0][1],
        "state_bytes": target.state_bytes,
        "published": target.value,
        "published_text": percent(target.value),
        "tolerance": target.tolerance,
        "target": target.target,
        "source": target.source,
        "verdict": item.verdict,
        "point": None,
        "ours": None,
        "ours_text": "not run",
    }
    if item.point is None or row is None:
        return found
    selection = published_selection(item.point)
    ours = {
        "point": row["id"],
        "task": row["task"],
        "mixer": row["mixer"],
        "ours": row["accuracy"],
        "low": row["low"],
        "high": row["high"],
        "n": row["n"],
        "ours_text": row["accuracy_text"],
        "interval": row["interval"],
        "interval_text": row["interval_text"],
        "difference": item.difference,
        "difference_text": signed(item.difference),
        "selection": selection.accuracy.mean,
        "selection_text": percent(selection.accuracy.mean),
        "efficiency": row["state_efficiency"],
        "bias": selection.bias,
        "bias_text": signed(selection.bias),
    }
    return found | ours
