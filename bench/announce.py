"""Drivers at work, each with a file in the store: what others see of it, and what the jobs that it started elsewhere watch.

It is STORE/.sweeps/<token>.json: touched while the driver lives, removed when it ends or is told to stop.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ValidationError

from bench.claims import EXPIRY_SECONDS, Owner, this_process
from bench.store import Store, StoreError, atomic_write

BEAT_SECONDS = 5.0


class Sweeping(BaseModel):
    """What a driver says of itself."""

    owner: Owner
    command: str
    launch: str
    """Where its fleets train."""
    started: float
    total: int
    """Runs that were missing when it began."""
    finished: int = 0


class SweepFile:
    """A driver's file; use it as a context manager.

    Args:
        store: the store.
        command: the command as typed.
        launch: where fleets train.
        total: runs to do.
    """

    def __init__(self, store: Store, command: str, launch: str, total: int) -> None:
        owner = this_process()
        self.path = store.root.resolve() / ".sweeps" / f"{secrets.token_hex(6)}.json"
        self.content = Sweeping(owner=owner, command=command, launch=launch, started=time.time(), total=total)
        self._written = 0.0

    def __enter__(self) -> SweepFile:
        self.beat()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:  # everything is done, also what earlier drivers of the same command left when they were killed
            for other in _read_all(self.path.parent):
                if other.sweeping.command == self.content.command and not other.alive:
                    other.path.unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # others are at work
            self.path.parent.rmdir()

    def beat(self, finished: int = 0) -> None:
        """Says that the driver lives, and how many runs are done.

        Raises:
            StoreError: the file cannot be written.
        """
        if finished == self.content.finished and time.monotonic() - self._written < BEAT_SECONDS and self._written:
            return
        self._written, self.content.finished = time.monotonic(), finished
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(self.path, self.content.model_dump_json().encode())
        except OSError as error:
            raise StoreError.of(self.path, error) from error


@dataclass(frozen=True)
class Found:
    """A driver's file as others read it."""

    path: Path
    sweeping: Sweeping
    alive: bool


def sweeps(store: Store) -> list[Found]:
    """Every driver of a store that is at work, or was killed, oldest first."""
    return sorted(_read_all(store.root / ".sweeps"), key=lambda found: found.sweeping.started)


def _read_all(folder: Path) -> list[Found]:
    found = []
    for path in folder.glob("*.json"):
        with contextlib.suppress(OSError, ValidationError):
            with path.open() as file:
                sweeping = Sweeping.model_validate_json(file.read())
                silent = time.time() - os.fstat(file.fileno()).st_mtime > EXPIRY_SECONDS
            found.append(Found(path, sweeping, not (silent or sweeping.owner.known_dead())))
    return found
