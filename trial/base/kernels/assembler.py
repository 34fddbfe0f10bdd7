"""Which ptxas Triton assembles with, and whether Hopper's tensor cores can be left to it.

A product whose left operand lies in registers (WGMMA) runs on while the threads go on. By report of Triton's developers,
assemblers before CUDA 13.3 may reuse those registers too soon; the product then reads what should not be its own. The
assembler inside of Triton 3.6 and 3.7.1 is 12.8. On an H200 kernels of this package faulted with it that ran when a 13.5
assembled them (docs/kernels.md), so products on Hopper want a newer one.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch

VARIABLE = "TRITON_PTXAS_PATH"
SAFE = (13, 3)
HOPPER = 9
CURE = "`pip install 'mixer-bench[gpu]'` brings a newer one, and TRITON_PTXAS_PATH names any other"

Version = tuple[int, int]


@torch.compiler.assume_constant_result
def tensor_core_obstacle() -> str | None:
    """What keeps tensor core kernels from the current CUDA device, or None; torch.compile asks once while it traces.

    Where Triton would take its own unsafe assembler and a safe one is installed, Triton is told to take that.
    """
    return _choose() if _generation(torch.cuda.current_device()) == HOPPER else None


@cache
def _generation(device: int) -> int:
    """First number of a device's compute capability, which torch takes microseconds to look up."""
    return torch.cuda.get_device_capability(device)[0]


@cache
def _choose() -> str | None:
    given = os.environ.get(VARIABLE)
    used = version_of(Path(given)) if given else _bundled()
    if used is not None and used >= SAFE:
        return None
    better = None if given else next((path for path in _installed() if (version_of(path) or (0, 0)) >= SAFE), None)
    if better is not None:
        os.environ[VARIABLE] = str(better)
        return None
    name = "cannot be run" if used is None else f"is of CUDA {used[0]}.{used[1]}"
    return (
        f"the assembler {given or 'inside of Triton'} {name}, and before {SAFE[0]}.{SAFE[1]} Hopper's products may go wrong; {CURE}"
    )


def version_of(path: Path) -> Version | None:
    """CUDA version of a ptxas; None if it cannot be run or does not tell."""
    try:
        said = subprocess.run([str(path), "--version"], capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    found = re.search(r"release (\d+)\.(\d+)", said)
    return None if found is None else (int(found[1]), int(found[2]))


def _bundled() -> Version | None:
    spec = find_spec("triton")
    return None if spec is None or spec.origin is None else version_of(Path(spec.origin).parent / "backends/nvidia/bin/ptxas")


def _installed() -> Iterator[Path]:
    """Assemblers of the package nvidia-cuda-nvcc and of a CUDA toolkit."""
    spec = find_spec("nvidia")
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        yield from sorted(Path(folder).glob("*/bin/ptxas"))
    for found in (shutil.which("ptxas"), os.environ.get("CUDA_HOME", "/usr/local/cuda") + "/bin/ptxas"):
        if found is not None and Path(found).is_file():
            yield Path(found)
