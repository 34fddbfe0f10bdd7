"""Turns on a GPU that several processes share: a few train, while the others compile or draw what they train next.

A few processes that train fill each other's gaps; more would only make every fleet take longer, and a stop would find all of them
half done. A turn is a file lock of the host, so it holds between drivers too, and a killed process gives its own back.
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

AT_A_TIME = 3
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
        while self._lock is None and not stopped():
            if not self._try():
                time.sleep(LOOK_SECONDS)
        return self._lock is not None

    def _try(self) -> bool:
        for place in range(AT_A_TIME):
            file = (self.folder / f"{self.gpu}.{place}").open("wb")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.close()
            else:
                self._lock = file
                return True
        return False

    def give(self) -> None:
        """Lets another process train."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None
