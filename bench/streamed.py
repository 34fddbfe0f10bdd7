"""Training splits on the device; of one that is too large, a block of each cell at a time, drawn again when its turn comes.

What is streamed follows from the task alone, so that a run is the same on every machine.

Shape legend: S seeds, N examples, M labelled rows.
"""

from __future__ import annotations

from dataclasses import fields

import torch
from torch import Tensor

from bench.data import DeviceCell, StackedCell, device_split
from synthetic_tasks import BLOCK_ROWS, Cell, Task, training_block

STREAMED_BYTES = 1 << 30
"""Inputs of a training split, of one seed, beyond which it is streamed."""


class Stream:
    """One block of a training cell, for several seeds, in tensors that stay where they are.

    Args:
        task: the task.
        cell: one of its training cells.
        seeds: the S seeds.
        device: where the block lives.
    """

    def __init__(self, task: Task, cell: Cell, seeds: list[int], device: torch.device) -> None:
        self.task, self.cell, self.seeds, self.device = task, cell, seeds, device
        self.block, self.span = 0, BLOCK_ROWS
        blocks = self._draw(0)
        labelled = torch.cat([(block.labels_NM >= 0).sum(1) for block in blocks])
        # Where examples differ in their number of labels, a later block may have more than this one.
        most = int(labelled.max()) if labelled.min() == labelled.max() else cell.length
        self.resident = StackedCell.from_cells(blocks, most)

    def _draw(self, block: int) -> list[DeviceCell]:
        batches = [training_block(self.task, self.cell, seed, block) for seed in self.seeds]
        return [DeviceCell.from_batch(self.cell, batch, self.device) for batch in batches]

    def hold(self, example: int) -> None:
        """Brings in the block with an example; the scale of real-valued errors remains that of the first block."""
        block = example // self.span
        if block == self.block:
            return
        self.block = block
        new = StackedCell.from_cells(self._draw(block), self.resident.rows_SNM.shape[2])
        for field in fields(StackedCell):
            ours, theirs = getattr(self.resident, field.name), getattr(new, field.name)
            if isinstance(ours, Tensor) and field.name not in ("zero_error_S", "start"):
                ours[:, : theirs.shape[1]] = theirs
        self.resident.start.fill_(block * self.span)


def training_cells(task: Task, seeds: list[int], device: torch.device) -> tuple[list[StackedCell], dict[int, Stream]]:
    """The training split of several seeds, cell by cell, and the streams of those cells of which only a block is there."""
    cells = task.cells("train")
    if sum(_bytes(task, cell) for cell in cells) <= STREAMED_BYTES:
        by_seed = [device_split(task, "train", seed, device) for seed in seeds]
        return [StackedCell.from_cells(list(found)) for found in zip(*by_seed, strict=True)], {}
    streams = {index: Stream(task, cell, seeds, device) for index, cell in enumerate(cells)}
    return [stream.resident for stream in streams.values()], streams


def _bytes(task: Task, cell: Cell) -> int:
    """Bytes of what a model reads of a cell."""
    return 4 * cell.examples * cell.length * max(1, task.feature_dim)
