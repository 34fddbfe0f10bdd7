"""One run inside a fleet: its curve, its end, and what continues it after a stop."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from bench.evaluate import Scores
from bench.spec import RunSpec, TrainSpec

CurvePoint = dict[str, float | int | None]


@dataclass(frozen=True)
class MemberState:
    """The numbers that training changes, one member's share of the stacked tensors.

    Args:
        weights: parameters, [P].
        first: AdamW's first moments, [P].
        second: AdamW's second moments, [P].
        sums: loss, score and examples of the epoch so far.
    """

    weights: Tensor
    first: Tensor
    second: Tensor
    sums: Tensor


@dataclass
class Member:
    """One run of a fleet, as far as the host knows it."""

    spec: RunSpec
    curve: list[CurvePoint] = field(default_factory=list)
    seconds: float = 0.0
    diverged: bool = False
    valid: Scores | None = None
    """Validation scores of the last epoch."""

    @property
    def epoch(self) -> int:
        """Epochs completed, validation included."""
        return len(self.curve)

    def finished(self) -> bool:
        """Whether training is over: all epochs done, stopped early, or diverged."""
        if self.diverged or self.epoch >= self.spec.train.epochs:
            return True
        stop_at = self.spec.train.stop_at
        if stop_at is None or not self.curve:
            return False
        accuracy = self.curve[-1]["valid_accuracy"]
        return accuracy is not None and accuracy > stop_at

    def add_epoch(self, step: int, train: list[float], valid: Scores, rate: float) -> None:
        """Adds a point to the curve.

        Args:
            step: steps done.
            train: summed loss, summed score and number of the epoch's examples.
            valid: validation scores.
            rate: learning rate of the last step.
        """
        loss_sum, score_sum, examples = train
        self.valid = valid
        train_loss, valid_loss = loss_sum / examples, valid.mean(valid.loss)
        self.diverged = not (math.isfinite(train_loss) and math.isfinite(valid_loss))
        self.curve.append(
            {
                "epoch": self.epoch + 1,
                "step": step,
                "examples": (self.epoch + 1) * round(examples),
                "lr": rate,
                "train_loss": train_loss if math.isfinite(train_loss) else None,
                "train_accuracy": score_sum / examples,
                "valid_loss": valid_loss if math.isfinite(valid_loss) else None,
                "valid_accuracy": valid.mean(valid.accuracy),
                "seconds": self.seconds,
            }
        )

    def checkpoint(self, step: int, state: MemberState) -> dict[str, Any]:
        """Everything that continues the run exactly, in any fleet; tensors, numbers and strings only."""
        return {
            "spec": self.spec.model_dump_json(),
            "step": step,
            "seconds": self.seconds,
            "curve": list(self.curve),
            **{name: tensor.clone() for name, tensor in vars(state).items()},
        }

    @classmethod
    def restored(cls, spec: RunSpec, checkpoint: dict[str, Any]) -> tuple[Member, int, MemberState]:
        """A member from its checkpoint, the steps it had done, and its numbers.

        Raises:
            ValueError: the checkpoint is of another run.
        """
        if RunSpec.model_validate_json(checkpoint["spec"]).identity() != spec.identity():
            raise ValueError("the checkpoint belongs to another run")
        state = MemberState(**{name: checkpoint[name] for name in MemberState.__dataclass_fields__})
        return cls(spec, list(checkpoint["curve"]), checkpoint["seconds"]), checkpoint["step"], state


def learning_rate(train: TrainSpec, step: int, steps_per_epoch: int) -> float:
    """Learning rate of a step, counted from 0."""
    total = train.epochs * steps_per_epoch
    if train.schedule == "cosine_epoch":
        factor = 0.5 * (1 + math.cos(math.pi * (step // steps_per_epoch) / train.epochs))
    elif train.schedule == "cosine":
        factor = 0.5 * (1 + math.cos(math.pi * step / total))
    else:
        factor = 1.0
    return train.lr * factor * min(1.0, (step + 1) / (train.warmup_steps + 1))
