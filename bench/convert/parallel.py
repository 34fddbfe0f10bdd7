"""Several processes on one conversion: the student is spread over them by FSDP2, each takes its rows of every batch.

Parameters, gradients and the optimiser's state are sharded while a stage trains; between stages every process holds the
student whole, as it always holds the teacher. Rank 0 writes. Started by `torchrun --nproc-per-node 2 -m bench.cli convert
...`; without it everything here does nothing.
"""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from bench.convert.spec import Stage

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


def sharded(student: Any, stage: Stage) -> Any:
    """A copy of the student for one stage, its parameters spread over the processes; the student itself if there is but one.

    A stage on the teacher's stream runs the converted layers by themselves, so each is a unit of its own there.

    Args:
        student: with adapters, if the stage has any, and the right parameters frozen.
        stage: decides which methods run.
    """
    if size() == 1:
        return student
    mesh = init_device_mesh(student.device.type, (size(),))
    copied = copy.deepcopy(student)
    if stage.capture == "logits":
        for block in copied.blocks():
            fully_shard(block, mesh=mesh)
        fully_shard(copied, mesh=mesh)
        register_fsdp_forward_method(copied, "hidden")
    for index, layer in copied.converted().items() if stage.capture != "logits" else ():
        if stage.capture == "block_out":
            fully_shard(copied.blocks()[index], mesh=mesh)
            continue
        fully_shard(layer, mesh=mesh)
        for method in ("segment", "heads_output", "matrix", "score_loss"):
            register_fsdp_forward_method(layer, method)
    return copied


def whole(content: Any) -> Any:
    """The same nested dictionary with every sharded tensor gathered; all processes must ask for it."""
    if isinstance(content, dict):
        return {key: whole(value) for key, value in content.items()}
    return content.full_tensor() if isinstance(content, DTensor) else content


def like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor sharded as a parameter of its shape is."""
    if not isinstance(parameter, DTensor) or tensor.shape != parameter.shape:
        return tensor
    return distribute_tensor(tensor.to(parameter.device), parameter.device_mesh, parameter.placements)


def add_numbers(numbers: dict[str, Tensor]) -> dict[str, float]:
    """Sums of the same named numbers over all processes, read from the device at once."""
    total = torch.stack(list(numbers.values())).double()
    if size() > 1:
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
