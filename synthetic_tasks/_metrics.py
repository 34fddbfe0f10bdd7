"""Numbers computed from predictions and ceilings: accuracy, measured shortcuts, binding gain, effective memory length.

Shape legend: N examples, T length.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from synthetic_tasks._base import Batch, Cell, Task, stream
from synthetic_tasks._splits import content_key


def accuracy(predictions_NT: np.ndarray, batch: Batch, group: str | None = None) -> float:
    """Mean over examples of the fraction of labelled positions (of `group`) predicted right; rows without any are left out."""
    mask = batch.mask if group is None else batch.groups[group]
    counts = mask.sum(axis=1)
    right = ((predictions_NT == batch.targets) & mask).sum(axis=1)
    return float((right[counts > 0] / counts[counts > 0]).mean()) if counts.any() else float("nan")


def macro_accuracy(predictions_NT: np.ndarray, batch: Batch) -> float:
    """Accuracy averaged over the labels that occur, each counting the same: MAD's metric (its library's default)."""
    labels, predicted = batch.targets[batch.mask], predictions_NT[batch.mask]
    counts = np.bincount(labels)
    hits = np.bincount(labels[labels == predicted], minlength=len(counts))
    return float((hits[counts > 0] / counts[counts > 0]).mean())


def score(predictions: np.ndarray, batch: Batch) -> float:
    """Accuracy, or the mean squared error where labels are real."""
    if batch.values is None:
        return accuracy(predictions, batch)
    return float(((predictions - batch.values)[batch.mask] ** 2).mean())


def measured(task: Task, cell: Cell, examples: int = 256, *, exact: bool = False) -> dict[str, float]:
    """Score of each of the task's shortcut solvers on a fixed sample of `cell`, and of the exact one as "exact".

    Results are kept for the life of the process, as every run of a sweep asks for them.
    """
    key = content_key(task, cell, examples, exact)
    if key is None or key not in _MEASURED:
        batch = task.sample(cell, examples, stream(0, "ceiling", cell.name))
        found = {name: score(predictions, batch) for name, predictions in task.shortcuts(batch).items()}
        if exact:
            found["exact"] = score(task.solve(batch), batch)
        if key is None:
            return found
        _MEASURED[key] = found
    return dict(_MEASURED[key])


_MEASURED: dict[str, dict[str, float]] = {}


def binding_gain(accuracy: float, shortcut: float) -> float:
    """Accuracy gained over a shortcut solver as a fraction of what it leaves, (a - m) / (1 - m); nan where m is 1."""
    return (accuracy - shortcut) / (1 - shortcut) if shortcut < 1 else float("nan")


def effective_memory_length(accuracy: float, ceilings: Mapping[str, float]) -> float:
    """How many symbols of history an ideal observer needs to score as much: the Bayes curve of `ceilings`, read backwards.

    Args:
        accuracy: of a model.
        ceilings: with entries "bayes 1", "bayes 2", ... : accuracy of the Bayes filter that sees the last k symbols.

    Returns:
        The interpolated k; 0 at or below chance, and the largest k of the curve for scores above it.
    """
    curve = {0: ceilings["chance"]} | {int(n.split()[1]): v for n, v in ceilings.items() if n.startswith("bayes ")}
    lengths = sorted(curve)
    return float(np.interp(accuracy, np.maximum.accumulate([curve[k] for k in lengths]), lengths))
