"""Splits on the device: what the model reads, and for each example the positions and labels of its labelled rows.

Shape legend: N examples, T length, F features, K values, M labelled rows of an example (the most of any example of the cell).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from bench.spec import TrainSpec
from synthetic_tasks import Batch, Cell, Task, build_split, stream


@dataclass(frozen=True)
class DeviceCell:
    """One cell of a split, resident on the device.

    Args:
        cell: the cell.
        inputs: token ids [N, T] int32, or features [N, T, F] float32.
        rows_NM: positions of the labelled rows, int64; 0 where an example has fewer than M.
        labels_NM: their targets, int64; -100 where an example has fewer than M.
        groups: labelled rows of each named subset, [N, M] bool.
        lures: named wrong answers, [N, M] int64; -1 where there is none.
        values_NMK: their real-valued labels, float32, None where labels are tokens; 0 where an example has fewer than M.
        votes_NM: rows with the same number vote as one (see `Task.votes`), int64, or None.
    """

    cell: Cell
    inputs: Tensor
    rows_NM: Tensor
    labels_NM: Tensor
    groups: dict[str, Tensor]
    lures: dict[str, Tensor]
    values_NMK: Tensor | None = None
    votes_NM: Tensor | None = None

    @classmethod
    def from_batch(cls, cell: Cell, batch: Batch, device: torch.device, *, votes_NT: np.ndarray | None = None) -> DeviceCell:
        """Moves a batch to the device, keeping only the labelled rows of its targets."""
        order = np.argsort(~batch.mask, axis=1, kind="stable")[:, : int(batch.mask.sum(1).max())]
        valid = np.take_along_axis(batch.mask, order, axis=1)

        def pick(array: np.ndarray, fill: int) -> Tensor:
            picked = np.where(valid, np.take_along_axis(array, order, axis=1), fill)
            return torch.from_numpy(picked.astype(np.int64)).to(device)

        groups = {key: torch.from_numpy(np.take_along_axis(value, order, axis=1) & valid) for key, value in batch.groups.items()}
        values = None
        if batch.values is not None:
            values = np.where(valid[..., None], np.take_along_axis(batch.values, order[..., None], axis=1), np.float32(0))
        return cls(
            cell,
            torch.from_numpy(batch.inputs.astype(np.int32) if batch.features is None else batch.features).to(device),
            torch.from_numpy(np.where(valid, order, 0)).to(device),
            pick(batch.targets, -100),
            {key: value.to(device) for key, value in groups.items()},
            {key: pick(value, -1) for key, value in batch.lures.items()},
            None if values is None else torch.from_numpy(values).to(device),
            None if votes_NT is None else pick(votes_NT, 0),
        )

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.inputs)

    @cached_property
    def zero_error(self) -> float:
        """Mean squared error of predicting zero: the scale of the errors of real-valued labels."""
        assert self.values_NMK is not None
        return float(self.values_NMK[self.labels_NM >= 0].square().mean())


def device_split(task: Task, split: str, seed: int, device: torch.device) -> list[DeviceCell]:
    """Generates a split and moves it to the device."""
    batches = build_split(task, split, seed)
    return [DeviceCell.from_batch(cell, batches[cell.name], device) for cell in task.cells(split)]


def epoch_plan(cells: list[DeviceCell], train: TrainSpec, seed: int, epoch: int) -> list[tuple[int, Tensor]]:
    """The batches of one epoch as (cell index, example indices), a pure function of its arguments.

    A batch never mixes cells. With `shuffle="none"` the cells follow one another, easiest first, in the same order every
    epoch, as in Zoology; "batches" permutes whole batches; "examples" redraws their composition too.
    """
    rng = stream(seed, "order", epoch)
    plan: list[tuple[int, Tensor]] = []
    for index, cell in enumerate(cells):
        order = rng.permutation(len(cell)) if train.shuffle == "examples" else np.arange(len(cell))
        indices = torch.from_numpy(order).to(cell.inputs.device)
        plan.extend((index, part) for part in indices.split(train.batch_size))
    if train.shuffle != "none":
        plan = [plan[position] for position in rng.permutation(len(plan))]
    return plan
