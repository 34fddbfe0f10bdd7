"""What the shipped configurations of the delta rule take on sm_90, found by the compiler without a GPU."""

import pytest
import torch
import triton.language as tl

from kernels.delta_rule import delta
from kernels.delta_rule.delta_coupling_triton import coupling_kernel
from kernels.delta_rule.delta_gradients_triton import gradients_kernel
from kernels.delta_rule.delta_triton import forward_kernel, reverse_kernel
from kernels.walks import walk
from tests.kernels.offline import compile_sm90
from tests.kernels.test_walk_compiles import DTYPES, SMEM

NARROW = ("q", "k", "v", "o", "do", "dq", "dk", "dv", "h", "errors", "states", "dstates", "solved", "dv")
FLAGS = {"FIRST": False, "LAST": False, "DLAST": False, "KEEP": True}


def compile_one(kernel, width, gate, dtype):
    """One kernel with K = V = width, as training without a state runs it; gate is 0, 1 or 2."""
    pointer, dot = DTYPES[dtype]
    config, inner, precision = delta.config_of(width, width, dtype), walk.padded(width), walk._precision(dtype)
    part = kernel.__name__.removesuffix("_kernel")
    tile, warps, stages = (0, 1, 1) if kernel is coupling_kernel else getattr(config, part)
    constants = {
        "K": width,
        "V": width,
        "BK": inner,
        "TK": min(tile, inner),
        "BV": min(config.inner if part == "gradients" else tile, inner),
        "UNIT": 8,
        "C": config.chunk,
        "TV": walk.padded(-(-width // -(-width // tile))) if tile else 0,
        "GATE": gate,
        "GATED": gate > 0,
        "GATE_GRAD": gate > 0,
        "STAGES": stages,
        "DOT": dot,
        "MERGE": tl.float32 if dtype == torch.float32 else tl.float16,
        "PRECISION": tl.constexpr(precision),
    }
    runtime = {p.name: p.annotation_type or "*fp32+" for p in kernel.params if not p.is_constexpr}
    arguments = runtime | dict.fromkeys(NARROW, pointer) | constants | FLAGS
    capped = kernel is coupling_kernel and dtype != torch.float32
    options = {"maxnreg": delta.COUPLING_REGISTERS} if capped else {}
    return compile_sm90(kernel, {name: arguments[name] for name in kernel.arg_names}, warps=warps, **options)


def check(kernel, width, gate, dtype, spill):
    used = compile_one(kernel, width, gate, dtype)
    assert used.spilled <= spill, used.spilled
    assert used.shared <= SMEM
    if kernel is coupling_kernel:
        assert "mma.sync" in used.ptx
    elif dtype != torch.float32:
        assert "wgmma.mma_async" in used.ptx
        # A state of fewer than 64 keys has too few rows for a warp group.
        assert width < 64 or "mma.sync" not in used.ptx.replace("wgmma.mma_async.sync", "")


KERNELS = (coupling_kernel, forward_kernel, reverse_kernel, gradients_kernel)
# Bytes of spilled registers by width: what the compilers of Triton 3.6 and 3.7 give at most, rounded up.
SPILLS = {
    coupling_kernel: {64: 80, 128: 100},
    forward_kernel: {64: 0, 128: 300},
    reverse_kernel: {64: 0, 128: 120},
    gradients_kernel: {64: 180, 128: 280},
}


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.__name__)
def test_the_main_configuration(kernel):
    check(kernel, 128, 0, torch.bfloat16, {coupling_kernel: 80, forward_kernel: 100, gradients_kernel: 120}.get(kernel, 0))


@pytest.mark.slow
@pytest.mark.parametrize("gate", [0, 2])
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.__name__)
def test_sixteen_bit(kernel, width, gate):
    check(kernel, width, gate, torch.bfloat16, SPILLS[kernel][width])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("gate", [0, 1, 2])
@pytest.mark.parametrize("width", [16, 60, 64, 128, 256])
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.__name__)
def test_every_configuration_compiles(kernel, width, gate, dtype):
    dtype = torch.float32 if width > 128 else dtype
    check(kernel, width, gate, dtype, 8000)
