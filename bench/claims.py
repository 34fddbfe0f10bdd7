"""Who trains a run: a claim in its folder, so that drivers and workers on any hosts that see the store share the work.

    STORE/<run_id>/claim.<n>     the one with the highest n is in force

A file system lets one process only create a given name, on NFS too, so the next number is taken by one alone. A claim is kept
alive by touching it; one that was not touched for `EXPIRY` seconds is void, and one whose process is known to be gone at once.
A claim in force is never deleted before its run is stored, since a number must not be given twice. Ages are differences of
times that the file server stamped, so clocks of hosts need not agree.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import threading
import time
from functools import cache
from pathlib import Path
from typing import IO

from pydantic import BaseModel, ValidationError

from bench.store import Store, StoreError

BEAT_SECONDS = 10.0
EXPIRY_SECONDS = 120.0
"""Longer than the minute for which an NFS client may show an old time of a file."""


class Owner(BaseModel):
    """A process, as others may recognise it.

    Args:
        host: for people.
        machine: the boot and the process namespace that `pid` counts in; empty where they are not known.
        pid: its number.
        born: its start in ticks since boot, since numbers are given again.
    """

    host: str
    machine: str
    pid: int
    born: str

    def known_dead(self) -> bool:
        """Whether the process is certainly gone; False also if that cannot be told from here."""
        return bool(self.machine) and self.machine == _machine() and _born(self.pid) != self.born


def this_process() -> Owner:
    """The calling process."""
    pid = os.getpid()
    return Owner(host=socket.gethostname(), machine=_machine(), pid=pid, born=_born(pid) or "")


@cache
def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}:{Path('/proc/self/ns/pid').stat().st_ino}"
    except OSError:
        return ""


def _born(pid: int) -> str | None:
    """Start of a process in ticks since boot; None if it is gone, or dead and not yet collected by its parent."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


class Claims:
    """The claims of one process; use it as a context manager, which frees what it still holds.

    Args:
        store: where the runs are.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self._held: dict[str, tuple[Path, float]] = {}
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._beat, name="claims", daemon=True)

    def __enter__(self) -> Claims:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._thread.join()
        for run_id in list(self._held):
            self.free(run_id)

    def take(self, run_id: str) -> bool:
        """Claims a run, unless somebody else holds it.

        Raises:
            StoreError: the store cannot be written.
        """
        folder = self.store.path(run_id)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            number, newest = _in_force(folder)
            if newest is not None and _holder(newest) is not None:
                return False
            path = folder / f"claim.{number + 1}"
            with path.open("x") as file:
                _sign(path, file)
        except FileExistsError:
            return False
        except OSError as error:
            raise StoreError.of(folder, error) from error
        with self._lock:
            self._held[run_id] = path, time.monotonic()
        for old in range(1, number + 1):
            _unlink(folder / f"claim.{old}")
        return True

    def holds(self, run_id: str) -> bool:
        """Whether a claim that was taken is still in force; a process that slept too long has lost it."""
        with self._lock:
            return run_id in self._held and time.monotonic() - self._held[run_id][1] < EXPIRY_SECONDS / 2

    def lost(self) -> bool:
        """Whether any claim that was taken and not given up is no longer in force."""
        with self._lock:
            oldest = min((beat for _, beat in self._held.values()), default=time.monotonic())
        return time.monotonic() - oldest >= EXPIRY_SECONDS / 2

    def free(self, run_id: str) -> None:
        """Gives an unfinished run back: the claim stays in force, long expired."""
        with self._lock:
            path, _ = self._held.pop(run_id)
        with contextlib.suppress(OSError):
            os.utime(path, (0, 0))

    def drop(self, run_id: str) -> None:
        """Removes the claim of a run whose record is stored."""
        with self._lock:
            path, _ = self._held.pop(run_id)
        _unlink(path)

    def _beat(self) -> None:
        """Touches every claim now and then; one that cannot be touched, or was superseded, grows old and is lost."""
        while not self._closing.wait(BEAT_SECONDS):
            with self._lock:
                held = dict(self._held)
            for run_id, (path, _) in held.items():
                with contextlib.suppress(OSError):
                    os.utime(path)
                    if _in_force(path.parent)[1] == path:
                        with self._lock:
                            if run_id in self._held:
                                self._held[run_id] = path, time.monotonic()


def holder(store: Store, run_id: str) -> Owner | None:
    """The process that trains a run, or None."""
    try:
        _, newest = _in_force(store.path(run_id))
        return None if newest is None else _holder(newest)
    except OSError:
        return None


def _in_force(folder: Path) -> tuple[int, Path | None]:
    """The highest claim of a run and its number; 0 and None if there is none."""
    numbers = [int(path.suffix[1:]) for path in folder.iterdir() if path.stem == "claim" and path.suffix[1:].isdigit()]
    return (max(numbers), folder / f"claim.{max(numbers)}") if numbers else (0, None)


def _holder(path: Path) -> Owner | None:
    """The owner of a claim, or None if it is void."""
    try:
        with path.open() as file:  # opening makes an NFS client ask the server for the file's time
            text, touched = file.read(), os.fstat(file.fileno()).st_mtime
    except FileNotFoundError:
        return None
    if _server_time(path.parent) - touched > EXPIRY_SECONDS:
        return None
    try:
        owner = Owner.model_validate_json(text)
    except ValidationError:  # it is being written
        return Owner(host="?", machine="", pid=0, born="")
    return None if owner.known_dead() else owner


def _server_time(folder: Path) -> float:
    """Now, by the clock that stamps the files of a folder; by this host's clock where it may not write."""
    probe = folder / f".clock.{secrets.token_hex(4)}"
    try:
        probe.write_bytes(b"")
        return probe.stat().st_mtime
    except OSError:
        return time.time()
    finally:
        _unlink(probe)


def _sign(path: Path, file: IO[str]) -> None:
    """Writes who claims; on a full disk the claim stays in force, long expired."""
    try:
        file.write(this_process().model_dump_json())
        file.flush()
    except OSError:
        os.utime(path, (0, 0))
        raise


def _unlink(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()
