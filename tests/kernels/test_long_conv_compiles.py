"""What the long convolution's kernels take on sm_90, found by the compiler without a GPU."""

from __future__ import annotations

from typing import Any

import pytest

from kernels.convolutions import long_conv_triton as shipped
from tests.kernels.offline import Resources, compile_sm90


def compile_kernel(kernel: Any, dtype: str, warps: int = shipped.WARPS, **constants: Any) -> Resources:
    """One specialisation."""
    pointers = dict.fromkeys(("x", "y", "dy", "taps", "out"), f"*{dtype}+") | {"sums": "*fp32+"}
    sizes = dict.fromkeys(("batch", "width", "chunks", "reach", "rows", "columns", "row"), "i32") | dict.fromkeys(
        ("x_b", "x_r"), "i64"
    )
    arguments = pointers | sizes | constants
    return compile_sm90(kernel, {name: arguments[name] for name in kernel.arg_names}, warps=warps)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_products_are_on_tensor_cores_without_spills(dtype: str):
    products = [(shipped.toeplitz_kernel, {"COLUMNS": shipped.COLUMNS, "BACK": back}) for back in (False, True)]
    for kernel, constants in (*products, (shipped.taps_gradient_kernel, {"COLUMNS": shipped.GRADIENT_COLUMNS})):
        used = compile_kernel(kernel, dtype, C=shipped.CHUNK, **constants)
        assert used.spilled == 0
        assert used.shared <= 227 * 1024
        assert "wgmma.mma_async" in used.ptx


def test_rows_are_turned_without_spills():
    used = compile_kernel(shipped.turn_kernel, "bf16", shipped.TURN_WARPS, SIDE=shipped.SIDE)
    assert used.spilled == 0
    assert used.shared == 2 * shipped.SIDE**2
