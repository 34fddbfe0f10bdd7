"""What the shipped configurations of Taylor linear attention take on sm_90, found by the compiler without a GPU."""

import pytest
import torch
import triton.language as tl

from kernels.operands import _precision, padded, product_width
from kernels.taylor_features import taylor_launch as launch
from kernels.taylor_features.taylor_grad_triton import key_kernel, query_kernel
from kernels.taylor_features.taylor_triton import forward_kernel, scan_kernel, state_kernel
from kernels.taylor_features.taylor_walk_triton import walk_kernel
from tests.kernels.offline import compile_sm90

NARROW = ("q", "k", "v", "x", "c", "y", "dy", "dq", "dk", "dv")
DTYPES = {torch.bfloat16: ("*bf16+", tl.bfloat16), torch.float16: ("*fp16+", tl.float16), torch.float32: ("*fp32+", tl.float32)}
KERNELS = {"forward": forward_kernel, "state": state_kernel, "query": query_kernel, "key": key_kernel}
SMEM = 227 * 1024


def compile_kernel(name, k_dim, v_dim, dtype, config=None, **flags):
    """One kernel; flags are what the launch decides by the arguments, all on unless given."""
    kernel = KERNELS[name]
    config = config or getattr(launch.configs(v_dim, dtype), name)
    pointer, dot = DTYPES[dtype]
    wide = torch.float32 if dtype == torch.float32 else torch.bfloat16
    runtime = {p.name: p.annotation_type or "*fp32+" for p in kernel.params if not p.is_constexpr}
    runtime |= dict.fromkeys(NARROW, pointer) | dict.fromkeys(("entering", "leaving"), DTYPES[wide][0])
    tile = min(launch.VALUE_TILE, product_width(v_dim, dtype)) if name in ("forward", "state") else product_width(v_dim, dtype)
    constants = {"K": k_dim, "V": v_dim, "BK": padded(k_dim), "BV": tile, "BF": config.rows, "UNIT": 8}
    constants |= {"BM": config.queries, "BN": config.keys, "BT": config.keys, "NORM": True, "WEIGHTED": True}
    constants |= {"FIRST": False, "LAST": False, "DOT": dot, "WIDE": DTYPES[wide][1], "STAGES": config.stages}
    constants |= {"ROW_STAGES": config.row_stages}
    arguments = runtime | constants | {"PRECISION": tl.constexpr(_precision(dtype))} | flags
    return compile_sm90(kernel, {name: arguments[name] for name in kernel.arg_names}, warps=config.warps, maxnreg=config.registers)


def check(name, k_dim, v_dim, dtype, spill):
    used = compile_kernel(name, k_dim, v_dim, dtype)
    assert used.spilled <= spill, used.spilled
    assert used.shared <= SMEM
    if dtype != torch.float32:
        assert "wgmma.mma_async" in used.ptx
        assert "mma.sync" not in used.ptx.replace("wgmma.mma_async.sync", "")


@pytest.mark.parametrize("name", KERNELS)
def test_sixteen_bit(name):
    check(name, 16, 64, torch.bfloat16, 0)


def test_the_walk_fits():
    runtime = {p.name: p.annotation_type or "*bf16+" for p in walk_kernel.params if not p.is_constexpr}
    constants = {"K": 16, "V": 64, "BK": 16, "BV": 64, "F": launch.WALK_ROWS, "UNIT": 8, "C": launch.WALK_STEP}
    constants |= {"DOT": tl.bfloat16, "WIDE": tl.bfloat16, "PRECISION": None, "STAGES": launch.WALK_STAGES}
    arguments = runtime | constants
    used = compile_sm90(walk_kernel, {name: arguments[name] for name in walk_kernel.arg_names}, warps=launch.WALK_WARPS)
    assert used.spilled <= 16
    assert used.shared <= SMEM
    assert "mma.sync" not in used.ptx.replace("wgmma.mma_async.sync", "")


def test_the_scan_streams():
    constants = {"K": 16, "V": 64, "BLOCK": launch.SCAN_BLOCK, "NORM": True, "REVERSE": False, "FIRST": True, "LAST": True}
    runtime = {p.name: p.annotation_type or "*fp32+" for p in scan_kernel.params if not p.is_constexpr}
    arguments = runtime | {"entering": "*bf16+"} | constants
    used = compile_sm90(scan_kernel, {name: arguments[name] for name in scan_kernel.arg_names}, warps=4)
    assert used.spilled == 0
    assert "ld.global.v4" in used.ptx.replace(".L1::no_allocate", "")


@pytest.mark.parametrize("kernel", [*KERNELS.values(), scan_kernel, walk_kernel], ids=lambda kernel: kernel.__name__)
def test_no_integer_is_specialised(kernel):
    """A batch of one, or a length that 16 divides, is no other kernel."""
    integers = [p for p in kernel.params if p.annotation in ("i32", "i64")]
    assert integers
    assert all(p.do_not_specialize for p in integers)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("k_dim", "v_dim"), [(4, 64), (8, 60), (24, 128), (32, 64), (64, 256)])
@pytest.mark.parametrize("name", KERNELS)
def test_every_configuration_compiles(name, k_dim, v_dim, dtype):
    check(name, k_dim, v_dim, dtype, 3000 if dtype == torch.float32 else 400)
