"""Scores by family of tasks: each task counts the same in its family, each difficulty cell the same in its task.

The score of a test cell is accuracy on the scale from chance (0) to the exact solver (1), cut off at both ends, so that tasks
with two and with a thousand possible answers can be averaged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from bench.points import Point
from bench.records import CellInfo

FAMILIES = ("recall", "selectivity", "mad", "state_tracking")
"""In the order shown."""
OTHER = "other"
OVERALL = "all families"


def cell_score(accuracy: float, ceilings: Mapping[str, float]) -> float:
    """Accuracy between chance (0) and the exact solver (1)."""
    low, high = ceilings.get("chance", 0.0), ceilings.get("exact", 1.0)
    return min(1.0, max(0.0, (accuracy - low) / (high - low))) if high > low else 0.0


def task_score(point: Point, *, trained: bool | None = None) -> float | None:
    """Mean score of the test cells, of those inside (True) or beyond (False) the trained range, or of all (None)."""
    cells = [cell for cell in point.cells if cell.name in point.slices and trained in (None, cell.trained)]
    return fmean(cell_score(point.slices[cell.name], cell.ceilings) for cell in cells) if cells else None


def mean_ceilings(cells: Sequence[CellInfo]) -> dict[str, float]:
    """What the solvers of a task's hardest cell score in the mean over all its test cells; 0 where a cell has no such solver."""
    hardest = max(cells, key=lambda cell: cell.bits_needed)
    return {name: fmean(cell.ceilings.get(name, 0.0) for cell in cells) for name in hardest.ceilings}


@dataclass(frozen=True)
class FamilyTable:
    """Scores of every point name on every task, and their means.

    Args:
        names: rows, best mean first.
        tasks: the tasks of each family shown, as written on the command line.
        scores: by (name, task).
        means: by (name, family), and (name, "all families") where there are several; None where a task is missing, because
            means over different tasks do not compare.
    """

    names: list[str]
    tasks: dict[str, list[str]]
    scores: dict[tuple[str, str], float]
    means: dict[tuple[str, str], float | None]


def family_table(points: Sequence[Point]) -> FamilyTable:
    """Scores by task and family."""
    families = {point.task: point.family if point.family in FAMILIES else OTHER for point in points}
    order = [*FAMILIES, OTHER]
    tasks = {family: sorted(task for task, own in families.items() if own == family) for family in order}
    tasks = {family: names for family, names in tasks.items() if names}
    scores = {(point.name, point.task): score for point in points if (score := task_score(point)) is not None}
    names = list(dict.fromkeys(point.name for point in points))
    means: dict[tuple[str, str], float | None] = {}
    for name in names:
        found = {family: _mean([scores.get((name, task)) for task in members]) for family, members in tasks.items()}
        means |= {(name, family): value for family, value in found.items()}
        if len(found) > 1:
            means[name, OVERALL] = _mean(list(found.values()))
    last = OVERALL if len(tasks) > 1 else next(iter(tasks), OVERALL)
    names.sort(key=lambda name: (-(means[name, last] or 0.0), name))
    return FamilyTable(names, tasks, scores, means)


def _mean(values: list[float | None]) -> float | None:
    """The mean, or None if a value is missing."""
    known = [value for value in values if value is not None]
    return fmean(known) if known and len(known) == len(values) else None
