"""What MAD's six tasks share. Source: MAD (Poli et al. 2024, athms/mad-lab).

With `compat="mad"` the tasks keep the published quirks of the data: in the recall tasks training labels are all next tokens,
the unpredictable ones included, while the test labels answers only. MAD's own accuracy is averaged over classes, not tokens;
it is reported as "macro accuracy". Shape legend: N examples, T length.
"""

from __future__ import annotations

import numpy as np

from synthetic_tasks._base import Batch, Cell, Task
from synthetic_tasks._metrics import macro_accuracy


class MADTask(Task):
    """A task of MAD: beside our accuracy over labels, the published one over classes is reported."""

    def extra_metrics(self, cell: Cell, batch: Batch, predictions: np.ndarray) -> dict[str, float]:
        """See `Task.extra_metrics`."""
        del cell
        return {"macro accuracy": macro_accuracy(predictions, batch)}


def with_full_loss(cells: dict[str, tuple[Cell, ...]]) -> dict[str, tuple[Cell, ...]]:
    """The cells with those of the training split marked for labels at every position."""
    marked = tuple(Cell(cell.name, cell.length, cell.examples, {**cell.axes, "full_loss": 1}) for cell in cells["train"])
    return {**cells, "train": marked}


def next_tokens(inputs: np.ndarray, answers: np.ndarray, cell: Cell) -> Batch:
    """Next-token labels at the answers, or everywhere in cells marked by `with_full_loss`.

    Args:
        inputs: tokens [N, T].
        answers: positions whose next token is a recallable answer, [N, T]; the last column is never one.
        cell: the cell drawn.
    """
    targets = np.zeros_like(inputs)
    targets[:, :-1] = inputs[:, 1:]
    mask = answers
    if cell.axes.get("full_loss"):
        mask = np.ones_like(answers)
        mask[:, -1] = False
    return Batch(inputs, targets, mask, {"answer": answers} if cell.axes.get("full_loss") else {})


def seen_before(ids: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Index of the first place in its row that holds the same id, [N, P]; only `valid` places count, others give their own.

    Args:
        ids: non-negative ids [N, P].
        valid: which places hold one, [N, P].
    """
    rows, places = ids.shape
    index = np.arange(places)
    # Sorting by (id, place) puts equal ids side by side, the first of them in front; invalid places get ids of their own.
    unique = np.where(valid, ids, ids.max() + 1 + index)
    order = np.argsort(unique, axis=1, kind="stable")
    ranked = np.take_along_axis(unique, order, axis=1)
    head = np.ones((rows, places), dtype=bool)
    head[:, 1:] = ranked[:, 1:] != ranked[:, :-1]
    start = np.maximum.accumulate(np.where(head, index, 0), axis=1)
    first = np.empty((rows, places), dtype=np.int64)
    np.put_along_axis(first, order, np.take_along_axis(order, start, axis=1), axis=1)
    return first
