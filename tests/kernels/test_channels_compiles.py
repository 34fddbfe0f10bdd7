"""What the kernels that work channel by channel take on sm_90, found by the compiler without a GPU."""

from __future__ import annotations

from typing import Any

import pytest

from kernels.convolutions import channel_conv_triton as plain
from kernels.convolutions import gated_long_conv_triton as shipped
from tests.kernels.offline import Resources, compile_sm90

POINTERS = dict.fromkeys(("qkv", "k", "blocks", "y", "dy", "d_qkv", "dk", "x"), "*bf16+") | {"bias": "*fp32+", "sums": "*fp32+"}
SIZES = dict.fromkeys(("heads", "batch", "splits", "width"), "i32")
CHUNKS = (1, pytest.param(4, marks=pytest.mark.slow))


def compile_kernel(kernel: Any, warps: int, *, stages: int | None = None, **constants: Any) -> Resources:
    """One specialisation."""
    arguments = POINTERS | SIZES | constants
    options = {} if stages is None else {"num_stages": stages}
    return compile_sm90(kernel, {name: arguments[name] for name in kernel.arg_names}, warps=warps, **options)


def require_fit(used: Resources) -> None:
    """On tensor cores, without spills, and small enough for an H100."""
    assert used.spilled == 0
    assert used.shared <= 227 * 1024
    assert "wgmma.mma_async" in used.ptx


@pytest.mark.parametrize("chunks", CHUNKS)
def test_gated(chunks: int):
    common = {"HEAD": 2, "N": chunks, "C": plain.CHUNK}
    require_fit(compile_kernel(shipped.forward_kernel, shipped.WARPS, S=shipped.COLUMNS // 4, **common))
    require_fit(compile_kernel(shipped.backward_kernel, shipped.BACK_WARPS, S=shipped.BACK_COLUMNS // 4, **common))
    sizes = {"S": shipped.GRADIENT_COLUMNS // 4, "stages": shipped.GRADIENT_STAGES}
    require_fit(compile_kernel(shipped.taps_kernel, shipped.GRADIENT_WARPS, **sizes, **common))


@pytest.mark.parametrize("chunks", CHUNKS)
def test_shift(chunks: int):
    common = {"N": chunks, "REACH": min(chunks, 2), "C": plain.CHUNK}
    forward, back = {"X_PARTS": 3, "X": 1, "Y_PARTS": 1, "Y": 0}, {"X_PARTS": 1, "X": 0, "Y_PARTS": 3, "Y": 1}
    for parts, backwards in ((forward, False), (back, True)):
        require_fit(compile_kernel(plain.channel_conv_kernel, plain.WARPS, S=plain.SEQUENCES, BACK=backwards, **parts, **common))
    sizes = {"X_PARTS": 3, "X": 1, "S": plain.GRADIENT_SEQUENCES, "stages": plain.GRADIENT_STAGES}
    require_fit(compile_kernel(plain.channel_taps_kernel, plain.GRADIENT_WARPS, **sizes, **common))
