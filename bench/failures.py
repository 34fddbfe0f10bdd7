"""What becomes of an error on a device: its words, memory given back, neighbours waited for, or a process that leaves."""

from __future__ import annotations

import gc
import os
import re
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

import torch

from bench.device import taken_by_others

MEMORY = re.compile(r"CUDA\b.*out of memory|DefaultCPUAllocator: (can't allocate|not enough) memory")
"""How torch says that memory is short where its error has no type of its own."""
CROWD = 1 << 30
"""Bytes of a GPU that others hold from which on a lack of memory may be theirs, not the fleet's."""
PATIENCE_SECONDS, LONGEST_WAIT, LOOK_SECONDS = 480.0, 120.0, 5.0
"""How long a process waits for them: in all, each time at most, and between two looks."""
REASON = 120
"""Letters of a device's own words that a record of a lack of memory keeps."""
BROKEN = 70
"""Exit code of a process whose device no longer computes."""


@dataclass(frozen=True)
class Failure:
    """What is kept of an error; the error itself would hold the fleet, by the frames of its traceback.

    Args:
        words: the error in one line.
        memory: whether the device's memory was short.
        trace: the traceback as text.
    """

    words: str
    memory: bool
    trace: str

    @classmethod
    def of(cls, error: Exception) -> Failure:
        """What is kept of an error."""
        return cls(one_line(error), _is_memory(error), "".join(traceback.format_exception(error)))


def one_line(error: Exception) -> str:
    """An error's type and words."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _is_memory(error: Exception) -> bool:
    """Whether the device's memory was short; on a CPU, and where there is none left for a graph or a kernel, words only say so."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or bool(MEMORY.search(str(error)))


def free_memory(device: torch.device) -> None:
    """Gives back what is no longer needed: a fleet and its graphs refer to each other, so only the collector ends them."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def leave_if_broken(device: torch.device, failure: Failure) -> None:
    """Ends the process if its device is lost to it; whoever started it starts another, which goes on from the checkpoints."""
    if not _computes(device):
        _leave(f"{failure.trace}The device no longer computes for this process, which leaves.")


def _computes(device: torch.device) -> bool:
    """Whether a device does what it is asked: after some errors it refuses everything until the process ends."""
    if device.type != "cuda":
        return True
    try:
        crowded = torch.cuda.mem_get_info(device)[0] < CROWD
        return crowded or bool((torch.ones(CROWD >> 6, device=device) == 1).all())
    except RuntimeError:
        return False


def _leave(words: str) -> NoReturn:
    print(words, file=sys.stderr, flush=True)
    os._exit(BROKEN)  # an ordinary end would call the device again


class Patience:
    """How long a process still waits for memory that others hold.

    Args:
        device: the GPU.
        stops: whether to leave.
    """

    def __init__(self, device: torch.device, stops: Callable[[], bool]) -> None:
        self.device, self.stops = device, stops
        self.seconds = PATIENCE_SECONDS

    def made_room(self) -> bool:
        """Waits until processes that share the GPU hold less; whether it is worth another try as it is."""
        taken, began = taken_by_others(self.device), time.monotonic()
        if taken < CROWD or self.seconds <= 0:
            return False
        while time.monotonic() - began < min(LONGEST_WAIT, self.seconds) and not self.stops():
            time.sleep(LOOK_SECONDS)
            if taken_by_others(self.device) < 0.9 * taken:
                break
        self.seconds -= time.monotonic() - began
        return True


def lack_of_memory(device: torch.device, failure: Failure, parts: int) -> str:
    """The reason of a run that does not fit the memory, with its batch in parts."""
    others = taken_by_others(device)
    beside = f" beside {others / 1e9:.0f} GB of other processes" if others >= CROWD else ""
    return f"out of memory{beside} even with the batch in {parts} parts: {failure.words[:REASON]}"
