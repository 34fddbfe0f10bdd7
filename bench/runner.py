"""A fleet of runs from specs to stored records: checkpoints, memory, divergence and failure are handled here and nowhere else."""

from __future__ import annotations

import contextlib
import io
import json
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch

from bench.member import Member
from bench.outcome import Clock, Outcome, identity_of, make_record
from bench.records import RunRecord
from bench.spec import RunSpec
from bench.store import Store, atomic_write
from bench.train import FleetTrainer, Interrupted, Progress

MAX_MICRO_BATCHES = 8
PROGRESS_FILE_SECONDS = 2.0


def execute(
    specs: list[RunSpec],
    device: torch.device,
    store: Store,
    *,
    on_progress: Callable[[Progress], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    on_record: Callable[[RunRecord], None] | None = None,
) -> bool:
    """Trains a fleet, or continues its members from their checkpoints, and stores a record for each.

    Members whose checkpoints are at different steps are trained one group after another. A fleet that does not fit the
    memory, or in which something fails, is trained in halves; a single run that does not fit, with its batch in parts.

    Args:
        specs: runs that differ in seed and learning rate only.
        device: where to train.
        store: where records and checkpoints go.
        on_progress: is told now and then how far the fleet is.
        should_stop: asked after every step.
        on_record: is given each record once it is stored.

    Returns:
        Whether all runs have ended; False if `should_stop` interrupted them (checkpoints are stored).
    """
    if device.type == "cuda":
        torch.cuda.init()  # resetting statistics does not, and fails in a fresh process
    job = _Job(device, store, on_progress, should_stop, on_record)
    found = [(spec, _read_checkpoint(store, spec, device)) for spec in specs]
    steps = sorted({_step(checkpoint) for _, checkpoint in found}, reverse=True)
    groups = [[item for item in found if _step(item[1]) == step] for step in steps]
    parts = 1
    while groups:
        group = groups.pop(0)
        try:
            job.train(group, parts)
        except Interrupted as stop:
            job.save(stop.checkpoints)
            return False
        except Exception as error:
            torch.cuda.empty_cache()
            left = [(spec, _read_checkpoint(store, spec, device)) for spec, _ in group if identity_of(spec) not in job.ended]
            memory = isinstance(error, torch.OutOfMemoryError)
            if job.compiled and not memory:
                job.compiled = False
                print(f"Goes on without torch.compile, which failed: {_one_line(error)}", file=sys.stderr)
                groups.insert(0, left)
            elif len(left) > 1:
                half = len(left) // 2
                groups[:0] = [left[:half], left[half:]]
            elif memory and parts < MAX_MICRO_BATCHES:
                parts *= 2
                groups.insert(0, left)
            else:
                job.fail(left[0][0], error, parts)
    return True


Checkpoint = dict[str, Any]


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


class _Job:
    """What `execute` was asked for, and the runs that have ended."""

    def __init__(
        self,
        device: torch.device,
        store: Store,
        on_progress: Callable[[Progress], None] | None,
        should_stop: Callable[[], bool] | None,
        on_record: Callable[[RunRecord], None] | None,
    ) -> None:
        self.device, self.store = device, store
        self.on_progress, self.should_stop, self.on_record = on_progress, should_stop, on_record
        self.compiled = device.type == "cuda" and os.environ.get("BENCH_COMPILE", "1") != "0"
        self.ended: set[str] = set()

    def train(self, group: list[tuple[RunSpec, Checkpoint | None]], parts: int) -> None:
        """Trains a group whose checkpoints are at the same step."""
        specs = [spec for spec, _ in group]
        checkpoints = [checkpoint for _, checkpoint in group if checkpoint is not None]
        clock = Clock(self.device, len(specs))
        trainer = FleetTrainer(specs, self.device, micro_batches=parts, compiled=self.compiled, checkpoints=checkpoints or None)
        # under bf16 autocast the recurrences, which stay in fp32, may round products as TF32 does: finer than bf16
        torch.set_float32_matmul_precision("high" if trainer.precision == "bf16" else "highest")
        report = _progress_reporter(self.store, [identity_of(spec) for spec in specs], self.on_progress)
        for index in trainer.run(on_progress=report, should_stop=self.should_stop, on_checkpoint=self.save):
            outcome = Outcome()
            outcome.finish(trainer, index)
            self._write(trainer.members[index].spec, outcome, clock, parts)

    def save(self, checkpoints: list[Checkpoint]) -> None:
        """Stores the checkpoint of every member that has not ended."""
        for checkpoint in checkpoints:
            identity = identity_of(RunSpec.model_validate_json(checkpoint["spec"]))
            if identity not in self.ended:
                save_checkpoint(self.store, identity, checkpoint)
                _remove(self.store.path(identity) / "progress.json")

    def fail(self, spec: RunSpec, error: Exception, parts: int) -> None:
        """Stores the record of a run that could not be trained."""
        outcome = Outcome()
        if isinstance(error, torch.OutOfMemoryError):
            outcome.status, outcome.reason = "oom", f"out of memory even with the batch in {parts} parts"
        else:
            outcome.status, outcome.reason = "failed", _one_line(error)
            print("".join(traceback.format_exception(error)), file=sys.stderr)
        self._write(spec, outcome, Clock(self.device, 1), parts)

    def _write(self, spec: RunSpec, outcome: Outcome, clock: Clock, parts: int) -> None:
        identity = identity_of(spec)
        record = make_record(spec, self.device, outcome, clock, parts)
        self.store.write(record, outcome.curve, outcome.influence)
        self.ended.add(identity)
        for name in ("checkpoint.pt", "progress.json"):
            _remove(self.store.path(identity) / name)
        if self.on_record is not None:
            self.on_record(record)


def record_death(spec: RunSpec, device: torch.device, store: Store, exit_code: int | None) -> RunRecord:
    """Stores the record of a run whose worker process died on it repeatedly, with no chance to say why."""
    outcome = Outcome()
    signal = f"signal {-exit_code}" if exit_code is not None and exit_code < 0 else f"exit code {exit_code}"
    outcome.status, outcome.reason = "failed", f"its worker process died twice ({signal})"
    record = make_record(spec, device, outcome, Clock(torch.device("cpu"), 1), 1)
    store.write(record)
    return record


def save_checkpoint(store: Store, identity: str, state: dict[str, Any]) -> None:
    """Writes a checkpoint; a reader sees the old one or the new one."""
    folder = store.path(identity)
    folder.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    atomic_write(folder / "checkpoint.pt", buffer.getvalue())


def _read_checkpoint(store: Store, spec: RunSpec, device: torch.device) -> Checkpoint | None:
    """The stored checkpoint of a run if there is a sound one; an unsound one is reported and ignored."""
    path = store.path(identity_of(spec)) / "checkpoint.pt"
    if not path.exists():
        return None
    try:
        checkpoint = torch.load(path, map_location=device, weights_only=True)
        Member.restored(spec, checkpoint)
    except Exception as error:
        print(f"Ignored {path} ({type(error).__name__}: {error}); the run starts from the beginning.", file=sys.stderr)
        return None
    return checkpoint


def _step(checkpoint: Checkpoint | None) -> int:
    return -1 if checkpoint is None else checkpoint["step"]


def _progress_reporter(
    store: Store, identities: list[str], on_progress: Callable[[Progress], None] | None
) -> Callable[[Progress], None]:
    """Passes progress on, and leaves it in the store now and then for `bench status` on any machine."""
    written, began = 0.0, time.time()

    def report(progress: Progress) -> None:
        nonlocal written
        if on_progress is not None:
            on_progress(progress)
        now = time.monotonic()
        if now - written > PROGRESS_FILE_SECONDS:
            written = now
            content = {
                "pid": os.getpid(),
                "host": socket.gethostname(),
                "started": began,
                "time": time.time(),
                **vars(progress),
            }
            for identity in identities:
                folder = store.path(identity)
                if not (folder / "record.json").exists():
                    folder.mkdir(parents=True, exist_ok=True)
                    atomic_write(folder / "progress.json", json.dumps(content).encode())

    return report


def _remove(path: Any) -> None:
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
