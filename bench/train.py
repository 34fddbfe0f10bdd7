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

from bench.build import build_task, resolve_precision
from bench.data import epoch_plan
from bench.evaluate import Scores
from bench.failures import free_memory
from bench.fleet import StackedFleet
from bench.member import Member, MemberState, learning_rate
from bench.scoring import Scorer, Split
from bench.spec import RunSpec
from bench.streamed import training_cells
from bench.turns import Turn

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


def execution(device: torch.device, *, compiled: bool) -> str:
    """How steps run on a device, as it is recorded."""
    if device.type != "cuda":
        return "eager"
    return "compiled, CUDA graph" if compiled else "CUDA graph"


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
        """Builds the fleet of the present members, from their seeds or from given numbers."""
        self.fleet = StackedFleet(
            [member.spec for member in self.members],
            self.task,
            self.train_cells,
            self.seeds,
            self.device,
            self.precision,
            micro_batches=self.micro_batches,
            compiled=self.compiled,
            step=self.step,
            states=states,
        )
        self._scorer = Scorer(self.fleet.model, self.valid, self.fleet.sets_E.tolist(), self.fleet.pool)
        self._tested: tuple[int, list[Scores]] | None = None
        self._compile_seconds: float | None = None
        """What compiling this fleet took; None before."""
        self._epoch_seconds = 0.0

    def checkpoints(self) -> list[dict[str, Any]]:
        """Every member's checkpoint."""
        return [member.checkpoint(self.step, state) for member, state in zip(self.members, self.fleet.states(), strict=True)]

    @property
    def execution(self) -> str:
        """How steps run, as it is recorded."""
        return execution(self.device, compiled=self.compiled)

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
        turn: Turn | None = None,
    ) -> Iterator[int]:
        """Trains every member to its end: all epochs, early stop or divergence.

        Args:
            on_progress: is told now and then.
            should_stop: asked after every step.
            on_checkpoint: is given every member's checkpoint now and then.
            checkpoint_seconds: how often.
            turn: is held while steps run, and not while they are compiled; the caller gives it back.

        Yields:
            The index of each member that has just finished, good until the next one is asked for.

        Raises:
            Interrupted: `should_stop` said so; steps in flight were finished first.
        """
        saved = shown = time.monotonic()
        while self.members:
            if self.compiled and self._compile_seconds is None:
                self._compile(turn, should_stop or (lambda: False))
            began = epoch_began = time.monotonic()
            cells, firsts, plan_PSB, rates_PE = self._plan_epoch()
            ahead: deque[torch.cuda.Event] = deque()
            first = self.step - self.epoch * self.steps_per_epoch
            for position in range(first, self.steps_per_epoch):
                self.fleet.examples_SB.copy_(plan_PSB[position])
                self.fleet.rates_E.copy_(rates_PE[position])
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
                    self._spent(began)
                    began = time.monotonic()
                    on_checkpoint(self.checkpoints())
            ended = self._end_epoch(began)
            self._epoch_seconds = time.monotonic() - epoch_began
            yield from ended
            self._drop_finished()

    def _compile(self, turn: Turn | None, stopped: Callable[[], bool]) -> None:
        """Compiles steps and scores, while others that share the GPU train, then waits for a turn."""
        if turn is not None:
            turn.give()
        began = time.monotonic()
        rehearsals = [partial(self.fleet.rehearse, cell) for cell in range(len(self.train_cells))]
        for rehearse in (*rehearsals, self._scorer.rehearse):
            if stopped():
                raise Interrupted(self.checkpoints())
            rehearse()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()  # a fleet that compiles or waits leaves the memory to those that train
        self._compile_seconds = time.monotonic() - began
        if turn is not None and not turn.take(stopped):
            raise Interrupted(self.checkpoints())

    def advance(self, cell: int) -> None:
        """One step of every member on a training cell, with the examples and learning rates that are in the fleet's tensors."""
        self.fleet.advance(cell)
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
        sums = self.fleet.sums_E3.tolist()  # waits for the device
        self._spent(began)
        self.fleet.sums_E3.zero_()
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
            self._tested = self.step, Scorer(self.fleet.model, split, self.fleet.sets_E.tolist()).scores()
        return self._tested[1][index]

    def _spent(self, began: float) -> None:
        """Adds each member's share of the time since `began`."""
        going = [member for member in self.members if not member.finished()]
        share = (time.monotonic() - began) / max(len(going), 1)
        for member in going:
            member.seconds += share

    def _drop_finished(self) -> None:
        """Goes on with the members that still train; others are carried along, at a rate of zero, while that costs less."""
        going = [not member.finished() for member in self.members]
        if all(going) or (any(going) and self.compiled and not self._pays(sum(going) / len(going))):
            return
        states = [state for state, keep in zip(self.fleet.states(), going, strict=True) if keep]
        self.members = [member for member, keep in zip(self.members, going, strict=True) if keep]
        if self.members:
            del self.fleet, self._scorer  # whose graphs hold the memory of a step
            free_memory(self.device)
            self._stack(states)

    def _pays(self, share: float) -> bool:
        """Whether a fleet of a share of the members saves more time than compiling it takes, by what compiling this one took."""
        assert self._compile_seconds is not None
        return (self.train.epochs - self.epoch) * self._epoch_seconds * (1 - share) > self._compile_seconds

    def _progress(self) -> Progress:
        loss, accuracy, examples = self.fleet.sums_E3.T.tolist()
        best = max(range(len(loss)), key=lambda index: accuracy[index])
        n = max(examples[best], 1)
        return Progress(self.step, self.steps, self.epoch, loss[best] / n, accuracy[best] / n)
