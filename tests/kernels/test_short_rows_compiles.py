"""What the kernels of short rows take on sm_90, found by the compiler without a GPU."""

import pytest
import torch
import triton.language as tl

from kernels.operands import product_width
from kernels.walks import short_rows
from kernels.walks.short_rows_triton import backward_kernel, forward_kernel
from tests.kernels.offline import compile_sm90

SMEM = 227 * 1024
TABLES = {forward_kernel: short_rows.FORWARD, backward_kernel: short_rows.BACKWARD}


def compiled(kernel, widths, gate, *, alone=False, shared=False):
    """One kernel in bf16; gate is 0, 1 or 2, and has a gradient if it is 2."""
    config = next(config for width, config in TABLES[kernel].items() if max(widths) <= width)
    bk, bv = (product_width(width, torch.bfloat16) for width in widths)
    runtime = {p.name: p.annotation_type or "*bf16+" for p in kernel.params if not p.is_constexpr}
    runtime |= {"gate": "*fp32+", "dgate": "*fp32+"}
    constants = {"K": widths[0], "V": widths[1], "BK": bk, "BV": bv, "UNIT": 8, "C": config.tokens, "STEP": config.step}
    if kernel is forward_kernel:
        constants["BV"] = min(config.tile, bv)
    constants |= {"GATE": gate, "GATE_GRAD": gate == 2, "ALONE": alone, "SHARED": shared, "DOT": tl.bfloat16}
    arguments = runtime | constants | {"PRECISION": tl.constexpr(None), "STAGES": config.stages}
    arguments = {name: arguments[name] for name in kernel.arg_names}
    return compile_sm90(kernel, arguments, warps=config.warps, maxnreg=config.registers)


def check(used, registers, spill):
    assert used.registers <= registers
    assert used.spilled <= spill
    assert used.shared <= SMEM // 2, "two programs share an SM"
    assert "wgmma.mma_async" in used.ptx
    assert "mma.sync" not in used.ptx.replace("wgmma.mma_async.sync", "")


@pytest.mark.parametrize(
    ("kernel", "gate", "registers", "spill"),
    [
        (forward_kernel, 2, 168, 0),
        (backward_kernel, 2, 255, 120),
        pytest.param(forward_kernel, 0, 128, 0, marks=pytest.mark.slow),
        pytest.param(backward_kernel, 0, 255, 0, marks=pytest.mark.slow),
        pytest.param(backward_kernel, 1, 255, 0, marks=pytest.mark.slow),
    ],
)
def test_narrow_heads(kernel, gate, registers, spill):
    check(compiled(kernel, (64, 64), gate), registers, spill)


@pytest.mark.slow
@pytest.mark.parametrize(("kernel", "registers"), [(forward_kernel, 128), (backward_kernel, 168)])
def test_rows_of_one_tile(kernel, registers):
    check(compiled(kernel, (64, 64), 2, alone=True), registers, 0)


@pytest.mark.parametrize("kernel", TABLES, ids=lambda kernel: kernel.__name__)
def test_no_integer_is_specialised(kernel):
    """A batch of one, or a length that 16 divides, is no other kernel."""
    integers = [p for p in kernel.params if p.annotation in ("i32", "i64")]
    assert integers
    assert all(p.do_not_specialize for p in integers)
