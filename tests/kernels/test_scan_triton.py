"""What the Triton scans take on sm_90, and what their entry point refuses."""

from __future__ import annotations

import re

import pytest
import torch

from kernels.parts_triton import LARGE, MANY, sum_kernel
from kernels.scan import scan, selective_scan
from kernels.scan_operator import CHANNELS, TILE
from kernels.scan_segments_triton import segments_kernel
from kernels.scan_triton import BACKWARD_TILE, FORWARD_TILE, scan_backward, scan_forward
from kernels.selective_scan_gluon import channels_of_a_warp, selective_scan_forward
from kernels.selective_scan_launch import WARPS
from kernels.selective_scan_triton import selective_scan_backward
from kernels.selective_scan_turn_triton import STATES, TOKENS, turn_kernel
from tests.kernels.offline import compile_sm90

SIZES = dict.fromkeys(
    ("n_tokens", "width", "n_states", "n_tiles", "n_sequences", "sequences_per_member", "n_segments", "gate_stride"), "i32"
)


def compiled(kernel, dtype: str, *, warps: int = 1, gated: bool = False, **constants: int):
    """x, y, forward b and c, and the gate in `dtype`, and so is dt if it is raw; what the mixer keeps in fp32 in fp32."""
    names = ("x", "dx", "y", "dy", "gate", "dgate", *("bc" if kernel is selective_scan_forward else ""))
    narrow = {f"{name}_ptr": dtype for name in names}
    states = ("states", "start", "final", "dstart", "dstate")
    kept = ("rate", "kept", "drate", "b", "c", "bias", "skip", "parts", *states)
    wide = {f"{name}_ptr": "*fp32+" for name in kept} | {f"{name}_ptr": dtype if gated else "*fp32+" for name in ("dt", "ddt")}
    wide |= dict.fromkeys(("db_ptr", "dc_ptr"), "*fp32+" if dtype == "*fp32+" else "*bf16+")
    every = SIZES | wide | narrow | constants | {"GATED": gated}
    return compile_sm90(kernel, {name: every[name] for name in kernel.arg_names}, warps=warps)


FORWARD = [("*bf16+", 16, True), ("*bf16+", 64, False)]
MORE = [("*bf16+", 16, False), ("*fp32+", 16, False), ("*bf16+", 4, False)]


@pytest.mark.parametrize(
    ("dtype", "n_states", "gated"), [*FORWARD, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE)]
)
def test_forward_keeps_states_inside_of_threads(dtype: str, n_states: int, gated: bool):
    channels = WARPS * channels_of_a_warp(n_states)
    used = compiled(
        selective_scan_forward, dtype, warps=WARPS, gated=gated, START=True, KEEP=True, N=n_states, C=channels, L=TILE, WARPS=WARPS
    )
    assert used.spilled <= 8
    assert used.shared <= 227 * 1024 // (8 // WARPS)
    assert ("shfl" in used.ptx) == (n_states > 16)


@pytest.mark.parametrize(
    ("dtype", "gated"),
    [("*bf16+", True), ("*fp32+", False), *(pytest.param(dtype, False, marks=pytest.mark.slow) for dtype in ("*bf16+", "*fp16+"))],
)
def test_backward_exchanges_values_only_to_sum_over_channels(dtype: str, gated: bool):
    dots = dtype != "*fp32+"
    used = compiled(selective_scan_backward, dtype, gated=gated, FINAL=True, TILE=TILE, CHANNELS=CHANNELS, DOTS=dots, ASK=True)
    # the loop over states spills nothing
    assert used.spilled <= (820 if gated else 180)
    assert used.ptx.count("prefetch.global.L1") == 6 + gated
    exchanges = len(re.findall(r"shfl", used.ptx)) // 2  # in the loop over states and after it
    if dtype == "*fp32+":
        assert exchanges == 2 * TILE * 5  # db and dc of every token of a tile, in five steps
    else:
        assert exchanges <= TILE, "the sums are products"


@pytest.mark.parametrize("dtype", ["*bf16+", "*fp16+", "*fp32+"])
@pytest.mark.parametrize(
    ("kernel", "tile"),
    [
        (scan_forward, FORWARD_TILE),
        (segments_kernel, FORWARD_TILE),
        (scan_backward, BACKWARD_TILE),
        (segments_kernel, BACKWARD_TILE),
    ],
    ids=lambda x: getattr(x, "__name__", str(x)),
)
def test_elementwise_scan_keeps_time_inside_of_threads(kernel, tile: int, dtype: str):
    pointers = {name: dtype for name in kernel.arg_names if name.endswith("_ptr")} | dict.fromkeys(
        ("dstart_ptr", "products", "ends"), "*fp32+"
    )
    every = SIZES | pointers | {"START": True, "REVERSE": tile == BACKWARD_TILE, "TILE": tile, "CHANNELS": CHANNELS}
    used = compile_sm90(kernel, {name: every[name] for name in kernel.arg_names}, warps=1)
    assert used.spilled == used.shared == 0
    assert used.registers <= (255 if tile == FORWARD_TILE else 168)
    assert "shfl" not in used.ptx


def test_bad_shapes_are_one_sentence():
    x, rate, b = torch.randn(2, 5, 3), torch.rand(3, 4), torch.randn(2, 5, 4)
    with pytest.raises(ValueError, match=r"b has shape \(2, 5, 3\); with x of shape \(2, 5, 3\) it is \(2, 5, 4\)"):
        selective_scan(x, x, rate, x, b)
    with pytest.raises(ValueError, match="x has no tokens"):
        selective_scan(x[:, :0], x[:, :0], rate, b[:, :0], b[:, :0])
    with pytest.raises(ValueError, match=r"a has shape \(2, 5, 3\); with x of shape \(2, 5, 4\)"):
        scan(x, b)
    with pytest.raises(ValueError, match="x has no tokens"):
        scan(x[:, :0], x[:, :0])


def test_rows_are_turned_and_parts_are_added_without_spills():
    numbers = {p.name: p.annotation_type for kernel in (turn_kernel, sum_kernel) for p in kernel.params if p.annotation_type}
    pointers = dict.fromkeys(("b", "c", "first_out", "second_out"), "*bf16+")
    pointers |= dict.fromkeys(("turned_b", "turned_c", "first", "second"), "*fp32+")
    for kernel, constants in (
        (turn_kernel, {"T": TOKENS, "N": STATES}),
        *(
            (sum_kernel, {"PAIR": True, "BS": parts, "BR": rows, "BC": elements // rows})
            for parts, elements in (LARGE, MANY)
            for rows in (1, 16)
        ),
    ):
        every = numbers | pointers | constants
        assert compile_sm90(kernel, {name: every[name] for name in kernel.arg_names}, warps=4).spilled == 0
