"""Compiles Triton kernels for sm_90 without a GPU, and reads from the assembler what they need."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction

from kernels.assembler import _installed, version_of
from tests.kernels.sass import disassembled, reread, unwaited, unwritten


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes: registers of a thread, bytes of spilled registers, bytes of shared memory of a program.

    Asynchronous products are `serialised`, each waited for at once, where the newest assembler has too few registers for them;
    `reread` counts its reads of spilled registers in loops.
    """

    registers: int
    spilled: int
    shared: int
    ptx: str
    serialised: bool
    reread: int


def compile_sm90(kernel: Any, arguments: dict[str, Any], *, warps: int, **options: int | None) -> Resources:
    """Compiles one specialisation of a kernel, and reads what the newest assembler makes of its operands.

    Args:
        kernel: a `triton.jit` or `gluon.jit` function.
        arguments: by parameter: a type such as "*bf16" or "i32" for run-time ones, where a "+" marks an address or a number
            that 16 divides; else the value of a constexpr.
        warps: number of warps.
    """
    names = kernel.arg_names
    is_type = {name: isinstance(arguments[name], str) for name in names}
    signature = {name: arguments[name].rstrip("+") if is_type[name] else "constexpr" for name in names}
    constants = {(i,): arguments[name] for i, name in enumerate(names) if not is_type[name]}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if is_type[name] and arguments[name].endswith("+")}
    source_of = GluonASTSource if isinstance(kernel, GluonJITFunction) else ASTSource
    source = source_of(kernel, signature, constants, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps, **options})
    ptx = compiled.asm["ptx"]
    listing, said = disassembled(ptx, newest_assembler())
    assert not (found := [*unwritten(listing), *unwaited(listing)]), found
    serialised = "wgmma.mma_async instructions are serialized" in said
    return Resources(*_assemble(ptx), compiled.metadata.shared, ptx, serialised, reread(listing))


@cache
def newest_assembler() -> Path:
    """The newest ptxas of the extra `gpu` or of a CUDA toolkit."""
    return max(_installed(), key=lambda path: version_of(path) or (0, 0))


def _assemble(ptx: str) -> tuple[int, int]:
    """Registers of a thread and bytes of the spill stores, in ptxas's own words."""
    assembler = os.environ.get("TRITON_PTXAS_PATH") or str(Path(triton.__file__).parent / "backends/nvidia/bin/ptxas")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.ptx")
        path.write_text(ptx)
        command = [assembler, "-v", "--gpu-name=sm_90a", str(path), "-o", os.devnull]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers, spilled = re.search(r"Used (\d+) registers", said), re.search(r"(\d+) bytes spill stores", said)
    assert registers and spilled, said
    return int(registers[1]), int(spilled[1])
