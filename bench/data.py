"""Splits on the device: what the model reads, and for each example the positions and labels of its labelled rows.

Shape legend: N examples, B batch, T length, F features, K values, M labelled rows of an example (the most of any example of the
cell), S seeds, E members of a fleet, P steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

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
        groups: labelled rows of each named subset that has any, [N, M] bool.
        lures: named wrong answers, of those that there are, [N, M] int64; -1 where there is none.
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
            {key: value.to(device) for key, value in groups.items() if value.any()},
            {key: found for key, value in batch.lures.items() if bool((found := pick(value, -1)).ge(0).any())},
            None if values is None else torch.from_numpy(values).to(device),
            None if votes_NT is None else pick(votes_NT, 0),
        )

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.inputs)

    @cached_property
    def labelled(self) -> int:
        """Number of labelled rows."""
        return int((self.labels_NM >= 0).sum())

    @cached_property
    def zero_error(self) -> float:
        """Mean squared error of predicting zero: the scale of the errors of real-valued labels."""
        assert self.values_NMK is not None
        return float(self.values_NMK[self.labels_NM >= 0].square().mean())


def device_split(task: Task, split: str, seed: int, device: torch.device) -> list[DeviceCell]:
    """Generates a split and moves it to the device."""
    batches = build_split(task, split, seed, workers=torch.get_num_threads())
    return [DeviceCell.from_batch(cell, batches[cell.name], device) for cell in task.cells(split)]


class Picked(NamedTuple):
    """A batch of every member, members first; where an example or a row is only padding, its label is -100."""

    inputs: Tensor
    """[E, B, T] int32 or [E, B, T, F] float32."""
    rows_EBM: Tensor
    labels_EBM: Tensor
    values_EBMK: Tensor | None


@dataclass(frozen=True)
class StackedCell:
    """The same cell drawn for several seeds: the tensors of their `DeviceCell`s, seeds first.

    Args:
        cell: the cell.
        inputs: token ids [S, N, T] or features [S, N, T, F].
        rows_SNM: positions of the labelled rows.
        labels_SNM: their targets.
        values_SNMK: their real-valued labels, or None.
        zero_error_S: mean squared error of predicting zero; 1 where labels are tokens.
        start: number of the example in row 0, a tensor of one element; not 0 where only a block of the cell is here.
    """

    cell: Cell
    inputs: Tensor
    rows_SNM: Tensor
    labels_SNM: Tensor
    values_SNMK: Tensor | None
    zero_error_S: Tensor
    start: Tensor

    @classmethod
    def from_cells(cls, cells: list[DeviceCell], most: int = 0) -> StackedCell:
        """Stacks one cell a seed; examples with fewer labelled rows than those of other seeds, or than `most`, are padded."""
        most = max(most, *(cell.rows_NM.shape[1] for cell in cells))

        def stacked(name: str, fill: int) -> Tensor:
            return torch.stack([F.pad(t, (0, most - t.shape[1]), value=fill) for t in (getattr(cell, name) for cell in cells)])

        values = [F.pad(t, (0, 0, 0, most - t.shape[1])) for cell in cells if (t := cell.values_NMK) is not None]
        return cls(
            cells[0].cell,
            torch.stack([cell.inputs for cell in cells]),
            stacked("rows_NM", 0),
            stacked("labels_NM", -100),
            torch.stack(values) if values else None,
            torch.tensor([cell.zero_error if values else 1.0 for cell in cells], device=cells[0].inputs.device),
            torch.zeros((), dtype=torch.int64, device=cells[0].inputs.device),
        )

    def __len__(self) -> int:
        """Number of examples of a seed."""
        return self.inputs.shape[1]

    def pick(self, sets_E: Tensor, examples_EB: Tensor) -> Picked:
        """Each member's examples.

        Args:
            sets_E: each member's seed, as an index into S.
            examples_EB: numbers of examples, which are here; -1 stands for no example.
        """
        set_E1, example_EB = sets_E[:, None], (examples_EB - self.start).clamp(min=0)
        labels_EBM = self.labels_SNM[set_E1, example_EB].masked_fill(examples_EB[..., None] < 0, -100)
        values = None if self.values_SNMK is None else self.values_SNMK[set_E1, example_EB]
        return Picked(self.inputs[set_E1, example_EB], self.rows_SNM[set_E1, example_EB], labels_EBM, values)


def epoch_plan(
    sizes: list[int], train: TrainSpec, seeds: list[int], epoch: int, spans: list[int] | None = None
) -> tuple[list[int], np.ndarray]:
    """The batches of one epoch, a pure function of its arguments.

    A batch never mixes cells, and all seeds meet the cells in the same order, so that runs of different seeds can be
    trained together. With `shuffle="none"` the cells follow one another, easiest first, in the same order every epoch, as
    in Zoology; "batches" permutes whole batches, those of a cell in an order of the seed's own; "examples" redraws their
    composition too. A cell that is streamed comes block by block, in an order that all seeds share; the rest happens inside
    of its blocks.

    Args:
        sizes: examples of each cell.
        train: batch size and shuffling.
        seeds: the S seeds.
        epoch: counted from 0.
        spans: examples of each cell that are present together, by default all of them.

    Returns:
        The cell of each of the P steps, and examples [P, S, B] int64; -1 fills the last batch of a cell or block.
    """
    spans = sizes if spans is None else spans
    starts = [np.arange(0, size, span) for size, span in zip(sizes, spans, strict=True)]
    lengths = [np.minimum(span, size - start) for size, span, start in zip(sizes, spans, starts, strict=True)]
    batches = [-(-length // train.batch_size) for length in lengths]
    cells = np.repeat(np.arange(len(sizes)), [count.sum() for count in batches])
    if train.shuffle != "none":
        cells = stream(0, "order", epoch).permutation(cells)
    examples = np.full((len(cells), len(seeds), train.batch_size), -1, dtype=np.int64)
    for column, seed in enumerate(seeds):
        rng = stream(seed, "order", epoch)
        for index, start in enumerate(starts):
            turns = np.arange(len(start)) if train.shuffle == "none" else stream(0, "blocks", index, epoch).permutation(len(start))
            parts = [(start[turn], _block_plan(rng, int(lengths[index][turn]), train)) for turn in turns]
            examples[cells == index, column] = np.concatenate([np.where(part < 0, -1, first + part) for first, part in parts])
    return cells.tolist(), examples


def _block_plan(rng: np.random.Generator, size: int, train: TrainSpec) -> np.ndarray:
    """The batches of `size` examples, [batches, B]; -1 fills the last one."""
    count = -(-size // train.batch_size)
    order = np.full(count * train.batch_size, -1, dtype=np.int64)
    order[:size] = rng.permutation(size) if train.shuffle == "examples" else np.arange(size)
    parts = order.reshape(count, train.batch_size)
    return rng.permutation(parts) if train.shuffle == "batches" else parts
