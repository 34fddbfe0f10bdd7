"""What a finished run has to show: its outcome, and the record made of it."""

from __future__ import annotations

import platform
import resource
import sys
import time
from datetime import UTC, datetime
from typing import Any

import torch

from bench import provenance
from bench.build import build_model, build_task, resolve_precision
from bench.evaluate import Scores
from bench.influence import influence_map
from bench.member import CurvePoint
from bench.model import LanguageModel
from bench.records import CellInfo, Metric, RunRecord, StateInfo, Status
from bench.spec import RunSpec, run_id
from bench.train import FleetTrainer
from synthetic_tasks import SPLITS, Cell, Task, build_split, split_hash

LINKED_SUITES = ("recall", "mad")
"""Families whose answers stand in the context, so that influence maps can link a query with its answer."""


def identity_of(spec: RunSpec) -> str:
    """A run's identity with the code as it is now."""
    return run_id(spec, provenance.identity_code(spec))


class Clock:
    """When a fleet began, and how large it was."""

    def __init__(self, device: torch.device, members: int) -> None:
        self.members, self.began = members, time.monotonic()
        self.started = datetime.now(UTC).isoformat(timespec="seconds")
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def seconds(self) -> float:
        """Seconds since the fleet began."""
        return time.monotonic() - self.began


class Outcome:
    """What a run has to show so far."""

    def __init__(self) -> None:
        self.status: Status = "done"
        self.reason = ""
        self.execution = "eager"
        self.curve: list[CurvePoint] = []
        self.metrics: list[Metric] = []
        self.influence: dict[str, Any] | None = None
        self.epochs = self.steps = 0
        self.seconds = 0.0
        self.examples_per_second: float | None = None

    def finish(self, trainer: FleetTrainer, index: int) -> None:
        """Takes over a member that has ended: its last validation, its test scores, and its influence map."""
        member = trainer.members[index]
        self.curve, self.epochs, self.steps = member.curve, member.epoch, member.epoch * trainer.steps_per_epoch
        self.seconds, self.execution = member.seconds, trainer.execution
        self.examples_per_second = self.epochs * sum(trainer.sizes) / member.seconds if member.seconds else None
        if member.diverged:
            self.status = "diverged"
            self.reason = f"loss was not finite in epoch {self.epochs} at lr {member.spec.train.lr:g}"
            return
        assert member.valid is not None
        self.metrics = _metrics("valid", member.valid) + _metrics("test", trainer.test(index))
        if member.spec.seed == 0:
            task = trainer.task
            first = task.cells("test")[0]
            batch = build_split(task, "test", member.spec.seed)[first.name]
            links = task.suite in LINKED_SUITES and task.input_kind == "tokens" and task.readout == "positions"
            self.influence = influence_map(trainer.fleet.model.member(index), batch, trainer.device, links=links)


def _metrics(split: Any, scores: Scores) -> list[Metric]:
    total = sum(scores.examples.values())
    metrics = [
        Metric(split=split, name="accuracy", slice="mean", value=scores.mean(scores.accuracy), n=total),
        Metric(split=split, name="loss", slice="mean", value=scores.mean(scores.loss), n=total),
    ]
    for cell, value in scores.accuracy.items():
        n, error = scores.examples[cell], scores.stderr[cell]
        metrics.append(Metric(split=split, name="accuracy", slice=cell, value=value, n=n, stderr=error, stderr_kind="examples"))
    for name, value in scores.groups.items():
        metrics.append(Metric(split=split, name="accuracy", slice=name, value=value, n=scores.examples[name.partition("/")[0]]))
    named = {(f"rate:{lure}", cell): value for (lure, cell), value in scores.lures.items()} | scores.extra
    for (name, cell), value in named.items():
        metrics.append(Metric(split=split, name=name, slice=cell, value=value, n=scores.examples[cell]))
    for name in dict.fromkeys(name for name, _ in named):
        found = {cell: value for (other, cell), value in named.items() if other == name}
        n = sum(scores.examples[cell] for cell in found)
        metrics.append(Metric(split=split, name=name, slice="mean", value=scores.mean(found), n=n))
    return metrics


def state_info(model: LanguageModel, task: Task, precision: str) -> StateInfo:
    """State per sequence at the longest test length, in the precision that the run computes in."""
    length = max(cell.length for cell in task.cells("test"))
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    true, published, read = model.state_bytes(length, dtype)
    return StateInfo(
        seq_len=length, dtype=str(dtype).removeprefix("torch."), true_bytes=true, published_bytes=published, read_bytes=read
    )


def cell_info(task: Task, cell: Cell) -> CellInfo:
    """A test cell as it is recorded; ceilings that are squared errors become scores like the model's own."""
    ceilings = task.ceilings(cell)
    if task.target_kind == "real":
        ceilings = {name: max(0.0, 1 - error / ceilings["predict zero"]) for name, error in ceilings.items()}
    return CellInfo(
        name=cell.name,
        axes=dict(cell.axes),
        ceilings=ceilings,
        bits_needed=task.bits_needed(cell),
        trained=task.trained(cell),
    )


def make_record(spec: RunSpec, device: torch.device, outcome: Outcome, clock: Clock, micro_batches: int) -> RunRecord:
    """The record of a run that has ended."""
    task = build_task(spec.task)
    model = build_model(spec, task, torch.device("meta"))
    precision = resolve_precision(spec.train, device)
    return RunRecord(
        run_id=identity_of(spec),
        spec=spec,
        role=spec.role,
        status=outcome.status,
        reason=outcome.reason,
        mixer=spec.model.mixer(),
        label=spec.model.label(),
        parameters=sum(p.numel() for p in model.parameters()),
        state=state_info(model, task, precision),
        family=task.suite,
        cells=[cell_info(task, cell) for cell in task.cells("test")],
        metrics=outcome.metrics,
        data_hashes=_data_hashes(task, spec.seed, whole=outcome.status != "failed"),
        device=str(device),
        precision=precision,
        backend="triton where it fits" if device.type == "cuda" else "torch",
        execution=outcome.execution,
        fleet_size=clock.members,
        micro_batches=micro_batches,
        epochs_run=outcome.epochs,
        steps_run=outcome.steps,
        started=clock.started,
        train_seconds=outcome.seconds,
        wall_seconds=clock.seconds(),
        examples_per_second=outcome.examples_per_second,
        peak_memory_bytes=_peak_memory(device),
        provenance=provenance.collect(spec, hardware(device)),
    )


def _data_hashes(task: Task, seed: int, *, whole: bool) -> dict[str, str]:
    """Digests of the splits; unless `whole`, of those that can be drawn, since a run may have failed because one cannot."""
    hashes: dict[str, str] = {}
    for split in SPLITS:
        try:
            hashes[split] = split_hash(task, split, seed)
        except Exception:
            if whole:
                raise
    return hashes


def hardware(device: torch.device) -> dict[str, str]:
    """Names of the CPU, the GPU if one is used, and the platform."""
    found = {"cpu": provenance.cpu_name(), "platform": platform.platform(), "threads": str(torch.get_num_threads())}
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
        found["gpus"] = str(torch.cuda.device_count())
        found["cuda"] = str(torch.version.cuda)
    return found


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
