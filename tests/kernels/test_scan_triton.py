"""What the Triton scans take on sm_90, and what their entry point refuses."""

from __future__ import annotations

import re

import pytest
import torch

from kernels.between.parts_triton import DENSE, DENSE_AT_ONCE, LARGE, MANY, dense_sum_kernel, sum_kernel
from kernels.scan import scan, selective_scan
from kernels.scans import selective_scan_columns_launch as columns
from kernels.scans.scan_operator import CHANNELS, FULL, KEPT_EACH, TILE, threads_own_channels
from kernels.scans.scan_segments_triton import segments_kernel
from kernels.scans.scan_triton import BACKWARD_TILE, FORWARD_TILE, scan_backward, scan_forward
from kernels.scans.selective_scan_columns import columns_backward
from kernels.scans.selective_scan_columns_forward import columns_forward
from kernels.scans.selective_scan_gluon import channels_of_a_warp, selective_scan_forward
from kernels.scans.selective_scan_launch import QUAD_WARPS, WARPS, WARPS_ALONE, few_channels
from kernels.scans.selective_scan_quads_backward import quads_backward
from kernels.scans.selective_scan_quads_forward import quads_forward
from kernels.scans.selective_scan_segments import BLOCK, ENOUGH, PROGRAMS, SHORTEST_SEGMENT, enter_segments, segment_ends, share_out
from kernels.scans.selective_scan_triton import selective_scan_backward
from kernels.scans.selective_scan_turn_triton import STATES, TOKENS, turn_kernel
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


def test_forward_alone_has_more_warps():
    sizes = {"N": 16, "C": WARPS_ALONE * channels_of_a_warp(16), "L": TILE, "WARPS": WARPS_ALONE}
    used = compiled(selective_scan_forward, "*bf16+", warps=WARPS_ALONE, gated=False, START=False, KEEP=False, **sizes)
    assert used.spilled == 0
    assert used.registers <= 168, "three programs of 128 threads fit an SM"
    assert used.shared <= 227 * 1024 // 3


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


def compiled_quads(kernel, dtype: str, *, gated: bool, **constants: bool):
    """x, y, b, c, the gate and raw time steps in `dtype`, parts of sums in bf16, the rest in fp32."""
    narrow = ("x", "dx", "y", "dy", "b", "c", "gate", "dgate", *(("dt", "ddt") if gated else ()))
    every = {name: "*fp32+" for name in kernel.arg_names if name.endswith("_ptr")} | {f"{name}_ptr": dtype for name in narrow}
    every |= dict.fromkeys(("db_ptr", "dc_ptr"), "*bf16+") | SIZES | dict.fromkeys(("width", "n_states", "gate_stride"), "i32+")
    every |= dict.fromkeys(("segment_tiles", "state_stride", "channel_stride"), "i32") | constants
    every |= {"GATED": gated, "C": CHANNELS, "L": TILE, "WARPS": QUAD_WARPS}
    return compile_sm90(kernel, {name: every[name] for name in kernel.arg_names}, warps=QUAD_WARPS)


MORE_QUADS = [pytest.param(*case, marks=pytest.mark.slow) for case in (("*bf16+", False), ("*fp16+", True), ("*fp16+", False))]


@pytest.mark.parametrize(("dtype", "gated"), [("*bf16+", True), *MORE_QUADS])
def test_few_channels_are_summed_by_tensor_cores(dtype: str, gated: bool):
    forward = compiled_quads(quads_forward, dtype, gated=gated, KEEP=True)
    assert forward.spilled == 0
    assert forward.registers <= 128
    assert forward.shared <= 227 * 1024 // 4
    assert forward.ptx.count("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32") == TILE
    assert "shfl" not in forward.ptx
    backward = compiled_quads(quads_backward, dtype, gated=gated)
    assert backward.spilled <= (260 if gated else 130)
    assert backward.shared <= 227 * 1024 // 2
    # two or three sums over states of a token; two over channels, in two products for each of a warp's tokens
    assert backward.ptx.count("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32") == TILE * (2 + gated) + 4 * TILE // QUAD_WARPS
    # bias and skip are summed over the tile's tokens
    assert ("shfl" in backward.ptx) == gated


def compiled_columns(kernel, dtype: str, *, warps: int, maxnreg: int | None = None, **constants: int):
    """x, y, b and c in `dtype`, kept states and parts of sums in bf16, the rest in fp32."""
    every = {name: "*fp32+" for name in kernel.arg_names if name.endswith("_ptr")}
    every |= {f"{name}_ptr": dtype for name in ("x", "dx", "y", "dy", "b", "c")}
    every |= dict.fromkeys(("db_ptr", "dc_ptr", "states_ptr"), "*bf16+") | SIZES | {"row_stride": "i32", "WIDTH": 4096} | constants
    if constants["STEPPED"]:
        every["dt_ptr" if "y_ptr" in kernel.arg_names else "ddt_ptr"] = dtype
    return compile_sm90(kernel, {name: every[name] for name in kernel.arg_names}, warps=warps, maxnreg=maxnreg)


GROUPS = [(16, 16, False), (8, 8, False), (24, 16, False), (24, 8, True)]
"""States of a channel, those of a launch, and whether it adds to what an earlier one stored."""
SLOW_KINDS = [(group, *kind) for group in GROUPS for kind in (("*bf16+", False), ("*fp16+", True))]


@pytest.mark.parametrize(
    ("group", "dtype", "stepped"),
    [*((group, "*bf16+", True) for group in GROUPS), *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW_KINDS)],
)
def test_threads_that_own_channels_move_nothing_between_lanes(group: tuple[int, int, bool], dtype: str, stepped: bool):
    every, n_states, add = group
    kept = {"ALL": every, "N": n_states, "ADD": add, "EACH": KEPT_EACH}
    threads = {"C": columns.WARPS * CHANNELS, "WARPS": columns.WARPS, "L": TILE}
    alone = stepped and not add  # the first launch has made time steps and skip
    sides = {"STEPPED": alone, "SKIP": alone, "START": True}
    forward = compiled_columns(columns_forward, dtype, warps=columns.WARPS, maxnreg=columns.REGISTERS, **sides, **kept, **threads)
    sides = {"STEPPED": stepped, "SKIP": alone, "FINAL": True}
    registers = columns.BACK_REGISTERS[n_states]
    backward = compiled_columns(columns_backward, dtype, warps=1, maxnreg=registers, L=columns.BACK_TILE, **sides, **kept)
    assert forward.spilled <= (16 if n_states == 16 else 0)
    assert backward.spilled <= (96 if n_states == 16 else 72)
    programs = 8 if registers is None else 65536 // (32 * registers)
    assert programs == (8 if n_states == 16 else 12)
    assert backward.shared <= 227 * 1024 // programs - 1024, "so many programs on an SM"
    assert "shfl" not in forward.ptx + backward.ptx
    # two sums over channels of a token, of 32 channels in two products that have 16 rows; one exponential an element
    products = columns.BACK_TILE * 4 * n_states // 16
    assert backward.ptx.count("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32") == products
    assert backward.ptx.count("ex2.approx") == columns.BACK_TILE * (n_states + stepped)
    assert backward.ptx.count("prefetch.global.L1") == 5 + columns.BACK_TILE // KEPT_EACH + 2 * add


@pytest.mark.parametrize(
    ("change", "own"),
    [
        ({}, True),
        ({"batch": 6}, False),
        ({"length": TILE + 1}, False),
        ({"width": 4100}, False),
        ({"n_states": 8}, True),
        ({"n_states": 24}, True),
        ({"n_states": 4}, False),
        ({"n_states": 32}, False),
        ({"n_states": 8, "length": TILE - 8}, False),
        ({"n_states": 24, "width": 4096 + 8}, False),
        ({"n_states": 24, "gated": True}, False),
        ({"dtype": torch.float32}, False),
        ({"gated": True}, False),
    ],
)
def test_threads_own_channels_of_whole_tiles_that_fill_a_device(change: dict, own: bool):
    case = {
        "batch": FULL // 128 + 1,
        "length": TILE,
        "width": 4096,
        "n_states": 16,
        "dtype": torch.float16,
        "gated": False,
    } | change
    x, b = (torch.empty(case["batch"], case["length"], case[n], dtype=case["dtype"], device="meta") for n in ("width", "n_states"))
    assert threads_own_channels(x, b, gated=case["gated"]) == own


@pytest.mark.parametrize("reverse", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_ends_of_segments_stay_inside_of_threads(reverse: bool):
    assert compiled_quads(segment_ends, "*bf16+", gated=True, REVERSE=reverse).spilled == 0
    every = SIZES | {name: "*fp32+" for name in enter_segments.arg_names if name.endswith("_ptr")}
    every |= {"FIRST": True, "REVERSE": reverse, "BLOCK": BLOCK}
    used = compile_sm90(enter_segments, {name: every[name] for name in enter_segments.arg_names}, warps=4)
    assert used.spilled == used.shared == 0


def test_segments_are_cut_where_few_programs_are_left():
    assert share_out(ENOUGH, 1000, 1) == (1, 1000)
    assert share_out(1, 2 * SHORTEST_SEGMENT - 1, 1) == (1, 2 * SHORTEST_SEGMENT - 1)
    n_segments, tiles = share_out(1, 100_000, 1)
    assert PROGRAMS // 2 <= n_segments <= PROGRAMS
    assert (n_segments - 1) * tiles < 100_000 <= n_segments * tiles


@pytest.mark.parametrize(
    ("batch", "n_states", "dtype", "few"),
    [
        (2, 16, torch.bfloat16, True),
        (8, 16, torch.bfloat16, False),
        (2, 16, torch.float32, False),
        (2, 32, torch.float16, False),
    ],
)
def test_channels_are_few_below_a_full_device(batch: int, n_states: int, dtype: torch.dtype, few: bool):
    x, b = (torch.empty(batch, 5, width, dtype=dtype, device="meta") for width in (4096, n_states))
    assert few_channels(x, b) == few


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


def test_dense_parts_are_read_in_the_widest_loads():
    parts = dict.fromkeys(("first", "second", "first_out", "second_out"), "*bf16+")
    every = parts | {"n_parts": "i32", "columns": "i32+", "BC": DENSE, "AT_ONCE": DENSE_AT_ONCE}
    for row, stride in ((1, 1), (16, 24), (8, 24)):
        every |= {"ROW": row, "STRIDE": stride}
        used = compile_sm90(dense_sum_kernel, {name: every[name] for name in dense_sum_kernel.arg_names}, warps=4)
        assert used.spilled == 0
        assert used.ptx.count("ld.global.v4.b32") == DENSE_AT_ONCE
        assert used.ptx.count("st.global.v4.b32") == 1
