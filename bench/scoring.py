"""Scores of every member of a fleet on a split, computed together.

Shape legend: E members, S seeds, B batch, N examples, M labelled rows, K values.
"""

from __future__ import annotations

from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from bench import evaluate
from bench.capture import Repeated
from bench.data import DeviceCell, StackedCell
from bench.evaluate import CellOutputs, Scores
from bench.stacked import StackedModel
from synthetic_tasks import Batch, Task, build_split

EVAL_TOKENS = {"cpu": 1 << 16, "cuda": 1 << 18}
"""Tokens of an evaluation batch, all members together."""


class Split:
    """A split of several seeds on the device, once as a stack and once seed by seed, with what its metrics need.

    Args:
        task: the task.
        name: "valid" or "test"; only the test has votes and metrics of the task's own.
        seeds: the seeds.
        device: where it lives.
    """

    def __init__(self, task: Task, name: str, seeds: list[int], device: torch.device) -> None:
        self.task, self.test = task, name == "test"
        self.batches: list[list[Batch]] = []
        self.cells: list[list[DeviceCell]] = []
        for seed in seeds:
            found = build_split(task, name, seed)
            batches = [found[cell.name] for cell in task.cells(name)]
            votes = [task.votes(batch) if self.test else None for batch in batches]
            self.batches.append(batches)
            self.cells.append(
                [
                    DeviceCell.from_batch(cell, batch, device, votes_NT=vote)
                    for cell, batch, vote in zip(task.cells(name), batches, votes, strict=True)
                ]
            )
        self.stacked = [StackedCell.from_cells(list(cells)) for cells in zip(*self.cells, strict=True)]


class Scorer:
    """Scores a stacked model on a split.

    Args:
        model: the members.
        split: the examples.
        sets: each member's seed, as an index into the split's.
        pool: memory pool for CUDA graphs; None computes without them, which pays for a split that is met once.
    """

    def __init__(self, model: StackedModel, split: Split, sets: list[int], pool: Any = None) -> None:
        self.model, self.split, self.sets = model, split, sets
        self.sets_E = torch.tensor(sets, device=model.device)
        self.pool = pool
        self._examples_SB: list[Tensor] = []
        self._parts: list[Repeated] = []
        for position, cell in enumerate(split.stacked):
            size = max(1, EVAL_TOKENS[model.device.type] // (cell.cell.length * len(model)))
            shape = (cell.inputs.shape[0], min(size, len(cell)))
            self._examples_SB.append(torch.full(shape, -1, device=model.device))
            self._parts.append(Repeated(partial(self._score_part, position), model.device, pool))

    @torch.no_grad()
    def scores(self) -> list[Scores]:
        """The scores of every member; the device is waited for once, behind all cells."""
        found = [Scores() for _ in self.sets]
        outputs = [self._cell_outputs(position) for position in range(len(self._parts))]
        asked = [(e, seed, position) for position in range(len(outputs)) for e, seed in enumerate(self.sets)]
        measured = [evaluate.measure(self.split.cells[seed][position], outputs[position][e]) for e, seed, position in asked]
        values = iter(torch.cat(measured).tolist())
        for (e, seed, position), tensor in zip(asked, measured, strict=True):
            cell = self.split.cells[seed][position]
            evaluate.add_scores(found[e], cell, list(islice(values, len(tensor))))
            if self.split.test:
                batch = self.split.batches[seed][position]
                evaluate.add_extra(found[e], self.split.task, cell.cell, batch, outputs[position][e].predicted)
        return found

    @torch.no_grad()
    def rehearse(self) -> None:
        """Scores a part of each cell and forgets it, which compiles all kernels that scores need."""
        for position in range(len(self._parts)):
            self._score_part(position)

    def _cell_outputs(self, position: int) -> list[CellOutputs]:
        """Each member's, which the device may still be making."""
        stacked, buffer_SB, run = self.split.stacked[position], self._examples_SB[position], self._parts[position]
        parts: list[tuple[Tensor, Tensor, Tensor | None]] = []
        for part in torch.arange(len(stacked), device=self.model.device).split(buffer_SB.shape[1]):
            buffer_SB.fill_(-1)
            buffer_SB[:, : len(part)] = part
            loss_E, predicted, votes_EB = run() if self.pool is not None else self._score_part(position)
            parts.append((loss_E.clone(), predicted.clone(), None if votes_EB is None else votes_EB.clone()))
        losses_E = torch.stack([loss_E for loss_E, _, _ in parts]).double().sum(0)
        predicted = torch.cat([found for _, found, _ in parts], dim=1)[:, : len(stacked)]
        votes = [found for _, _, found in parts if found is not None]
        votes_EN = torch.cat(votes, dim=1)[:, : len(stacked)] if votes else None
        rows = [self.split.cells[seed][position].rows_NM.shape[1] for seed in self.sets]
        return [
            CellOutputs(losses_E[e], predicted[e, :, :most], None if votes_EN is None else votes_EN[e])
            for e, most in enumerate(rows)
        ]

    def _score_part(self, position: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Loss [E], predictions [E, B, M] or [E, B, M, K] and vote accuracies [E, B] of the examples in the cell's buffer."""
        stacked, examples_EB = self.split.stacked[position], self._examples_SB[position][self.sets_E]
        batch = stacked.pick(self.sets_E, examples_EB)
        outputs = self.model.outputs(batch)
        values = [None] * len(self.sets) if batch.values_EBMK is None else list(batch.values_EBMK)
        found = [evaluate.loss_and_predictions(*one) for one in zip(outputs, batch.labels_EBM, values, strict=True)]
        votes_EB = None
        if self.split.cells[0][position].votes_NM is not None:
            votes_EB = torch.stack(
                [self._votes(outputs[e], batch.labels_EBM[e], examples_EB[e], seed, position) for e, seed in enumerate(self.sets)]
            )
        return torch.stack([loss for loss, _ in found]), torch.stack([predicted for _, predicted in found]), votes_EB

    def _votes(self, logits_BMV: Tensor, labels_BM: Tensor, examples_B: Tensor, seed: int, position: int) -> Tensor:
        votes_NM = self.split.cells[seed][position].votes_NM
        assert votes_NM is not None
        most = votes_NM.shape[1]
        return evaluate.vote_accuracy(logits_BMV[:, :most], votes_NM[examples_B.clamp(min=0)], labels_BM[:, :most])
