"""Which device a command uses, and why."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bench.errors import UserError, unknown
from bench.provenance import cpu_name

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Device:
    """A resolved device.

    Args:
        kind: "cpu", "cuda" or "cuda:<index>".
        sentence: device, precision and backend in one line for the start of a command.
    """

    kind: str
    sentence: str


def resolve_device(wanted: str) -> Device:
    """Resolves "auto", "cpu", "cuda" or "cuda:<index>"; a device with an index becomes the current one, where graphs are captured.

    Raises:
        UserError: an unknown device, or CUDA where there is none.
    """
    base, _, index = wanted.partition(":")
    if base not in {"auto", "cpu", "cuda"} or (index and not (base == "cuda" and index.isdigit())):
        if base == "gpu":  # whose nearest name by letters is the wrong one
            raise UserError(f"Unknown device {wanted!r}; allowed: auto, cpu, cuda, cuda:0. Did you mean {'cuda' + wanted[3:]!r}?")
        raise unknown("device", wanted, ["auto", "cpu", "cuda", "cuda:0"])
    if base == "cpu":
        return Device("cpu", f"Device: CPU ({cpu_name()}), fp32, plain torch kernels.")
    import torch

    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        if index and int(index) >= count:
            raise UserError(f"There is no device cuda:{index}; this machine has {count}, so choose cuda:0 to cuda:{count - 1}.")
        if index:
            torch.cuda.set_device(int(index))
        kind = wanted if base == "cuda" else "cuda"
        name = torch.cuda.get_device_name(int(index or 0))
        return Device(kind, f"Device: {name} ({count} visible), bf16 autocast, Triton kernels where they fit.")
    if base == "cuda":
        raise UserError(
            f"--device {wanted} was given, but torch sees no CUDA device; use --device cpu or install a CUDA build of torch."
        )
    return Device("cpu", f"Device: CPU ({cpu_name()}), fp32, plain torch kernels (no CUDA device was found).")


def taken_by_others(device: torch.device) -> int:
    """Bytes of a GPU's memory that other processes hold; none on a CPU."""
    if device.type != "cuda":
        return 0
    import torch

    free, total = torch.cuda.mem_get_info(device)
    return max(0, total - free - torch.cuda.memory_reserved(device))


def compiles(device: str) -> bool:
    """Whether fleets are compiled on a device: on GPUs, unless `BENCH_COMPILE=0`."""
    return device.startswith("cuda") and os.environ.get("BENCH_COMPILE", "1") != "0"
