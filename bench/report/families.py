"""The mixer-by-task map of the page: scores of every mixer on every task, families side by side with their means."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench.families import OVERALL, FamilyTable, family_table
from bench.points import Point


def family_map(points: Sequence[Point], tasks: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Columns (tasks, then the mean, family by family) and rows (mixers) with their scores; None for a single task.

    Args:
        points: all points of the page.
        tasks: rows of `bench.report.frames.task_rows`.

    Returns:
        `columns` with label, family, task id (None for means) and `rows` with name, mixer and one score a column.
    """
    if len(tasks) < 2:
        return None
    found = family_table(points)
    ids = {task["key"]: task for task in tasks}
    mixers = {point.name: point.mixer for point in points}
    columns: list[dict[str, Any]] = []
    for family, names in found.tasks.items():
        columns += [{"label": ids[name]["title"], "family": family, "task": ids[name]["id"], "key": name} for name in names]
        columns.append({"label": f"mean of {family}", "family": family, "task": None, "key": family})
    if len(found.tasks) > 1:
        columns.append({"label": f"mean of {OVERALL}", "family": OVERALL, "task": None, "key": OVERALL})
    rows = [
        {"name": name, "mixer": mixers[name], "scores": [_score(found, name, column) for column in columns]} for name in found.names
    ]
    return {"columns": [{**column, "place": place} for place, column in enumerate(columns)], "rows": rows}


def _score(found: FamilyTable, name: str, column: dict[str, Any]) -> float | None:
    table = found.means if column["task"] is None else found.scores
    value = table.get((name, column["key"]))
    return None if value is None else round(value, 5)


def ceiling_columns(ceilings: dict[str, float]) -> dict[str, Any]:
    """What a table shows beside an accuracy: chance, the best solver that does not solve the task and its name, the exact solver.

    Args:
        ceilings: by name, in the mean over the cells.
    """
    others = {name: value for name, value in ceilings.items() if name not in ("chance", "exact")}
    best = max(others, key=lambda name: others[name]) if others else None
    return {
        "chance": ceilings.get("chance"),
        "shortcut": None if best is None else others[best],
        "shortcut_name": best or "",
        "possible": ceilings.get("exact", 1.0),
    }


def shortcut_lines(ceilings: dict[str, float]) -> dict[str, float]:
    """The ceilings that the Pareto plot draws as lines: chance and the best solver that does not solve the task.

    The exact solver is drawn, as "best possible", only where even that misses labels.

    Args:
        ceilings: by name, in the mean over the cells.
    """
    found = ceiling_columns(ceilings)
    drawn = {"chance": found["chance"], found["shortcut_name"]: found["shortcut"]}
    if found["possible"] < 0.99:
        drawn["best possible"] = found["possible"]
    return {name: value for name, value in drawn.items() if value is not None}
