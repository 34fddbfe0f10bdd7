"""Where fleets are trained: worker processes of this machine, a Ray cluster, or Slurm. Nothing here imports torch.

All three are the same to a driver, which hands out fleets and listens. Workers claim runs, train and store by themselves, so
whatever is killed, the store holds the truth and the same command goes on from it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from bench.errors import Fault
from bench.spec import RunSpec

STOP_SECONDS = 60.0
"""Time that workers get to save checkpoints."""

Fleet = tuple[RunSpec, ...]
"""Runs that are trained together: equal but for seed and learning rate."""


class LaunchError(Fault):
    """The engine cannot train anything: nothing was lost, and the fault is not a run's."""


@dataclass(frozen=True)
class Event:
    """Something that happened to a fleet.

    Args:
        kind: "progress" (content: `train.Progress`), "record" (content: the record of a run that has ended), "held" (content:
            the spec of a run that another process trains), "note" (content: a sentence), "finished" (the fleet is over),
            "died" (content: how its worker ended), "lost" (the same, and it was no fault of the fleet's: a host went away), or
            "broken" (content: the error that stops the sweep).
        fleet: the runs that the worker was given.
    """

    kind: str
    fleet: Fleet
    content: Any = None


class Workers(ABC):
    """What trains fleets; use it as a context manager."""

    device: str
    """Where fleets compute: "cpu", "cuda" or "cuda:<index>"."""

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @abstractmethod
    def idle(self) -> int:
        """Fleets that could be submitted now."""

    @abstractmethod
    def busy(self) -> set[RunSpec]:
        """Runs of the fleets in flight."""

    @abstractmethod
    def submit(self, fleet: Fleet, outdated: Mapping[str, str]) -> None:
        """Hands over a fleet.

        Args:
            fleet: at least one run.
            outdated: digests of records that are to be replaced, by run.
        """

    @abstractmethod
    def events(self, timeout: float) -> Iterator[Event]:
        """What has happened, waiting at most `timeout` seconds for the first word."""

    @abstractmethod
    def stop(self) -> None:
        """Asks every worker to save a checkpoint and leave; ends those that do not within a minute."""
