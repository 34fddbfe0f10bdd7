"""Several processes on one conversion: each takes its rows of every batch, gradients are added up, rank 0 writes.

Started by `torchrun --nproc-per-node 2 -m bench.cli convert ...`; without it everything here does nothing.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta

import torch
from torch import Tensor, distributed

TIMEOUT = timedelta(hours=1)
"""Rank 0 alone checks and saves at the end, while the others wait."""


def size() -> int:
    """Number of processes."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def rank() -> int:
    """This process's number, counted from 0."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def launched() -> bool:
    """Whether torchrun started this process with others."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def local_device(kind: str) -> str:
    """The device of this process: its own GPU where GPUs are used."""
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if kind.startswith("cuda") and launched() else kind


@contextlib.contextmanager
def group(kind: str) -> Iterator[None]:
    """Joins the processes that torchrun started, for as long as the context lasts.

    Args:
        kind: of device, "cpu" or "cuda...".
    """
    if not launched():
        yield
        return
    if kind.startswith("cuda"):
        torch.cuda.set_device(local_device(kind))
    distributed.init_process_group("nccl" if kind.startswith("cuda") else "gloo", timeout=TIMEOUT)
    try:
        yield
    finally:
        distributed.destroy_process_group()


def my_rows(batch: Tensor) -> Tensor:
    """This process's share of the rows of a batch."""
    return batch[rank() :: size()]


def add_gradients(parameters: list[torch.nn.Parameter]) -> None:
    """Adds the gradients of all processes, in place; a parameter without one counts as zero."""
    if size() == 1:
        return
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        distributed.all_reduce(parameter.grad)


def add_numbers(numbers: dict[str, float], device: torch.device) -> dict[str, float]:
    """Sums of the same named numbers over all processes."""
    if size() == 1:
        return numbers
    total = torch.tensor(list(numbers.values()), dtype=torch.float64, device=device)
    distributed.all_reduce(total)
    return dict(zip(numbers, total.tolist(), strict=True))


def agreed(number: float, device: torch.device) -> float:
    """The number that rank 0 has: clocks differ, but all processes must take the same decision."""
    if size() == 1:
        return number
    shared = torch.tensor(number, dtype=torch.float64, device=device)
    distributed.broadcast(shared, src=0)
    return float(shared)


def wait() -> None:
    """Until all processes are here."""
    if size() > 1:
        distributed.barrier()
