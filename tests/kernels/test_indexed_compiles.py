"""What the shipped configurations of attention over an index take on sm_90, found by the compiler without a GPU."""

import pytest
import torch
import triton.language as tl

from kernels.indexed import chosen_grad_triton as chosen
from kernels.indexed import chosen_launch
from kernels.indexed import indexed_decode as decode
from kernels.indexed import indexed_launch as launch
from kernels.indexed.chosen_lists_triton import pack_kernel, slots_kernel, tiles_kernel
from kernels.indexed.chosen_shares_triton import delta_kernel, shares_kernel, sum_parts_kernel, sum_shares_kernel
from kernels.indexed.indexed_decode_triton import join_kernel, part_kernel
from kernels.indexed.indexed_grad_triton import far_kernel, key_kernel, query_kernel
from kernels.indexed.indexed_triton import compact_kernel, forward_kernel
from kernels.operands import _precision, product_width
from tests.kernels.offline import compile_sm90

NARROW = ("q", "k", "v", "y", "dy", "dq", "dk", "dv", "dq_shares")
WHOLE = {"starts": "*i64+", **dict.fromkeys(("words", "lists", "counts", "tokens", "slots"), "*i32+")}
DTYPES = {torch.bfloat16: ("*bf16+", tl.bfloat16), torch.float16: ("*fp16+", tl.float16), torch.float32: ("*fp32+", tl.float32)}
KERNELS = {
    "forward": forward_kernel,
    "query": query_kernel,
    "key": key_kernel,
    "far": far_kernel,
    "token": chosen.chosen_key_kernel,
    "shares": shares_kernel,
}
LISTS_BY_KEY = [pack_kernel, tiles_kernel, slots_kernel, delta_kernel, sum_parts_kernel, sum_shares_kernel]
SMEM = 227 * 1024


def compile_kernel(name, width, dtype, *, listed, **flags):
    """One kernel with K = V = width, for a band with neither sinks nor stored keys unless flags say so."""
    kernel = KERNELS[name]
    if name == "shares":
        config = chosen_launch.key_config(width, dtype, 64)
    else:
        config = getattr(launch.configs(width, dtype, listed=listed), "key" if name == "far" else name)
    pointer, dot = DTYPES[dtype]
    runtime = {p.name: p.annotation_type or "*fp32+" for p in kernel.params if not p.is_constexpr}
    runtime |= dict.fromkeys(NARROW, pointer) | WHOLE
    constants = {
        "K": width,
        "V": width,
        "BK": product_width(width, dtype),
        "BV": product_width(width, dtype),
        "UNIT": 8,
        "M": config.queries,
        "N": config.keys,
    }
    constants |= {
        "LISTED": listed,
        "SINKS": False,
        "STORED": False,
        "ROWWISE": listed,
        "SPLIT": 2 if listed else 1,
        "FAR": False,
        "DOT": dot,
        "STAGES": config.stages,
    }
    arguments = runtime | constants | {"PRECISION": tl.constexpr(_precision(dtype))} | flags
    return compile_sm90(
        kernel,
        {name: arguments[name] for name in kernel.arg_names if name in arguments},
        warps=config.warps,
        maxnreg=config.registers,
    )


def check(name, width, dtype, *, listed, spill, **flags):
    used = compile_kernel(name, width, dtype, listed=listed, **flags)
    assert used.spilled <= spill, used.spilled
    assert used.shared <= SMEM
    if dtype != torch.float32:
        assert "wgmma.mma_async" in used.ptx
        assert "mma.sync" not in used.ptx.replace("wgmma.mma_async.sync", "")


@pytest.mark.parametrize(("name", "spill"), [("token", 60), ("shares", 200)])
def test_chosen_blocks_in_sixteen_bit(name, spill):
    check(name, 128, torch.bfloat16, listed=True, spill=spill)


@pytest.mark.parametrize(("name", "spill"), [("forward", 24), ("query", 60), ("key", 60), ("far", 0)])
def test_a_window_in_sixteen_bit(name, spill):
    check(name, 128, torch.bfloat16, listed=False, spill=spill)


@pytest.mark.parametrize(
    "kernel",
    [*KERNELS.values(), compact_kernel, part_kernel, join_kernel, chosen.choosers_kernel, chosen.add_parts_kernel, *LISTS_BY_KEY],
    ids=lambda kernel: kernel.__name__,
)
def test_no_integer_is_specialised(kernel):
    """A batch of one, or a length that 16 divides, is no other kernel."""
    integers = [p for p in kernel.params if p.annotation in ("i32", "i64")]
    assert integers
    assert all(p.do_not_specialize for p in integers)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [16, 60, 64, 128, 256])
@pytest.mark.parametrize(
    ("listed", "flags"),
    [
        (False, {}),
        (False, {"SINKS": True}),
        (False, {"SINKS": True, "FAR": True}),
        (False, {"SINKS": True, "STORED": True}),
        (True, {}),
        (True, {"ROWWISE": False}),
    ],
)
@pytest.mark.parametrize("name", [name for name in KERNELS if name != "shares"])
def test_every_configuration_compiles(name, listed, flags, width, dtype):
    check(name, width, dtype, listed=listed, spill=1000, **flags)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [16, 60, 64, 128])
def test_every_walk_by_key_compiles(width, dtype):
    used = compile_kernel("shares", width, dtype, listed=True)
    assert used.spilled <= 1000
    assert used.shared <= SMEM


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [64, 128, 256])
def test_one_token(width, dtype):
    keys, warps, stages = decode.KEYS[width]
    keys, stages = (keys // 2, 1) if dtype == torch.float32 else (keys, stages)
    runtime = {p.name: p.annotation_type or "*fp32+" for p in part_kernel.params if not p.is_constexpr}
    runtime |= dict.fromkeys("qkv", DTYPES[dtype][0]) | {"seen": "*u8+"}
    constants = {"K": width, "V": width, "BK": width, "BV": width, "UNIT": 8, "M": 16, "N": keys, "DOT": DTYPES[dtype][1]}
    arguments = runtime | constants | {"PRECISION": tl.constexpr(_precision(dtype)), "STAGES": stages}
    used = compile_sm90(part_kernel, {name: arguments[name] for name in part_kernel.arg_names}, warps=warps)
    assert used.spilled <= (400 if dtype == torch.float32 else 0)
    assert used.shared <= SMEM
