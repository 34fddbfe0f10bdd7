"""What the shipped configurations of the vector-gate kernels take on sm_90, found by the compiler without a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton.language as tl

from kernels.vector_gates import vector_gate_config
from kernels.vector_gates.dplr_triton import ROWS, halves_kernel, pairs_kernel, spread_kernel
from kernels.vector_gates.vector_gate_gradient import gradient_kernel
from kernels.vector_gates.vector_gate_prepare import prepare_kernel
from kernels.vector_gates.vector_gate_solve import solve_kernel
from kernels.vector_gates.vector_gate_walk import reverse_kernel, walk_kernel
from kernels.walks import walk
from tests.kernels.offline import Resources, compile_sm90

DTYPES = {torch.bfloat16: ("*bf16+", tl.bfloat16), torch.float16: ("*fp16+", tl.float16), torch.float32: ("*fp32+", tl.float32)}
WIDE = ("gate", "factors", "decays", "beta", "first", "last", "dlast", "dfirst", "dbeta", "dgate")
SMEM = 227 * 1024
HALF_OF_AN_SM = 228 * 1024 // 2 - 1024
# kernel, the entry of its configuration, flags
KERNELS = {
    "prepare": (prepare_kernel, "prepare", {"ROUGH": False}),
    "prepare, rough": (prepare_kernel, "rough", {"ROUGH": True}),
    "walk": (walk_kernel, "walk", {"KEEP": False, "OUT": True}),
    "walk, keeping": (walk_kernel, "walk", {"KEEP": True, "OUT": True}),
    "reverse": (reverse_kernel, "reverse", {"OUT": True}),
    "gradient": (gradient_kernel, "gradient", {"ROUGH": False}),
    "gradient, rough": (gradient_kernel, "rough", {"ROUGH": True}),
}


def compile_one(name: str, width: int, dtype: torch.dtype, *, delta: bool) -> Resources:
    """One kernel with K = V = width and log decays in fp32."""
    kernel, entry, flags = KERNELS[name]
    config = vector_gate_config.config(width, width, dtype, delta=delta)
    pointer, dot = DTYPES[dtype]
    runtime: dict[str, Any] = {
        p.name: p.annotation_type or ("*fp32+" if p.name in WIDE else pointer) for p in kernel.params if not p.is_constexpr
    }
    merge = DTYPES[torch.float32 if dtype == torch.float32 else torch.float16]
    runtime |= {"levels": "*i32+", "systems": merge[0]}
    inner = vector_gate_config.tile_width(width, dtype)
    tile = getattr(config, entry)
    part = min(tile.width, inner)
    constants = {"K": width, "V": width, "KP": inner, "VP": inner, "BK": part, "BV": part, "UNIT": 8, "C": config.chunk}
    constants |= {
        "DELTA": delta,
        "OWN": False,
        "TERMS": 0 if dtype == torch.float32 else 2,
        "SPLIT": 0 if dtype == torch.float32 else 2,
        "LEVELS": config.chunk.bit_length() - 1,
        "STAGES": tile.stages,
    }
    constants |= {"FIRST": False, "LAST": False, "DLAST": False, "DOT": dot}
    constants |= {"PRECISION": tl.constexpr(walk._precision(dtype)), "GENTLE": vector_gate_config.gentle_limit(dtype)}
    arguments = runtime | constants | flags
    return compile_sm90(
        kernel, {n: arguments[n] for n in kernel.arg_names}, warps=tile.warps, num_stages=tile.stages, maxnreg=tile.registers
    )


def check(name: str, width: int, dtype: torch.dtype, spill: int, *, delta: bool) -> Resources:
    used = compile_one(name, width, dtype, delta=delta)
    assert used.spilled <= spill, used.spilled
    assert used.shared <= SMEM
    if dtype != torch.float32:
        assert "wgmma.mma_async" in used.ptx
        assert "mma.sync" not in used.ptx.replace("wgmma.mma_async.sync", "")
    return used


# Rough chunks are rare and may spill.
SPILLS = {"prepare, rough": 200, "gradient, rough": 2600, "gradient": 300}
SPILLS_OF_THE_DELTA_RULE = {
    "prepare, rough": 600, "walk": 250, "walk, keeping": 250, "reverse": 300, "gradient": 100, "gradient, rough": 4200,
}  # fmt: skip


@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("name", KERNELS)
def test_sixteen_bit(name: str, delta: bool) -> None:
    used = check(name, 128, torch.bfloat16, (SPILLS_OF_THE_DELTA_RULE if delta else SPILLS).get(name, 0), delta=delta)
    if name in ("walk", "walk, keeping", "reverse") and not delta:
        assert used.shared <= HALF_OF_AN_SM


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_couplings(dtype: torch.dtype) -> None:
    """One warp a chunk, whose products of 16 x 16 are too small for a warp group."""
    config = vector_gate_config.config(128, 128, dtype, delta=True)
    merge = torch.float32 if dtype == torch.float32 else torch.float16
    runtime = {p.name: p.annotation_type or "*fp32+" for p in solve_kernel.params if not p.is_constexpr}
    runtime |= {"systems": DTYPES[merge][0], "couplings": DTYPES[dtype][0]}
    constants = {"C": config.chunk, "MERGE": DTYPES[merge][1], "PRECISION": tl.constexpr(walk._precision(dtype))}
    used = compile_sm90(solve_kernel, runtime | constants, warps=1)
    assert used.spilled == 0
    assert "mma.sync" in used.ptx


@pytest.mark.parametrize("name", ["prepare", "gradient"])
def test_single_precision(name: str) -> None:
    check(name, 64, torch.float32, 0, delta=True)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("width", [16, 60, 64, 128, 256])
@pytest.mark.parametrize("name", KERNELS)
def test_every_configuration_compiles(name: str, width: int, delta: bool, dtype: torch.dtype) -> None:
    check(name, width, dtype, 8000, delta=delta)


@pytest.mark.parametrize(("dtype", "width"), [(torch.bfloat16, 64), (torch.float32, 256)])
def test_pairs_of_tokens(dtype: torch.dtype, width: int):
    pointer, _ = DTYPES[dtype]
    sizes = {"K": width, "V": width, "BK": width, "BV": width, "ROWS": ROWS}
    for kernel in (pairs_kernel, halves_kernel, spread_kernel):
        arguments: dict[str, Any] = {p.name: p.annotation_type or pointer for p in kernel.params if not p.is_constexpr}
        arguments |= {name: "*fp32+" for name in ("log_decay", "decays", "strength") if name in arguments}
        constants = {name: size for name, size in sizes.items() if name in kernel.arg_names}
        assert compile_sm90(kernel, arguments | constants, warps=4).spilled == 0
