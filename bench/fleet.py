"""A fleet as tensors, and one training step of all its members, captured in a CUDA graph on a GPU.

Members share no number, so none has an influence on the others.

Shape legend: E members, S seeds, P parameters of a member, B batch, M labelled rows of an example.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from bench.build import torch_seed
from bench.capture import Repeated, graph_pool
from bench.data import Picked, StackedCell
from bench.dropout import example_keys
from bench.member import MemberState
from bench.spec import RunSpec
from bench.stacked import StackedModel, compile_for_cells
from kernels.adamw import adamw_step
from synthetic_tasks import Task


class StackedFleet:
    """Parameters, moments and sums of every member. A step reads what changes from fixed tensors: examples and learning rates.

    Args:
        specs: the members; equal but for seed and learning rate.
        task: their task.
        cells: the training cells, with the data of all seeds.
        seeds: the seeds of the data.
        device: where to train.
        precision: "bf16" or "fp32".
        micro_batches: parts that a batch is split into, to fit memory; gradients are those of the whole batch.
        compiled: whether the loss goes through `torch.compile`.
        step: steps that the members have done.
        states: their numbers; None draws them from their seeds.
    """

    def __init__(
        self,
        specs: list[RunSpec],
        task: Task,
        cells: list[StackedCell],
        seeds: list[int],
        device: torch.device,
        precision: str,
        *,
        micro_batches: int,
        compiled: bool,
        step: int,
        states: list[MemberState] | None,
    ) -> None:
        self.train, self.micro_batches = specs[0].train, micro_batches
        self.model = StackedModel(specs, task, device, precision, compiled=compiled)
        self.sets_E = torch.tensor([seeds.index(spec.seed) for spec in specs], device=device)
        keys = [torch_seed(spec.seed, "dropout") % 2**31 for spec in specs]
        self.dropout_E = torch.tensor(keys, dtype=torch.int32, device=device) if self.model.module.embed_dropout else None
        self.gradient_EP = torch.zeros_like(self.model.flat_EP)
        self.sums_E3 = torch.zeros(len(specs), 3, device=device)
        """Loss, score and examples of the epoch so far."""
        self.rates_E = torch.zeros(len(specs), device=device)
        self.examples_SB = torch.full((len(seeds), self.train.batch_size), -1, device=device)
        self.first_EP, self.second_EP = (torch.zeros_like(self.model.flat_EP) for _ in range(2))
        self.steps_E = torch.full((len(specs),), float(step), device=device)
        if states is not None:
            self._load(states)
        self.pool = graph_pool(device)
        self._read = compile_for_cells(_read_batch) if compiled else _read_batch
        self._account = compile_for_cells(_account) if compiled else _account
        self.cells = cells
        self._steps = [Repeated(partial(self.step_on, cell), device, self.pool) for cell in cells]

    @torch.no_grad()
    def _load(self, states: list[MemberState]) -> None:
        for mine, state in zip(self.states(), states, strict=True):
            for name, tensor in vars(state).items():
                getattr(mine, name).copy_(tensor)

    def states(self) -> list[MemberState]:
        """The numbers of every member, as views."""
        rows = zip(self.model.flat_EP, self.first_EP, self.second_EP, self.sums_E3, strict=True)
        return [MemberState(*row) for row in rows]

    def advance(self, cell: int) -> None:
        """One step of every member on a training cell, with the examples and learning rates that are in place."""
        self._steps[cell]()

    def rehearse(self, cell: int) -> None:
        """Computes a gradient on a training cell and forgets it, which compiles all that a step needs."""
        sums_E3 = self.sums_E3.clone()
        self._differentiate(self.cells[cell])
        self.sums_E3.copy_(sums_E3)

    def step_on(self, cell: StackedCell) -> None:
        """`advance`, without a CUDA graph."""
        self._differentiate(cell)
        self._optimise()

    def _differentiate(self, cell: StackedCell) -> None:
        """Puts every member's gradient in its place, and adds its loss and score to the epoch's sums."""
        whole, keys_EB, share_E, examples_E, zero_error_E = self._read(
            cell, self.sets_E, self.examples_SB, self.dropout_E, self.steps_E
        )
        for index, part in enumerate(_split_batch(whole, keys_EB, self.micro_batches)):
            loss_E, score_E = self.model.loss_and_score(*part, zero_error_E)
            self.model.gradient(loss_E, share_E, self.gradient_EP, add=index > 0)
            self._account(self.sums_E3, loss_E.detach() * share_E, score_E, examples_E, first=index == 0)

    def _optimise(self) -> None:
        adamw_step(
            self.model.flat_EP,
            self.gradient_EP,
            self.first_EP,
            self.second_EP,
            self.rates_E,
            self.steps_E,
            weight_decay=self.train.weight_decay,
        )


def _read_batch(
    cell: StackedCell, sets_E: Tensor, examples_SB: Tensor, dropout_E: Tensor | None, steps_E: Tensor
) -> tuple[Picked, Tensor | None, Tensor, Tensor, Tensor]:
    """What a step starts from: the batch, the keys of its dropout, a labelled row's share in the mean, and two numbers a member.

    The keys, [E, B] int32, depend on nothing but the member's seed and the step. The numbers are those of examples with a label,
    and `zero_error_S` of the member's seed.
    """
    batch = cell.pick(sets_E, examples_SB[sets_E])
    labelled_EBM = batch.labels_EBM >= 0
    keys_EB = None if dropout_E is None else example_keys(dropout_E, steps_E[0].to(torch.int32), batch.inputs.shape[1])
    return batch, keys_EB, 1 / labelled_EBM.sum((1, 2)), labelled_EBM.any(2).sum(1), cell.zero_error_S[sets_E]


def _account(sums_E3: Tensor, mean_E: Tensor, score_E: Tensor, examples_E: Tensor, *, first: bool) -> None:
    """Adds a part of a batch to the epoch's sums; its examples count with the first one."""
    counted_E = examples_E if first else torch.zeros_like(examples_E)
    sums_E3 += torch.stack([mean_E.float() * examples_E, score_E.clamp(min=0), counted_E], 1)


def _split_batch(batch: Picked, keys_EB: Tensor | None, parts: int) -> Iterator[tuple[Picked, Tensor | None]]:
    """The batch and its dropout keys in parts."""
    split = [[None] * parts if t is None else t.tensor_split(parts, dim=1) for t in (*batch, keys_EB)]
    for *tensors, keys in zip(*split, strict=True):
        yield Picked(*tensors), keys
