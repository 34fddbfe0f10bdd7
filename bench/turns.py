"""Turns on a GPU that several processes share: two train, while the others compile or draw what they train next.

Two processes fill each other's gaps; more would only make every fleet take longer, and a stop would find all of them half done.
Who has waited longest is next. Turns and places in the queue are file locks of the host, so they hold between drivers too, and
a killed process gives its own back.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

import torch

AT_A_TIME = 2
"""Processes that train on a GPU at the same time."""
LOOK_SECONDS = 0.05


class Turn:
    """A process's right to train on a GPU; use it as a context manager, which gives it back.

    Args:
        gpu: what tells the GPU from others of this host.
        folder: where the locks are, the same for all processes of a user.
    """

    def __init__(self, gpu: str, folder: Path | None = None) -> None:
        self.gpu = gpu
        self.folder = folder or Path(tempfile.gettempdir()) / f"mixer-bench-{os.getuid()}"
        self._lock: IO[bytes] | None = None

    @classmethod
    def on(cls, device: torch.device) -> Turn:
        """A turn on a CUDA device, whatever number the process knows it by."""
        return cls(str(torch.cuda.get_device_properties(device).uuid))

    def __enter__(self) -> Turn:
        return self

    def __exit__(self, *_: object) -> None:
        self.give()

    def take(self, stopped: Callable[[], bool]) -> bool:
        """Waits for a turn; whether it came before `stopped` said to leave."""
        self.folder.mkdir(exist_ok=True)
        name = f"{self.gpu}.queue.{time.time_ns()}.{os.getpid()}"
        place = _locked(self.folder / f".{name}")
        assert place is not None
        queued = (self.folder / f".{name}").rename(self.folder / name)  # nobody sees it before it is locked
        try:
            while self._lock is None and not stopped():
                if self._is_next(queued):
                    self._lock = self._free_turn()
                if self._lock is None:
                    time.sleep(LOOK_SECONDS)
        finally:
            queued.unlink(missing_ok=True)
            place.close()
        return self._lock is not None

    def _is_next(self, queued: Path) -> bool:
        """Whether nobody alive has waited longer."""
        for other in sorted(self.folder.glob(f"{self.gpu}.queue.*")):
            if other == queued:
                break
            if (left := _locked(other)) is None:
                return False
            other.unlink(missing_ok=True)  # its process was killed
            left.close()
        return True

    def _free_turn(self) -> IO[bytes] | None:
        turns = (_locked(self.folder / f"{self.gpu}.{turn}") for turn in range(AT_A_TIME))
        return next((lock for lock in turns if lock is not None), None)

    def give(self) -> None:
        """Lets another process train."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def _locked(path: Path) -> IO[bytes] | None:
    """The file, locked; None if another holds its lock."""
    file = path.open("wb")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file
