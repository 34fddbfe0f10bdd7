"""One run from spec to stored record: checkpoints, memory, divergence and failure are handled here and nowhere else."""

from __future__ import annotations

import contextlib
import io
import json
import os
import platform
import resource
import socket
import sys
import time
import traceback
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import torch

from bench import provenance
from bench.influence import influence_map
from bench.model import LanguageModel
from bench.records import CellInfo, Metric, RunRecord, StateInfo, Status
from bench.spec import RunSpec, run_id
from bench.store import Store, atomic_write
from bench.train import Interrupted, Progress, Scores, Trainer, build_model, build_task, resolve_precision
from synthetic_tasks import SPLITS, Cell, Task, build_split, split_digest

MAX_MICRO_BATCHES = 8
PROGRESS_FILE_SECONDS = 2.0
LINKED_SUITES = ("recall", "mad")
"""Families whose answers stand in the context, so that influence maps can link a query with its answer."""


def execute(
    spec: RunSpec,
    device: torch.device,
    store: Store,
    *,
    on_progress: Callable[[Progress], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> RunRecord | None:
    """Trains a run, or continues it from its checkpoint, and stores its record.

    Returns:
        The record, or None if `should_stop` interrupted the run (its checkpoint is stored).
    """
    identity = run_id(spec, provenance.identity_code(spec))
    began, started = time.monotonic(), datetime.now(UTC).isoformat(timespec="seconds")
    if device.type == "cuda":
        torch.cuda.init()  # resetting statistics does not, and fails in a fresh process
        torch.cuda.reset_peak_memory_stats(device)
    outcome = _Outcome()
    folder = store.path(identity)
    report = _progress_reporter(store, identity, on_progress)
    micro_batches = 1
    while True:
        try:
            trainer = Trainer(spec, device, micro_batches=micro_batches)
            _restore(trainer, store, identity)
            trainer.run(
                on_progress=report,
                should_stop=should_stop,
                on_checkpoint=lambda state: save_checkpoint(store, identity, state),
            )
            outcome.finish(trainer)
        except Interrupted as stop:
            save_checkpoint(store, identity, stop.checkpoint)
            _remove(folder / "progress.json")
            return None
        except torch.OutOfMemoryError as error:
            if micro_batches < MAX_MICRO_BATCHES:
                micro_batches *= 2
                del error
                torch.cuda.empty_cache()
                continue
            outcome.status, outcome.reason = "oom", f"out of memory even with the batch in {micro_batches} parts"
        except Exception as error:
            outcome.status, outcome.reason = "failed", f"{type(error).__name__}: {' '.join(str(error).split())}"
            print(traceback.format_exc(), file=sys.stderr)
        break
    record = _record(spec, identity, device, outcome, started, time.monotonic() - began, micro_batches)
    store.write(record, outcome.curve, outcome.influence)
    for name in ("checkpoint.pt", "progress.json"):
        _remove(folder / name)
    return record


def record_death(spec: RunSpec, device: torch.device, store: Store, exit_code: int | None) -> RunRecord:
    """Stores the record of a run whose worker process died on it repeatedly, with no chance to say why."""
    identity = run_id(spec, provenance.identity_code(spec))
    outcome = _Outcome()
    signal = f"signal {-exit_code}" if exit_code is not None and exit_code < 0 else f"exit code {exit_code}"
    outcome.status, outcome.reason = "failed", f"its worker process died twice ({signal})"
    started = datetime.now(UTC).isoformat(timespec="seconds")
    record = _record(spec, identity, device, outcome, started, 0.0, 1)
    store.write(record)
    return record


class _Outcome:
    """What a run has to show so far."""

    def __init__(self) -> None:
        self.status: Status = "done"
        self.reason = ""
        self.curve: list[dict[str, float | int | None]] = []
        self.metrics: list[Metric] = []
        self.influence: dict[str, Any] | None = None
        self.epochs = self.steps = 0
        self.seconds = 0.0
        self.examples_per_second: float | None = None

    def finish(self, trainer: Trainer) -> None:
        """Takes over a trained model: final validation and test scores, and its influence map."""
        self.curve, self.epochs, self.steps = trainer.curve, trainer.epoch, trainer.step
        self.seconds = trainer.seconds
        examples = self.epochs * sum(len(cell) for cell in trainer.train_cells)
        self.examples_per_second = examples / trainer.seconds if trainer.seconds else None
        if trainer.diverged:
            self.status = "diverged"
            self.reason = f"loss was not finite in epoch {self.epochs} at lr {trainer.spec.train.lr:g}"
            return
        self.metrics = _metrics("valid", trainer.evaluate(trainer.valid_cells))
        if trainer.spec.role == "report":
            self.metrics += _metrics("test", trainer.test())
        if trainer.spec.seed == 0:
            first = trainer.task.cells("test")[0]
            batch = build_split(trainer.task, "test", trainer.spec.seed)[first.name]
            task = trainer.task
            links = task.suite in LINKED_SUITES and task.input_kind == "tokens" and task.readout == "positions"
            self.influence = influence_map(trainer.model, batch, trainer.device, links=links)


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


def _record(
    spec: RunSpec, identity: str, device: torch.device, outcome: _Outcome, started: str, wall: float, micro_batches: int
) -> RunRecord:
    task = build_task(spec.task)
    model = build_model(spec, task, torch.device("meta"))
    precision = resolve_precision(spec.train, device)
    return RunRecord(
        run_id=identity,
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
        data_hashes={split: split_digest(build_split(task, split, spec.seed)) for split in SPLITS},
        device=str(device),
        precision=precision,
        backend="torch",
        micro_batches=micro_batches,
        epochs_run=outcome.epochs,
        steps_run=outcome.steps,
        started=started,
        train_seconds=outcome.seconds,
        wall_seconds=wall,
        examples_per_second=outcome.examples_per_second,
        peak_memory_bytes=_peak_memory(device),
        provenance=provenance.collect(spec, hardware(device)),
    )


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


def save_checkpoint(store: Store, identity: str, state: dict[str, Any]) -> None:
    """Writes a checkpoint; a reader sees the old one or the new one."""
    folder = store.path(identity)
    folder.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    atomic_write(folder / "checkpoint.pt", buffer.getvalue())


def _restore(trainer: Trainer, store: Store, identity: str) -> None:
    """Continues from the stored checkpoint if there is a sound one; an unsound one is reported and ignored."""
    path = store.path(identity) / "checkpoint.pt"
    if not path.exists():
        return
    try:
        trainer.restore(torch.load(path, map_location=trainer.device, weights_only=True))
    except Exception as error:
        print(f"Ignored {path} ({type(error).__name__}: {error}); the run starts from the beginning.", file=sys.stderr)
        fresh = Trainer(trainer.spec, trainer.device, micro_batches=trainer.micro_batches)
        trainer.__dict__.update(fresh.__dict__)


def _progress_reporter(store: Store, identity: str, on_progress: Callable[[Progress], None] | None) -> Callable[[Progress], None]:
    """Passes progress on, and leaves it in the store now and then for `bench status` on any machine."""
    written, began = 0.0, time.time()

    def report(progress: Progress) -> None:
        nonlocal written
        if on_progress is not None:
            on_progress(progress)
        now = time.monotonic()
        if now - written > PROGRESS_FILE_SECONDS:
            written = now
            folder = store.path(identity)
            folder.mkdir(parents=True, exist_ok=True)
            content = {
                "pid": os.getpid(),
                "host": socket.gethostname(),
                "started": began,
                "time": time.time(),
                **vars(progress),
            }
            atomic_write(folder / "progress.json", json.dumps(content).encode())

    return report


def _remove(path: Any) -> None:
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
