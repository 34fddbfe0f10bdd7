"""Fleets as jobs of a cluster's engine. A job is told what to train and trains it; what it does is read from the store.

The driver and its jobs share one folder, the store, and the driver's file in it (`bench.announce`): a job that does not see the
folder says so, and a job whose driver's file was taken away saves checkpoints and leaves. A killed driver leaves its file, so
jobs that the engine keeps go on, and the next driver waits for what they hold.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from bench.claims import holder
from bench.errors import UserError
from bench.launch import STOP_SECONDS, Event, Fleet, LaunchError, Workers
from bench.launch.handed import pack, unpack
from bench.spec import RunSpec
from bench.store import Store

STOP_CHECK_SECONDS = 5.0
RECORD_CHECK_SECONDS = 5.0
PASSED_ON = ("BENCH_", "OMP_", "TRITON_", "TORCH")
"""What the names of environment variables start with that jobs get from the driver."""


@dataclass
class Said:
    """What a job leaves for its driver, besides records.

    Args:
        held: indices of the runs that another process trains.
        notes: sentences for people.
        fault: what stops the sweep, one sentence; empty if nothing does.
    """

    held: list[int] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    fault: str = ""


@dataclass
class Job:
    """A fleet with all that a process on another host needs to train it; a call trains it.

    Args:
        runs: specs as JSON, by the identity that they have for the driver.
        outdated: digests of records that are to be replaced, by run.
        device: "cpu" or "cuda".
        threads: CPU threads.
        store: folder of the store, absolute.
        sweep: the driver's file in the store.
        folder: the driver's working folder, for mixers from loose files.
        environment: variables to set.
    """

    runs: dict[str, str]
    outdated: dict[str, str]
    device: str
    threads: int
    store: str
    sweep: str
    folder: str = field(default_factory=os.getcwd)
    environment: dict[str, str] = field(
        default_factory=lambda: {key: value for key, value in os.environ.items() if key.startswith(PASSED_ON)}
    )

    def __call__(self) -> Said:
        """Trains the fleet in this process."""
        os.environ.update(self.environment)
        with contextlib.suppress(OSError):
            os.chdir(self.folder)
        try:
            return self._train(self._specs()) if Path(self.sweep).exists() else self._without_sweep()
        except UserError as error:
            return Said(fault=str(error))

    def checkpoint(self) -> Any:
        """What submitit queues again when a job is preempted or out of time: the same, since checkpoints are in the store."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)

    def _without_sweep(self) -> Said:
        if Path(self.store).is_dir():
            return Said()  # the driver was told to stop before this job began
        raise LaunchError(f"{socket.gethostname()} does not see the store {self.store}; choose a folder that all hosts share.")

    def _specs(self) -> list[RunSpec]:
        host = socket.gethostname()
        return unpack(self.runs, host + " has other code of {code} than the driver's host; install the same version on all hosts.")

    def _train(self, specs: list[RunSpec]) -> Said:
        import torch

        from bench.runner import execute

        said, asked, stopped = Said(), time.monotonic(), False

        def tell(kind: str, content: Any) -> None:
            if kind == "held":
                said.held.append(specs.index(content))
            elif kind == "note":
                said.notes.append(content)

        def should_stop() -> bool:
            nonlocal asked, stopped
            if time.monotonic() - asked > STOP_CHECK_SECONDS:
                asked, stopped = time.monotonic(), not Path(self.sweep).exists()
            return stopped

        torch.set_num_threads(self.threads)
        torch.set_flush_denormal(True)  # as local workers do
        device, store = torch.device(self.device), Store(Path(self.store))
        execute(specs, device, store, tell=tell, should_stop=should_stop, outdated=self.outdated)
        return said


@dataclass(frozen=True)
class End:
    """How a job ended.

    Args:
        said: its last words; None if it was killed.
        reason: what the engine says of a killed job.
        blameless: whether it was killed for reasons that are not its own, such as a host that went away.
    """

    said: Said | None
    reason: str = ""
    blameless: bool = False


Handle = TypeVar("Handle")


@dataclass
class _Flight(Generic[Handle]):
    fleet: Fleet
    runs: dict[str, RunSpec]
    outdated: Mapping[str, str]
    handle: Handle
    told: set[str] = field(default_factory=set)
    looked: float = 0.0
    heard: float = 0.0


class RemoteWorkers(Workers, Generic[Handle]):
    """Fleets in flight on an engine.

    Args:
        device: "cpu" or "cuda".
        threads: CPU threads of a fleet.
        store: folder of the store.
        sweep: the driver's file in the store.
    """

    def __init__(self, device: str, threads: int, store: Path, sweep: Path) -> None:
        self.device, self.threads, self.store, self.sweep = device, threads, Store(store.resolve()), sweep
        self.flights: list[_Flight[Handle]] = []

    @abstractmethod
    def slots(self) -> int:
        """Fleets that may be in flight."""

    @abstractmethod
    def start(self, job: Job) -> Handle:
        """Gives a job to the engine."""

    @abstractmethod
    def ended(self, handle: Handle) -> End | None:
        """How a job ended, or None; answers at once.

        Raises:
            LaunchError: it could not run at all.
        """

    @abstractmethod
    def cancel(self, handle: Handle) -> None:
        """Ends a job, or keeps it from starting."""

    def close(self) -> None:
        """Gives back what the engine lent."""

    def idle(self) -> int:
        """Fleets that could be submitted now."""
        return max(0, self.slots() - len(self.flights))

    def busy(self) -> set[RunSpec]:
        """Runs of the fleets in flight."""
        return set().union(*(flight.fleet for flight in self.flights))

    def submit(self, fleet: Fleet, outdated: Mapping[str, str]) -> None:
        """Hands a fleet to the engine."""
        texts = pack(fleet)
        runs = dict(zip(texts, fleet, strict=True))
        job = Job(texts, dict(outdated), self.device, self.threads, str(self.store.root), str(self.sweep))
        self.flights.append(_Flight(fleet, runs, outdated, self.start(job)))

    def events(self, timeout: float) -> Iterator[Event]:
        """What has happened in the store and in the engine."""
        time.sleep(timeout)
        for flight in list(self.flights):
            end = self.ended(flight.handle)  # before the store is read: what an ended job wrote is there
            yield from self._news(flight, ended=end is not None)
            if end is not None:
                self.flights.remove(flight)
                yield from _last_words(flight, end)

    def _news(self, flight: _Flight[Handle], *, ended: bool) -> Iterator[Event]:
        """New records of a fleet, and its newest progress."""
        now = time.monotonic()
        if ended or now - flight.looked > RECORD_CHECK_SECONDS:
            flight.looked = now
            for identity in flight.runs.keys() - flight.told:
                record = self.store.read(identity)
                if record is not None and record.digest() != flight.outdated.get(identity):
                    flight.told.add(identity)
                    yield Event("record", flight.fleet, record)
        for identity in flight.runs.keys() - flight.told:
            with contextlib.suppress(OSError, ValueError):
                content = json.loads((self.store.path(identity) / "progress.json").read_text())
                if content["time"] > flight.heard:
                    flight.heard = content["time"]
                    yield Event("progress", flight.fleet, _progress(content))
            return  # members progress together, so one tells of all

    def stop(self) -> None:
        """Takes the driver's file away, waits until jobs have left, and cancels the rest after a minute."""
        try:
            self.sweep.unlink(missing_ok=True)
            deadline = time.monotonic() + STOP_SECONDS
            leaving = [flight for flight in self.flights if any(holder(self.store, identity) for identity in flight.runs)]
            while leaving and time.monotonic() < deadline:
                time.sleep(0.2)
                leaving = [flight for flight in leaving if not self._over(flight.handle)]
            for flight in self.flights:
                if not self._over(flight.handle):
                    self.cancel(flight.handle)
        finally:
            self.flights = []
            self.close()

    def _over(self, handle: Handle) -> bool:
        """Whether a job has ended, be it that it could not run at all: the others are to be ended all the same."""
        try:
            return self.ended(handle) is not None
        except LaunchError:
            return True


def _last_words(flight: _Flight[Any], end: End) -> Iterator[Event]:
    """What a driver is to know of a job that has ended."""
    if end.said is None:
        yield Event("lost" if end.blameless else "died", flight.fleet, end.reason)
        return
    for note in end.said.notes:
        yield Event("note", flight.fleet, note)
    for index in end.said.held:
        yield Event("held", flight.fleet, list(flight.runs.values())[index])
    if end.said.fault:
        yield Event("broken", flight.fleet, LaunchError(end.said.fault))
    yield Event("finished", flight.fleet)


def _progress(content: dict[str, Any]) -> Any:
    from bench.train import Progress

    return Progress(**{name: content[name] for name in Progress.__dataclass_fields__})


def choose_device(engine: str, device: str, gpus: float | None, present: int) -> tuple[str, float]:
    """Where fleets compute, "cpu" or "cuda", and the GPUs that each gets.

    Args:
        engine: its name.
        device: "auto", "cpu" or "cuda".
        gpus: the option of that name.
        present: GPUs that are known to be there.

    Raises:
        UserError: the choices exclude each other.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device {device} is a device of this host; with --launch {engine} choose auto, cpu or cuda.")
    if device == "auto":
        device = "cuda" if (present if gpus is None else gpus) else "cpu"
    gpus = gpus if gpus is not None else float(device == "cuda")
    if (device == "cuda") != (gpus > 0):
        raise UserError(f"--device {device} and --launch {engine}:gpus={gpus:g} exclude each other; leave one of them out.")
    return device, gpus
