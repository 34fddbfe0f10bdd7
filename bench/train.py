"""Training a fleet: runs that differ in seed and learning rate only become one batched model; a single run is a fleet of one.

What costs nothing is left out: the head sees labelled rows only, data and batch order stay on the device, a step is one
CUDA graph on a GPU, and nothing is read back inside an epoch except for the progress bar, at most twice a second. Members
share no number, so a member's curve is that of the run alone. Nothing is written here.

Shape legend: E members, S seeds, P parameters of a member or steps of an epoch, B batch, N examples, T time, D width.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.build import build_task, resolve_precision, torch_seed
from bench.capture import Repeated, graph_pool
from bench.data import Picked, StackedCell, epoch_plan
from bench.dropout import example_keys
from bench.evaluate import Scores
from bench.member import Member, MemberState, learning_rate
from bench.scoring import Scorer, Split
from bench.spec import RunSpec
from bench.stacked import StackedModel, compile_for_cells
from bench.streamed import training_cells
from kernels.adamw import adamw_step

PROGRESS_SECONDS = 0.5
STEPS_AHEAD = 64
"""How far the host may run ahead of a GPU, twice: what a stop has to wait for."""


class Interrupted(Exception):
    """The caller asked to stop; carries each member's checkpoint."""

    def __init__(self, checkpoints: list[dict[str, Any]]) -> None:
        super().__init__("interrupted")
        self.checkpoints = checkpoints


@dataclass
class Progress:
    """What a progress bar shows; loss and accuracy are those of the best member."""

    step: int
    steps: int
    epoch: int
    loss: float
    accuracy: float | None


class FleetTrainer:
    """A fleet in progress.

    Args:
        specs: the members; equal but for seed and learning rate.
        device: where to train.
        micro_batches: parts that a batch is split into, to fit memory; gradients are those of the whole batch.
        compiled: whether the loss goes through `torch.compile`.
        checkpoints: each member's checkpoint, all at the same step.
    """

    def __init__(
        self,
        specs: list[RunSpec],
        device: torch.device,
        *,
        micro_batches: int = 1,
        compiled: bool = False,
        checkpoints: list[dict[str, Any]] | None = None,
    ) -> None:
        self.device, self.micro_batches, self.compiled = device, micro_batches, compiled
        self.train = specs[0].train
        self.task = build_task(specs[0].task)
        self.precision = resolve_precision(self.train, device)
        self.seeds = sorted({spec.seed for spec in specs})
        self.train_cells, self.streams = training_cells(self.task, self.seeds, device)
        self.valid = Split(self.task, "valid", self.seeds, device)
        self.sizes = [cell.cell.examples for cell in self.train_cells]
        self.spans = [self.streams[cell].span if cell in self.streams else size for cell, size in enumerate(self.sizes)]
        self.steps_per_epoch = len(epoch_plan(self.sizes, self.train, [], 0, self.spans)[0])
        if checkpoints is None:
            self.step, states = 0, None
            self.members = [Member(spec) for spec in specs]
        else:
            restored = [Member.restored(spec, content) for spec, content in zip(specs, checkpoints, strict=True)]
            self.members, steps, states = (list(part) for part in zip(*restored, strict=True))
            (self.step,) = set(steps)
        self.epoch = self.members[0].epoch
        self._stack(states)

    def _stack(self, states: list[MemberState] | None) -> None:
        """Builds the stacked tensors of the present members, from their seeds or from given numbers."""
        specs, device = [member.spec for member in self.members], self.device
        self.model = StackedModel(specs, self.task, device, self.precision, compiled=self.compiled)
        self.sets_E = torch.tensor([self.seeds.index(spec.seed) for spec in specs], device=device)
        keys = [torch_seed(spec.seed, "dropout") % 2**31 for spec in specs]
        self.dropout_E = torch.tensor(keys, dtype=torch.int32, device=device)
        self.gradient_EP = torch.zeros_like(self.model.flat_EP)
        self.sums_E3 = torch.zeros(len(specs), 3, device=device)
        self.rates_E = torch.zeros(len(specs), device=device)
        self.examples_SB = torch.full((len(self.seeds), self.train.batch_size), -1, device=device)
        self.first_EP, self.second_EP = (torch.zeros_like(self.model.flat_EP) for _ in range(2))
        self.steps_E = torch.full((len(specs),), float(self.step), device=device)
        if states is not None:
            self._load(states)
        self.pool = graph_pool(device)
        self._read = compile_for_cells(_read_batch) if self.compiled else _read_batch
        self._account = compile_for_cells(_account) if self.compiled else _account
        self._steps = [Repeated(partial(self._train_step, cell), device, self.pool) for cell in self.train_cells]
        sets = self.sets_E.tolist()
        self._scorer = Scorer(self.model, self.valid, sets, self.pool)
        self._tested: tuple[int, list[Scores]] | None = None

    @torch.no_grad()
    def _load(self, states: list[MemberState]) -> None:
        for index, state in enumerate(states):
            self.model.flat_EP[index].copy_(state.weights)
            self.first_EP[index].copy_(state.first)
            self.second_EP[index].copy_(state.second)
            self.sums_E3[index].copy_(state.sums)

    def states(self) -> list[MemberState]:
        """The numbers of every member, as views."""
        rows = zip(self.model.flat_EP, self.first_EP, self.second_EP, self.sums_E3, strict=True)
        return [MemberState(*row) for row in rows]

    def checkpoints(self) -> list[dict[str, Any]]:
        """Every member's checkpoint."""
        return [member.checkpoint(self.step, state) for member, state in zip(self.members, self.states(), strict=True)]

    @property
    def execution(self) -> str:
        """How steps run, as it is recorded."""
        if self.device.type != "cuda":
            return "eager"
        return "compiled, CUDA graph" if self.compiled else "CUDA graph"

    @property
    def steps(self) -> int:
        """Steps of a full run."""
        return self.train.epochs * self.steps_per_epoch

    def run(
        self,
        *,
        on_progress: Callable[[Progress], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
        on_checkpoint: Callable[[list[dict[str, Any]]], None] | None = None,
        checkpoint_seconds: float = 60.0,
    ) -> Iterator[int]:
        """Trains every member to its end: all epochs, early stop or divergence.

        Yields:
            The index of each member that has just finished, good until the next one is asked for.

        Raises:
            Interrupted: `should_stop` said so; steps in flight were finished first.
        """
        saved = shown = time.monotonic()
        while self.members:
            began = time.monotonic()
            cells, firsts, plan_PSB, rates_PE = self._plan_epoch()
            ahead: deque[torch.cuda.Event] = deque()
            first = self.step - self.epoch * self.steps_per_epoch
            for position in range(first, self.steps_per_epoch):
                self.examples_SB.copy_(plan_PSB[position])
                self.rates_E.copy_(rates_PE[position])
                if cells[position] in self.streams:
                    self.streams[cells[position]].hold(firsts[position])
                self.advance(cells[position])
                self._pace(ahead)
                now = time.monotonic()
                if on_progress is not None and now - shown > PROGRESS_SECONDS:
                    shown = now
                    on_progress(self._progress())
                if should_stop is not None and should_stop():
                    self._spent(began)
                    raise Interrupted(self.checkpoints())
                if on_checkpoint is not None and now - saved > checkpoint_seconds:
                    saved = now
                    on_checkpoint(self.checkpoints())
            yield from self._end_epoch(began)
            self._drop_finished()

    def advance(self, cell: int) -> None:
        """One step of every member on a training cell, with the examples and learning rates that are in place."""
        self._steps[cell]()
        self.step += 1

    def _plan_epoch(self) -> tuple[list[int], list[int], Tensor, Tensor]:
        """The cell of each step, its first example and all of them [P, S, B], and the learning rates [P, E]."""
        epoch = self.epoch
        cells, examples = epoch_plan(self.sizes, self.train, self.seeds, epoch, self.spans)
        start, per = epoch * self.steps_per_epoch, self.steps_per_epoch
        rates = [
            [0.0 if member.finished() else learning_rate(member.spec.train, start + p, per) for member in self.members]
            for p in range(per)
        ]
        firsts = examples[:, 0, 0].tolist()
        return cells, firsts, torch.from_numpy(examples).to(self.device), torch.tensor(rates, device=self.device)

    def _train_step(self, cell: StackedCell) -> None:
        """One step of every member, on the examples and learning rates in the fixed tensors."""
        whole, keys_EB, share_E, examples_E, zero_error_E = self._read(
            cell, self.sets_E, self.examples_SB, self.dropout_E if self.model.module.embed_dropout else None, self.steps_E
        )
        for index, part in enumerate(_split_batch(whole, keys_EB, self.micro_batches)):
            loss_E, score_E = self.model.loss_and_score(*part, zero_error_E)
            self.model.gradient(loss_E, share_E, self.gradient_EP, add=index > 0)
            self._account(self.sums_E3, loss_E.detach() * share_E, score_E, examples_E, first=index == 0)
        self._optimise()

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

    def _pace(self, ahead: deque[torch.cuda.Event]) -> None:
        """Keeps the host from queueing a whole epoch, so that a stop is obeyed soon."""
        if self.device.type != "cuda" or self.step % STEPS_AHEAD:
            return
        ahead.append(torch.cuda.Event())
        ahead[-1].record()
        if len(ahead) > 2:
            ahead.popleft().synchronize()

    def _end_epoch(self, began: float) -> list[int]:
        """Adds a point to the curves of the members that still train; those that end with it."""
        sums = self.sums_E3.tolist()  # waits for the device
        self._spent(began)
        self.sums_E3.zero_()
        self.epoch += 1
        ended = []
        for index, (member, scores) in enumerate(zip(self.members, self._scorer.scores(), strict=True)):
            if member.finished():
                continue
            rate = learning_rate(member.spec.train, self.step - 1, self.steps_per_epoch)
            member.add_epoch(self.step, sums[index], scores, rate)
            if member.finished():
                ended.append(index)
        return ended

    def test(self, index: int) -> Scores:
        """A member's scores on the test split."""
        if self._tested is None or self._tested[0] != self.step:
            split = Split(self.task, "test", self.seeds, self.device)
            self._tested = self.step, Scorer(self.model, split, self.sets_E.tolist()).scores()
        return self._tested[1][index]

    def _spent(self, began: float) -> None:
        """Adds each member's share of the time since `began`."""
        going = [member for member in self.members if not member.finished()]
        share = (time.monotonic() - began) / max(len(going), 1)
        for member in going:
            member.seconds += share

    def _drop_finished(self) -> None:
        """Goes on with the members that still train.

        A compiled fleet would have to be compiled again for its new size, so it carries finished members along, with a
        learning rate of zero, until they are half of it.
        """
        going = [not member.finished() for member in self.members]
        if all(going) or (self.compiled and sum(going) > len(going) // 2):
            return
        states = [state for state, keep in zip(self.states(), going, strict=True) if keep]
        self.members = [member for member, keep in zip(self.members, going, strict=True) if keep]
        if self.members:
            self._stack(states)

    def _progress(self) -> Progress:
        loss, accuracy, examples = self.sums_E3.T.tolist()
        best = max(range(len(loss)), key=lambda index: accuracy[index])
        n = max(examples[best], 1)
        return Progress(self.step, self.steps, self.epoch, loss[best] / n, accuracy[best] / n)


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
