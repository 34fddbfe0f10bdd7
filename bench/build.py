"""From specs to live objects: the task, the model with its seeded weights, the precision."""

from __future__ import annotations

import torch

from bench import catalog
from bench.errors import UserError
from bench.model import LanguageModel
from bench.spec import RunSpec, TaskSpec, TrainSpec
from synthetic_tasks import Task, stream


def build_task(spec: TaskSpec) -> Task:
    """A task from its spec.

    Raises:
        UserError: unknown task or option, or options that the task refuses.
    """
    cls = catalog.load("task", spec.name)
    options = catalog.check_options("task", spec.name, cls, spec.options)
    try:
        return cls(**options)
    except (ValueError, ArithmeticError, MemoryError) as error:
        raise UserError(f"Task {spec.name}: {error}") from error


def build_model(spec: RunSpec, task: Task, device: torch.device) -> LanguageModel:
    """The run's model with the weights that its seed decides; the caller's random state is left alone."""
    place = torch.device("meta" if device.type == "meta" else "cpu")  # drawn on the CPU, so every device starts alike
    with torch.random.fork_rng(devices=[]), place:
        torch.manual_seed(torch_seed(spec.seed, "init"))
        model = LanguageModel(spec.model, task)
    return model.to(device)


def torch_seed(seed: int, purpose: str) -> int:
    """Seed of a torch generator for a named purpose."""
    return int(stream(seed, purpose).integers(2**62))


def resolve_precision(train: TrainSpec, device: torch.device) -> str:
    """Compute precision of a run: "fp32" or "bf16"."""
    if train.precision != "auto":
        return train.precision
    return "bf16" if device.type == "cuda" else "fp32"
