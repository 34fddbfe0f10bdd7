"""What the shipped configurations of the walks take on sm_90, found by the compiler without a GPU."""

import pytest
import torch
import triton.language as tl

from kernels import walk
from kernels.walk_triton import backward_kernel, forward_kernel
from tests.kernels.offline import compile_sm90

POINTERS = ("q", "k", "v", "o", "do", "dq", "dk", "dv")
DTYPES = {torch.bfloat16: ("*bf16+", tl.bfloat16), torch.float16: ("*fp16+", tl.float16), torch.float32: ("*fp32+", tl.float32)}
SMEM = 227 * 1024


def compile_walk(kernel, config, width, gate, dtype):
    """One kernel with K = V = width; gate is 0, 1 or 2."""
    pointer, dot = DTYPES[dtype]
    runtime = {p.name: p.annotation_type or "*fp32+" for p in kernel.params if not p.is_constexpr}
    tile, inner = walk.tile_of(config, width, dtype), walk.padded(width)
    is_forward = kernel is forward_kernel
    constants = {"K": width, "V": width, "BK": inner, "BV": tile if is_forward else inner, "TK": tile, "TV": tile, "UNIT": 8}
    constants |= {"C": config.chunk, "GATE": gate, "FIRST": False, "LAST": False, "DLAST": False, "GATE_GRAD": gate == 2}
    constants |= {"DOT": dot, "PRECISION": tl.constexpr(walk._precision(dtype)), "STAGES": config.stages}
    arguments = runtime | dict.fromkeys(POINTERS, pointer) | constants
    return compile_sm90(kernel, {name: arguments[name] for name in kernel.arg_names}, warps=config.warps)


def check(width, gate, dtype, forward_spill, backward_spill):
    configs = (walk.forward_config(width, dtype), walk.backward_config(width, width, dtype))
    limits = (forward_spill, backward_spill)
    for kernel, config, limit in zip((forward_kernel, backward_kernel), configs, limits, strict=True):
        used = compile_walk(kernel, config, width, gate, dtype)
        assert used.spilled <= limit, (kernel.__name__, used.spilled)
        assert used.shared <= SMEM
        if dtype != torch.float32:
            assert "wgmma.mma_async" in used.ptx
            assert "mma.sync" not in used.ptx.replace("wgmma.mma_async.sync", "")


@pytest.mark.parametrize("gate", [0, 2])
@pytest.mark.parametrize(("width", "backward_spill"), [(64, 0), (128, 100), (256, 300)])
def test_sixteen_bit(width, backward_spill, gate):
    check(width, gate, torch.bfloat16, 40 if gate else 0, backward_spill if gate else 0)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("gate", [0, 1, 2])
@pytest.mark.parametrize("width", [16, 60, 64, 128, 256])
def test_every_configuration_compiles(width, gate, dtype):
    check(width, gate, dtype, 8000, 8000)
