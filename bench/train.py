"""Training one run: a spec goes in, curve points and metrics come out; nothing is written here.

What costs nothing is left out: the head sees labelled rows only, the data stay on the device, nothing is read back from
the device inside an epoch except for the progress bar, at most twice a second.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench import catalog, evaluate
from bench.data import DeviceCell, device_split, epoch_plan
from bench.errors import UserError
from bench.evaluate import Scores
from bench.model import LanguageModel
from bench.spec import RunSpec, TaskSpec, TrainSpec
from synthetic_tasks import Task, stream

PROGRESS_SECONDS = 0.5


class Interrupted(Exception):
    """The caller asked to stop; carries the checkpoint that continues the run."""

    def __init__(self, checkpoint: dict[str, Any]) -> None:
        super().__init__("interrupted")
        self.checkpoint = checkpoint


@dataclass
class Progress:
    """What a progress bar shows."""

    step: int
    steps: int
    epoch: int
    loss: float
    accuracy: float | None


def build_task(spec: TaskSpec) -> Task:
    """A task from its spec.

    Raises:
        UserError: unknown task or option, or options that the task refuses.
    """
    cls = catalog.load("task", spec.name)
    options = catalog.check_options("task", spec.name, cls, spec.options)
    try:
        return cls(**options)
    except ValueError as error:
        raise UserError(f"Task {spec.name}: {error}") from error


def build_model(spec: RunSpec, task: Task, device: torch.device) -> LanguageModel:
    """The run's model with the weights that its seed decides; the caller's random state is left alone."""
    place = torch.device("meta" if device.type == "meta" else "cpu")  # drawn on the CPU, so every device starts alike
    with torch.random.fork_rng(devices=[]), place:
        torch.manual_seed(_torch_seed(spec.seed, "init"))
        model = LanguageModel(spec.model, task)
    return model.to(device)


def _torch_seed(seed: int, purpose: str) -> int:
    return int(stream(seed, purpose).integers(2**62))


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


class Trainer:
    """One run in progress.

    Args:
        spec: the run.
        device: where to train.
        micro_batches: parts that a batch is split into, to fit memory; gradients are those of the whole batch.
    """

    def __init__(self, spec: RunSpec, device: torch.device, *, micro_batches: int = 1) -> None:
        self.spec, self.device, self.micro_batches = spec, device, micro_batches
        self.task = build_task(spec.task)
        self.precision = resolve_precision(spec.train, device)
        self.train_cells = device_split(self.task, "train", spec.seed, device)
        self.valid_cells = device_split(self.task, "valid", spec.seed, device)
        self.model = build_model(spec, self.task, device)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=spec.train.lr, weight_decay=spec.train.weight_decay, fused=True
        )
        self.steps_per_epoch = len(epoch_plan(self.train_cells, spec.train, spec.seed, 0))
        self.step = 0
        self.seconds = 0.0
        self.curve: list[dict[str, float | int | None]] = []
        self.sums = torch.zeros(3, device=device)  # loss, accuracy and examples of this epoch so far
        self.diverged = False

    @property
    def epoch(self) -> int:
        """Epochs completed, validation included."""
        return len(self.curve)

    @property
    def steps(self) -> int:
        """Steps of a full run."""
        return self.spec.train.epochs * self.steps_per_epoch

    def run(
        self,
        *,
        on_progress: Callable[[Progress], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
        on_checkpoint: Callable[[dict[str, Any]], None] | None = None,
        checkpoint_seconds: float = 60.0,
    ) -> None:
        """Trains to the end, to early stop or to divergence.

        Raises:
            Interrupted: `should_stop` said so; the step in flight was finished first.
        """
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(_torch_seed(self.spec.seed, "dropout"))
            if self._resume_rng is not None:
                self._set_rng(self._resume_rng)
            saved = shown = time.monotonic()
            while not self.finished():
                plan = epoch_plan(self.train_cells, self.spec.train, self.spec.seed, self.epoch)
                for cell_index, examples in plan[self.step - self.epoch * self.steps_per_epoch :]:
                    began = time.monotonic()
                    self._train_step(self.train_cells[cell_index], examples)
                    now = time.monotonic()
                    self.seconds += now - began
                    if on_progress is not None and now - shown > PROGRESS_SECONDS:
                        shown = now
                        on_progress(self._progress())
                    if should_stop is not None and should_stop():
                        raise Interrupted(self.checkpoint())
                    if on_checkpoint is not None and now - saved > checkpoint_seconds:
                        saved = now
                        on_checkpoint(self.checkpoint())
                self._end_epoch()

    def finished(self) -> bool:
        """Whether training is over."""
        if self.diverged or self.epoch >= self.spec.train.epochs:
            return True
        stop_at = self.spec.train.stop_at
        if stop_at is None or not self.curve:
            return False
        accuracy = self.curve[-1]["valid_accuracy"]
        return accuracy is not None and accuracy > stop_at

    def _train_step(self, cell: DeviceCell, examples: Tensor) -> None:
        rate = learning_rate(self.spec.train, self.step, self.steps_per_epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.model.train()
        labelled = (cell.labels_NM[examples] >= 0).sum()
        for part in examples.tensor_split(self.micro_batches):
            outputs_BMX = evaluate.forward(self.model, cell, part, self.precision)
            loss = evaluate.summed_loss(outputs_BMX, cell, part)
            (loss / labelled).backward()
            scores_BM = evaluate.row_scores(evaluate.predictions(outputs_BMX, cell), cell, part)
            score = evaluate.example_scores(scores_BM, cell, part).sum().clamp(min=0)
            self.sums += torch.stack([loss.detach().float() * len(examples) / labelled, score, score.new_tensor(len(part))])
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1

    def _end_epoch(self) -> None:
        loss_sum, accuracy_sum, examples = self.sums.tolist()
        self.sums.zero_()
        train_loss = loss_sum / examples
        scores = self.evaluate(self.valid_cells)
        valid_loss = scores.mean(scores.loss)
        self.diverged = not (math.isfinite(train_loss) and math.isfinite(valid_loss))
        self.curve.append(
            {
                "epoch": self.epoch + 1,
                "step": self.step,
                "examples": (self.epoch + 1) * sum(len(cell) for cell in self.train_cells),
                "lr": learning_rate(self.spec.train, self.step - 1, self.steps_per_epoch),
                "train_loss": train_loss if math.isfinite(train_loss) else None,
                "train_accuracy": accuracy_sum / examples,
                "valid_loss": valid_loss if math.isfinite(valid_loss) else None,
                "valid_accuracy": scores.mean(scores.accuracy),
                "seconds": self.seconds,
            }
        )

    def evaluate(self, cells: list[DeviceCell]) -> Scores:
        """Scores on a split."""
        return evaluate.evaluate(self.model, cells, self.precision)

    def test(self) -> Scores:
        """Scores on the test split."""
        return evaluate.evaluate_test(self.model, self.task, self.spec.seed, self.device, self.precision)

    def _progress(self) -> Progress:
        loss_sum, accuracy_sum, examples = self.sums.tolist()
        return Progress(self.step, self.steps, self.epoch, loss_sum / max(examples, 1), accuracy_sum / max(examples, 1))

    _resume_rng: dict[str, Tensor] | None = None

    def checkpoint(self) -> dict[str, Any]:
        """Everything that continues the run exactly; tensors, numbers and strings only."""
        rng = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.device)
        return {
            "spec": self.spec.model_dump_json(),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "curve": self.curve,
            "sums": self.sums,
            "rng": rng,
        }

    def restore(self, checkpoint: dict[str, Any]) -> None:
        """Continues from a checkpoint of the same run.

        Raises:
            ValueError: the checkpoint is of another run.
        """
        if checkpoint.get("spec") != self.spec.model_dump_json():
            raise ValueError("the checkpoint belongs to another run")
        self.model.load_state_dict(checkpoint["model"])
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        self.step, self.seconds, self.curve = checkpoint["step"], checkpoint["seconds"], list(checkpoint["curve"])
        self.sums.copy_(checkpoint["sums"])
        self._resume_rng = checkpoint["rng"]

    def _set_rng(self, rng: dict[str, Tensor]) -> None:
        torch.set_rng_state(rng["cpu"].cpu())
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(rng["cuda"].cpu(), self.device)


def resolve_precision(train: TrainSpec, device: torch.device) -> str:
    """Compute precision of a run: "fp32" or "bf16"."""
    if train.precision != "auto":
        return train.precision
    return "bf16" if device.type == "cuda" else "fp32"
