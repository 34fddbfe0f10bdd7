"""The loop over one stage: budgets, progress, checkpoints, interruption, memory."""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from bench.convert import parallel
from bench.convert.stage import StageTrainer
from bench.errors import UserError

PROGRESS_SECONDS = 5.0


@dataclass(frozen=True)
class Progress:
    """How far a stage is.

    Args:
        stage: counted from 1.
        stages: their number.
        capture: what the stage matches.
        tokens: trained on in this stage.
        total: its length.
        losses: of the last step.
        tokens_per_second: over this process's part of the stage.
        seconds_left: in this stage.
    """

    stage: int
    stages: int
    capture: str
    tokens: int
    total: int
    losses: dict[str, float]
    tokens_per_second: float
    seconds_left: float


@dataclass
class StageLoop:
    """Runs a stage to its end.

    Args:
        trainer: of the stage.
        stages: number of stages in the conversion.
        limit: seconds for the stage, or None.
        elapsed: seconds spent before a resume.
        on_progress: called every few seconds.
        on_checkpoint: called with the seconds spent; on rank 0 alone it writes.
        checkpoint_seconds: between two of those calls.
    """

    trainer: StageTrainer
    stages: int
    limit: float | None
    elapsed: float
    on_progress: Callable[[Progress], None]
    on_checkpoint: Callable[[float], None]
    checkpoint_seconds: float

    def run(self) -> dict[str, Any]:
        """Trains until the tokens or the seconds are used up.

        Returns:
            What the report says about the stage.

        Raises:
            KeyboardInterrupt: after the step in flight was finished and its checkpoint written.
            UserError: out of memory, or a loss that is not finite.
        """
        trainer, device = self.trainer, self.trainer.device
        started = saved = shown = time.monotonic()
        before, losses, first = trainer.tokens, {}, 0.0
        with interrupted_between_steps() as stopping:
            while (share := parallel.agreed(self._share(started, first), device)) < 1:
                losses = step(trainer, share)
                now = time.monotonic()
                first = first or now - started
                stop = parallel.agreed(float(bool(stopping)), device)
                if stop or parallel.agreed(now - saved, device) > self.checkpoint_seconds:
                    self.on_checkpoint(self._spent(started))
                    saved = now
                if stop:
                    raise KeyboardInterrupt
                if now - shown > PROGRESS_SECONDS:
                    shown = now
                    self.on_progress(self._progress(losses, (trainer.tokens - before) / (now - started), started))
        seconds = time.monotonic() - started
        return {
            "capture": trainer.stage.capture,
            "tokens": trainer.tokens,
            "steps": trainer.step_number,
            "seconds": self.elapsed + seconds,
            "tokens_per_second": (trainer.tokens - before) / max(seconds, 1e-9),
            "processes": parallel.size(),
            "last": losses,
        }

    def _spent(self, started: float) -> float:
        return self.elapsed + time.monotonic() - started

    def _share(self, started: float, first: float) -> float:
        """Share of the stage that is done, by tokens or by time, whichever is further.

        The time limit holds for everything, but the first step, in which the stage may be compiled, is no progress: the learning
        rate would have fallen when training begins.
        """
        tokens = self.trainer.tokens / self.trainer.stage.tokens
        if self.limit is None:
            return tokens
        spent = self._spent(started)
        return 1.0 if spent >= self.limit else max(tokens, (spent - first) / (self.limit - first))

    def _progress(self, losses: dict[str, float], rate: float, started: float) -> Progress:
        trainer = self.trainer
        left = (trainer.stage.tokens - trainer.tokens) / rate
        left = left if self.limit is None else min(left, self.limit - self._spent(started))
        where = (trainer.index + 1, self.stages, trainer.stage.capture, trainer.tokens, trainer.stage.tokens)
        return Progress(*where, losses, rate, max(0.0, left))


def step(trainer: StageTrainer, share: float) -> dict[str, float]:
    """One step, in smaller parts if memory runs out.

    Raises:
        UserError: a single sequence does not fit, or the loss is not finite.
    """
    while True:
        try:
            losses = trainer.step(share)
            break
        except torch.OutOfMemoryError:
            if parallel.size() > 1:
                raise UserError(
                    f"Out of memory; the processes cannot change their batches alone: try --set stages.micro_tokens="
                    f"{trainer.micro_rows * trainer.stage.seq_len // 2}."
                ) from None
            if not trainer.halve_micro_batch():
                raise UserError(
                    f"Out of memory with one sequence of {trainer.stage.seq_len} tokens at a time; try --set stages.seq_len="
                    f"{trainer.stage.seq_len // 2}."
                ) from None
            torch.cuda.empty_cache()
    if not all(math.isfinite(value) for value in losses.values()):
        raise UserError(
            f"The loss of stage {trainer.index + 1} is not finite after {trainer.tokens:,} tokens at lr {trainer.stage.lr:g}; "
            f"lower it with --set stages.{trainer.index + 1}.lr={trainer.stage.lr / 10:g}."
        )
    return losses


@contextlib.contextmanager
def interrupted_between_steps() -> Iterator[list[int]]:
    """Within it, the first Ctrl-C only leaves a mark in the yielded list, so that no step is cut in half."""
    marks: list[int] = []

    def mark(number: int, _: Any) -> None:
        if marks:
            raise KeyboardInterrupt
        marks.append(number)

    before = signal.signal(signal.SIGINT, mark)
    try:
        yield marks
    finally:
        signal.signal(signal.SIGINT, before)
