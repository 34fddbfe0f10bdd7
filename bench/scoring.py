"""Scores of every member of a fleet on a split, computed together.

Shape legend: E members, S seeds, B batch, N examples, P parts, M labelled rows, K values.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

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
        self._parts: list[Tensor] = []
        """Examples of each cell in parts of one size, [parts, B]; -1 where the last part has fewer."""
        self._cells: list[Callable[[], tuple[Tensor, list[int], list[CellOutputs]]]] = []
        for position, cell in enumerate(split.stacked):
            parts = -(-len(cell) // max(1, EVAL_TOKENS[model.device.type] // (cell.cell.length * len(model))))
            padded_N = F.pad(torch.arange(len(cell), device=model.device), (0, -len(cell) % parts), value=-1)
            self._parts.append(padded_N.view(parts, -1))
            score = partial(self._score_cell, position)
            self._cells.append(score if pool is None else Repeated(score, model.device, pool))

    @torch.no_grad()
    def scores(self) -> list[Scores]:
        """The scores of every member; the device is waited for once, behind all cells."""
        found = [Scores() for _ in self.sets]
        measured: list[Tensor] = []
        rest: list[tuple[list[int], list[CellOutputs]]] = []
        for score in self._cells:
            numbers, counts, outputs = score()
            measured.append(numbers.clone())  # the next graph may write where they lie
            rest.append((counts, outputs))
        values = iter(torch.cat(measured).tolist())
        for position, (counts, outputs) in enumerate(rest):
            for e, seed in enumerate(self.sets):
                cell = self.split.cells[seed][position]
                evaluate.add_scores(found[e], cell, list(islice(values, counts[e])))
                if self.split.test:
                    batch = self.split.batches[seed][position]
                    evaluate.add_extra(found[e], self.split.task, cell.cell, batch, outputs[e].predicted)
        return found

    @torch.no_grad()
    def rehearse(self) -> None:
        """Scores a part of each cell and forgets it, which compiles all kernels that scores need."""
        for position, parts_PB in enumerate(self._parts):
            self._score_part(position, parts_PB[0])

    def _score_cell(self, position: int) -> tuple[Tensor, list[int], list[CellOutputs]]:
        """What `measure` finds of each member, one after another; how many numbers each has; and its outputs."""
        outputs = self._cell_outputs(position)
        cells = [self.split.cells[seed][position] for seed in self.sets]
        measured = [evaluate.measure(cell, found) for cell, found in zip(cells, outputs, strict=True)]
        return torch.cat(measured), [len(numbers) for numbers in measured], outputs

    def _cell_outputs(self, position: int) -> list[CellOutputs]:
        """Each member's."""
        n = len(self.split.stacked[position])
        parts = [self._score_part(position, examples_B) for examples_B in self._parts[position]]
        losses_E = torch.stack([loss_E for loss_E, _, _ in parts]).double().sum(0)
        predicted = torch.cat([found for _, found, _ in parts], dim=1)[:, :n]
        votes = [found for _, _, found in parts if found is not None]
        votes_EN = torch.cat(votes, dim=1)[:, :n] if votes else None
        rows = [self.split.cells[seed][position].rows_NM.shape[1] for seed in self.sets]
        return [
            CellOutputs(losses_E[e], predicted[e, :, :most], None if votes_EN is None else votes_EN[e])
            for e, most in enumerate(rows)
        ]

    def _score_part(self, position: int, examples_B: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Loss [E], predictions [E, B, M] or [E, B, M, K] and vote accuracies [E, B] of some examples."""
        batch = self.split.stacked[position].pick(self.sets_E, examples_B.expand(len(self.sets), -1))
        outputs = self.model.outputs(batch)
        values = [None] * len(self.sets) if batch.values_EBMK is None else list(batch.values_EBMK)
        found = [evaluate.loss_and_predictions(*one) for one in zip(outputs, batch.labels_EBM, values, strict=True)]
        votes_EB = None
        if self.split.cells[0][position].votes_NM is not None:
            votes_EB = torch.stack(
                [self._votes(outputs[e], batch.labels_EBM[e], examples_B, seed, position) for e, seed in enumerate(self.sets)]
            )
        return torch.stack([loss for loss, _ in found]), torch.stack([predicted for _, predicted in found]), votes_EB

    def _votes(self, logits_BMV: Tensor, labels_BM: Tensor, examples_B: Tensor, seed: int, position: int) -> Tensor:
        votes_NM = self.split.cells[seed][position].votes_NM
        assert votes_NM is not None
        most = votes_NM.shape[1]
        return evaluate.vote_accuracy(logits_BMV[:, :most], votes_NM[examples_B.clamp(min=0)], labels_BM[:, :most])
