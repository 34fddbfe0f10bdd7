"""What the vector-gate walks for Hopper take on sm_90, found by the compiler without a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import triton.language as tl

from kernels.vector_gates import vector_gate_hopper_launch
from kernels.vector_gates.vector_gate_hopper import walk_kernel
from kernels.vector_gates.vector_gate_hopper_back import reverse_kernel
from tests.kernels.offline import compile_sm90
from tests.kernels.test_delta_hopper_compiles import described
from tests.kernels.test_walk_compiles import SMEM

C = vector_gate_hopper_launch.CHUNK
KERNELS = (walk_kernel, reverse_kernel)


def check(kernel: Any, width: int, tile: int, *, delta: bool, out: bool = True) -> None:
    """One kernel with K = V = width, as training without a state runs it; without `out` what carries states between segments."""
    runtime: dict[str, Any] = {p.name: p.annotation_type or "*fp32+" for p in kernel.params if not p.is_constexpr}
    runtime |= dict.fromkeys(("reads", "writes", "erases"), described(1, C, width))
    runtime |= dict.fromkeys(("scores", "couplings"), described(1, C, C))
    runtime |= dict.fromkeys(("v", "o", "do", "dv"), described(1, C, 1, tile))
    runtime |= dict.fromkeys(("states", "dstates"), described(1, width, tile))
    runtime |= {"errors": described(1, C, 1, tile) if kernel is walk_kernel else "*bf16+"}
    arguments = runtime | {"K": width, "V": width, "KP": width, "BV": tile, "GROUPS": max(1, tile // 64), "C": C, "OUT": out}
    arguments |= {"DELTA": delta, "STAGES": vector_gate_hopper_launch.stages(delta), "KEEP": out, "DOT": tl.bfloat16}
    arguments |= {"FIRST": False, "LAST": False, "DLAST": False}
    used = compile_sm90(kernel, {name: arguments[name] for name in kernel.arg_names}, warps=4 * arguments["GROUPS"])
    assert used.spilled == 0
    assert used.shared <= SMEM
    assert "wgmma.mma_async" in used.ptx
    assert "mma.sync" not in used.ptx.replace("wgmma.mma_async.sync", "")


@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.__name__)
def test_the_main_configuration(kernel: Any, delta: bool) -> None:
    check(kernel, 128, 128, delta=delta)


@pytest.mark.slow
@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize(("width", "tile"), [(128, 64), (128, 32), (64, 64), (64, 32)])
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.__name__)
def test_some_of_the_columns(kernel: Any, width: int, tile: int, delta: bool) -> None:
    check(kernel, width, tile, delta=delta)


@pytest.mark.slow
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.__name__)
def test_carries(kernel: Any, width: int) -> None:
    check(kernel, width, width, delta=True, out=False)
