"""Splits on the device: token ids as int32, and for each example the positions and labels of its labelled rows.

Shape legend: N examples, T length, M labelled rows of an example (the most of any example of the cell).
"""

from __future__ import annotations

from dataclasses import dataclass

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
        inputs_NT: token ids, int32.
        rows_NM: positions of the labelled rows, int64; 0 where an example has fewer than M.
        labels_NM: their targets, int64; -100 where an example has fewer than M.
        groups: labelled rows of each named subset, [N, M] bool.
        lures: named wrong answers, [N, M] int64; -1 where there is none.
    """

    cell: Cell
    inputs_NT: Tensor
    rows_NM: Tensor
    labels_NM: Tensor
    groups: dict[str, Tensor]
    lures: dict[str, Tensor]

    @classmethod
    def from_batch(cls, cell: Cell, batch: Batch, device: torch.device) -> DeviceCell:
        """Moves a batch to the device, keeping only the labelled rows of its targets."""
        order = np.argsort(~batch.mask, axis=1, kind="stable")[:, : int(batch.mask.sum(1).max())]
        valid = np.take_along_axis(batch.mask, order, axis=1)

        def pick(array: np.ndarray, fill: int) -> Tensor:
            picked = np.where(valid, np.take_along_axis(array, order, axis=1), fill)
            return torch.from_numpy(picked.astype(np.int64)).to(device)

        groups = {key: torch.from_numpy(np.take_along_axis(value, order, axis=1) & valid) for key, value in batch.groups.items()}
        return cls(
            cell,
            torch.from_numpy(batch.inputs.astype(np.int32)).to(device),
            torch.from_numpy(np.where(valid, order, 0)).to(device),
            pick(batch.targets, -100),
            {key: value.to(device) for key, value in groups.items()},
            {key: pick(value, -1) for key, value in batch.lures.items()},
        )


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
        n = cell.inputs_NT.shape[0]
        order = rng.permutation(n) if train.shuffle == "examples" else np.arange(n)
        indices = torch.from_numpy(order).to(cell.inputs_NT.device)
        plan.extend((index, part) for part in indices.split(train.batch_size))
    if train.shuffle != "none":
        plan = [plan[position] for position in rng.permutation(len(plan))]
    return plan
