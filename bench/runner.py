"""A fleet of runs from specs to stored records: checkpoints, memory, divergence and failure are handled here and nowhere else."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from bench.checkpoints import Checkpoint, packed, unpacked
from bench.claims import Claims
from bench.device import compiles
from bench.failures import Failure, Patience, free_memory, lack_of_memory, leave_if_broken, one_line
from bench.member import Member
from bench.outcome import Clock, Outcome, identity_of, make_record
from bench.records import RunRecord
from bench.spec import RunSpec
from bench.store import Store, StoreError
from bench.train import FleetTrainer, Interrupted, Progress, execution
from bench.turns import Turn

MAX_MICRO_BATCHES = 8
PROGRESS_FILE_SECONDS = 2.0
CHECKPOINT_SECONDS = 60.0
"""Training that a killed process loses at most; `BENCH_CHECKPOINT_SECONDS` changes it."""
Tell = Callable[[str, Any], None]


def execute(
    specs: list[RunSpec],
    device: torch.device,
    store: Store,
    *,
    tell: Tell | None = None,
    should_stop: Callable[[], bool] | None = None,
    outdated: Mapping[str, str] | None = None,
) -> bool:
    """Trains a fleet, or continues its members from their checkpoints, and stores a record for each.

    A run is claimed first, so that no other process trains it at the same time, and left alone if its record is there already.
    Members whose checkpoints are at different steps are trained one group after another. A fleet that does not fit the
    memory, or in which something fails, is trained in halves; a single run that does not fit, with its batch in parts. Where
    other processes hold memory of the same GPU, it first waits for theirs, a few times.

    Args:
        specs: runs that differ in seed and learning rate only.
        device: where to train.
        store: where records and checkpoints go.
        tell: is called with a kind and its content: "progress" and a `Progress`, "record" and a record once it is stored,
            "held" and the spec of a run that another process trains, "note" and a sentence.
        should_stop: asked after every step.
        outdated: digests of records that are to be replaced, by run.

    Returns:
        Whether all runs have ended or are held by others; False if `should_stop` interrupted them, or another process took
        one over because this one slept (checkpoints are stored).

    Raises:
        StoreError: the store cannot be written; what was stored before is kept.
    """
    if device.type == "cuda":
        torch.cuda.init()  # resetting statistics does not, and fails in a fresh process
        torch.cuda.set_device(device.index or 0)  # graphs are captured on a stream of the current device
    with Claims(store) as claims:
        job = _Job(device, store, claims, tell or _say_notes, should_stop or (lambda: False))
        return job.run([spec for spec in specs if job.begin(spec, (outdated or {}).get(identity_of(spec)))])


def _say_notes(kind: str, content: Any) -> None:
    if kind == "note":
        print(content, file=sys.stderr)


class _Job:
    """What `execute` was asked for, and the runs that have ended."""

    def __init__(self, device: torch.device, store: Store, claims: Claims, tell: Tell, should_stop: Callable[[], bool]) -> None:
        self.device, self.store, self.claims, self.tell, self.should_stop = device, store, claims, tell, should_stop
        self.compiled = compiles(device.type)
        self.patience = Patience(device, self.stops)
        self.clock = Clock(device, 1)
        self.ended: set[str] = set()
        self.unsound: set[str] = set()

    def begin(self, spec: RunSpec, outdated: str | None) -> bool:
        """Claims a run; False if another process holds it, or its record is there and not the outdated one."""
        identity = identity_of(spec)
        if not self.claims.take(identity):
            self.tell("held", spec)
            return False
        record = self.store.read(identity)
        if record is None or record.digest() == outdated:
            return True
        self._close(identity)
        self.tell("record", record)
        return False

    def run(self, specs: list[RunSpec]) -> bool:
        """Trains claimed runs; whether all have ended."""
        found = [(spec, self._checkpoint(spec)) for spec in specs]
        steps = sorted({_step(checkpoint) for _, checkpoint in found}, reverse=True)
        groups = [[item for item in found if _step(item[1]) == step] for step in steps]
        parts = 1
        while groups:
            group = groups.pop(0)
            try:
                failure = self.attempt(group, parts)
            except Interrupted as stop:
                self.save(stop.checkpoints)
                return False
            free_memory(self.device)
            if failure is None:
                continue
            left = [(spec, self._checkpoint(spec)) for spec, _ in group if identity_of(spec) not in self.ended]
            if self.compiled and not failure.memory:
                self.compiled = False
                self.tell("note", f"Goes on without torch.compile, which failed: {failure.words}")
                groups.insert(0, left)
            elif (failure.memory and self.patience.made_room()) or 0 < len(left) < len(group):
                groups.insert(0, left)  # there is room now, or the failure may have been that of a run that has ended
            elif len(left) > 1:
                half = len(left) // 2
                groups[:0] = [left[:half], left[half:]]
            elif failure.memory and parts < MAX_MICRO_BATCHES:
                parts *= 2
                groups.insert(0, left)
            elif left:
                self.fail(left[0][0], failure, parts)
                parts = 1  # the next run may find more room
        return True

    def stops(self) -> bool:
        """Whether to leave: somebody wants it, or a claim was lost."""
        return self.should_stop() or self.claims.lost()

    def attempt(self, group: list[tuple[RunSpec, Checkpoint | None]], parts: int) -> Failure | None:
        """Trains a group; what went wrong."""
        try:
            self.train(group, parts)
        except (Interrupted, StoreError):
            raise
        except Exception as error:
            failure = Failure.of(error)
            leave_if_broken(self.device, failure)
            return failure
        return None

    def train(self, group: list[tuple[RunSpec, Checkpoint | None]], parts: int) -> None:
        """Trains a group whose checkpoints are at the same step."""
        specs = [spec for spec, _ in group]
        checkpoints = [checkpoint for _, checkpoint in group if checkpoint is not None]
        self.clock = Clock(self.device, len(specs))
        trainer = FleetTrainer(specs, self.device, micro_batches=parts, compiled=self.compiled, checkpoints=checkpoints or None)
        # under bf16 autocast the recurrences, which stay in fp32, may round products as TF32 does: finer than bf16
        torch.set_float32_matmul_precision("high" if trainer.precision == "bf16" else "highest")
        report = _progress_reporter(self.store, specs, trainer.step, self.tell)
        seconds = float(os.environ.get("BENCH_CHECKPOINT_SECONDS", CHECKPOINT_SECONDS))
        calls = {"on_progress": report, "should_stop": self.stops, "on_checkpoint": self.save}
        with Turn.on(self.device) if self.compiled else contextlib.nullcontext() as turn:
            for index in trainer.run(**calls, checkpoint_seconds=seconds, turn=turn):
                outcome = Outcome()
                outcome.finish(trainer, index)
                self._write(trainer.members[index].spec, outcome, parts)

    def save(self, checkpoints: list[Checkpoint]) -> None:
        """Stores the checkpoint of every member that has not ended and is still ours."""
        for checkpoint in checkpoints:
            identity = identity_of(RunSpec.model_validate_json(checkpoint["spec"]))
            if self.claims.holds(identity):
                self.store.put(identity, "checkpoint.pt", packed(checkpoint))

    def fail(self, spec: RunSpec, failure: Failure, parts: int) -> None:
        """Stores the record of a run that could not be trained."""
        outcome = Outcome()
        outcome.execution = execution(self.device, compiled=self.compiled)
        if failure.memory:
            outcome.status, outcome.reason = "oom", lack_of_memory(self.device, failure, parts)
        else:
            outcome.status, outcome.reason = "failed", failure.words
            print(failure.trace, file=sys.stderr)
        self._write(spec, outcome, parts)

    def _write(self, spec: RunSpec, outcome: Outcome, parts: int) -> None:
        identity = identity_of(spec)
        if not self.claims.holds(identity):
            self.ended.add(identity)
            return
        record = make_record(spec, self.device, outcome, self.clock, parts)
        self.store.write(record, outcome.curve, outcome.influence)
        self.ended.add(identity)  # not before: what fails until here is this run's failure, and no neighbour's
        self._close(identity)
        self.tell("record", record)

    def _close(self, identity: str) -> None:
        """Leaves nothing but the record, its curve and its map; not what killed processes were writing either."""
        folder = self.store.path(identity)
        for path in (folder / "checkpoint.pt", folder / "progress.json", *folder.glob(".*")):
            _remove(path)
        self.claims.drop(identity)

    def _checkpoint(self, spec: RunSpec) -> Checkpoint | None:
        """The stored checkpoint of a run if there is a sound one; an unsound one is reported once and ignored."""
        path = self.store.path(identity_of(spec)) / "checkpoint.pt"
        if not path.exists():
            return None
        try:
            checkpoint = unpacked(path.read_bytes())  # kept for as long as the job: a device gets its numbers with the fleet
            Member.restored(spec, checkpoint)
        except Exception as error:
            if path.parent.name not in self.unsound:
                self.unsound.add(path.parent.name)
                self.tell("note", f"Ignored {path} ({one_line(error)}); the run starts from the beginning.")
            return None
        return checkpoint


def record_death(spec: RunSpec, device: torch.device, store: Store, reason: str, outdated: str | None = None) -> RunRecord | None:
    """Stores the record of a run whose workers died on it repeatedly, with no chance to say why.

    Args:
        spec: the run.
        device: where it was trained.
        store: where the record goes.
        reason: how the last worker ended.
        outdated: digest of a record that does not count, as for `execute`.

    Returns:
        The record, that of another process if it has trained the run meanwhile, or None if one still does.
    """
    identity = identity_of(spec)
    with Claims(store) as claims:
        if not claims.take(identity):
            return None
        found = store.read(identity)
        if found is not None and found.digest() != outdated:
            claims.drop(identity)
            return found
        outcome = Outcome()
        outcome.status, outcome.reason = "failed", f"its worker process died twice ({reason})"
        record = make_record(spec, device, outcome, Clock(torch.device("cpu"), 1), 1)
        store.write(record)
        claims.drop(identity)
    return record


def _step(checkpoint: Checkpoint | None) -> int:
    return -1 if checkpoint is None else checkpoint["step"]


def _progress_reporter(store: Store, specs: list[RunSpec], first: int, tell: Tell) -> Callable[[Progress], None]:
    """Passes progress on, and leaves it in the store now and then for other machines and `bench status`."""
    written, began = 0.0, time.time()
    names = {identity_of(spec): f"{spec.task.name} {spec.name()}" for spec in specs}

    def report(progress: Progress) -> None:
        nonlocal written
        tell("progress", progress)
        now = time.monotonic()
        if now - written > PROGRESS_FILE_SECONDS:
            written = now
            about = {"pid": os.getpid(), "host": socket.gethostname(), "started": began, "time": time.time()}
            about |= {"first": first, **vars(progress)}
            for identity, name in names.items():
                if not (store.path(identity) / "record.json").exists():
                    store.put(identity, "progress.json", json.dumps({"run": name, **about}).encode())

    return report


def _remove(path: Any) -> None:
    with contextlib.suppress(OSError):  # the record is stored; what cannot be removed harms nobody
        path.unlink()
