"""What the long convolution's kernels take on sm_90, found by the compiler without a GPU."""

from __future__ import annotations

from typing import Any

import pytest

from kernels import long_conv_triton as shipped
from tests.kernels.offline import Resources, compile_sm90


def compile_kernel(kernel: Any, dtype: str, columns: int) -> Resources:
    """One specialisation."""
    pointers = dict.fromkeys(("x", "y", "dy", "taps"), f"*{dtype}+") | {"sums": "*fp32+"}
    arguments = pointers | dict.fromkeys(("batch", "width", "chunks"), "i32") | {"C": shipped.CHUNK, "COLUMNS": columns}
    return compile_sm90(kernel, {name: arguments[name] for name in kernel.arg_names}, warps=shipped.WARPS)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_products_are_on_tensor_cores_without_spills(dtype: str):
    both = ((shipped.toeplitz_kernel, shipped.COLUMNS), (shipped.taps_gradient_kernel, shipped.GRADIENT_COLUMNS))
    for kernel, columns in both:
        used = compile_kernel(kernel, dtype, columns)
        assert used.spilled == 0
        assert used.shared <= 227 * 1024
        assert "wgmma.mma_async" in used.ptx
