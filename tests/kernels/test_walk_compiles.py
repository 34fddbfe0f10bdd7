"""What the shipped configurations of the walks take on sm_90, found by the compiler without a GPU."""

import pytest
import torch
import triton.language as tl

from kernels.walks import walk, walk_config, walk_crossings, walk_decays, walk_grouped
from kernels.walks.walk_crossings_triton import crossing_kernel, entering_kernel, kept_crossing_kernel
from kernels.walks.walk_decays_triton import decay_gradient_kernel
from kernels.walks.walk_forward_triton import forward_kernel, segment_kernel
from kernels.walks.walk_gradients_triton import sum_heads_kernel
from kernels.walks.walk_grouped_triton import keys_kernel, outputs_kernel, queries_kernel, states_kernel
from kernels.walks.walk_triton import FULL_PROBE, NO_PROBE, SEGMENTS, SEQUENCES, STATE_PROBE, WHOLE
from tests.kernels.offline import compile_sm90

POINTERS = ("q", "k", "v", "b", "c", "o", "do", "dq", "dk", "dv")
DTYPES = {torch.bfloat16: ("*bf16+", tl.bfloat16), torch.float16: ("*fp16+", tl.float16), torch.float32: ("*fp32+", tl.float32)}
SMEM = 227 * 1024


def compile_walk(kernel, config, widths, gate, dtype, *, pieces=WHOLE, flags=None):
    """One kernel; gate is 0, 1 or 2."""
    pointer, dot = DTYPES[dtype]
    (k_dim, v_dim), gate_grad = widths, gate == 2
    runtime = {p.name: p.annotation_type or "*fp32+" for p in kernel.params if not p.is_constexpr}
    tiles = {name: walk_config.tile_of(config, width, dtype) for name, width in (("TK", k_dim), ("TV", v_dim))}
    value_block = tiles["TV"] if kernel in (forward_kernel, segment_kernel) else walk.padded(v_dim)
    constants = {"K": k_dim, "V": v_dim, "BK": walk.padded(k_dim), "BV": value_block, "UNIT": 8, "PIECES": pieces.value, **tiles}
    constants |= {"C": config.chunk, "GATE": gate, "FIRST": False, "LAST": False, "DLAST": False, "GATE_GRAD": gate_grad}
    constants |= {"DOT": dot, "PRECISION": tl.constexpr(walk._precision(dtype)), "STAGES": config.stages}
    constants |= {"TURNED": config.turned, "REVERSE": True, **(flags or {})}
    starts = {"starts": "*i64"} if pieces is SEQUENCES else {}
    arguments = runtime | dict.fromkeys(POINTERS, pointer) | constants | starts
    return compile_sm90(kernel, {name: arguments[name] for name in kernel.arg_names}, warps=config.warps)


def compiled(widths, gate, dtype, *, pieces=WHOLE):
    """Every kernel of a forward and a backward pass, with its name."""
    config = walk_config.forward_config(*widths, dtype, gated=gate != 0)
    yield forward_kernel, compile_walk(forward_kernel, config, widths, gate, dtype, pieces=pieces)
    config = walk_config.backward_config(*widths, dtype, gated=gate != 0)
    probe = NO_PROBE if gate != 2 else STATE_PROBE if config.together else FULL_PROBE
    for kernel, _, own, flags in walk._backward_launches(config, 1, 1):
        flags |= {"QUERY_PROBE": probe.value}
        yield kernel, compile_walk(kernel, own, widths, gate, dtype, pieces=pieces, flags=flags)


def check(widths, gate, dtype, spill, *, pieces=WHOLE):
    for kernel, used in compiled(widths, gate, dtype, pieces=pieces):
        assert used.spilled <= spill, (kernel.__name__, used.spilled)
        assert used.shared <= SMEM
        if dtype != torch.float32:
            assert "wgmma.mma_async" in used.ptx
            # the state of a narrow head has fewer rows than the 64 of a warp group's product
            assert min(widths) <= 32 or "mma.sync" not in used.ptx.replace("wgmma.mma_async.sync", "")


@pytest.mark.parametrize(
    ("widths", "gate", "spill"),
    [
        ((64, 64), 2, 240),
        ((128, 128), 0, 0),
        pytest.param((64, 64), 0, 0, marks=pytest.mark.slow),
        pytest.param((128, 128), 2, 360, marks=pytest.mark.slow),
        pytest.param((128, 64), 0, 320, marks=pytest.mark.slow),
        pytest.param((256, 256), 0, 0, marks=pytest.mark.slow),
    ],
)
def test_sixteen_bit(widths, gate, spill):
    check(widths, gate, torch.bfloat16, spill)


GROUPED = {
    states_kernel: (walk_grouped.STATES, 0),
    outputs_kernel: (walk_grouped.OUTPUTS, 0),
    queries_kernel: (walk_grouped.QUERIES, 80),
    keys_kernel: (walk_grouped.KEYS, 320),
}


@pytest.mark.parametrize(
    "kernel", [states_kernel, pytest.param(outputs_kernel, marks=pytest.mark.slow), queries_kernel, keys_kernel]
)
def test_heads_that_share_keys(kernel):
    """Mamba-2: 128 keys, 64 values, a scalar gate."""
    (launch, spill), widths = GROUPED[kernel], {"K": 128, "V": 64, "BK": 128, "BV": 64}
    runtime = {p.name: p.annotation_type or "*fp32+" for p in kernel.params if not p.is_constexpr}
    constants = {"UNIT": 8, "C": walk_grouped.CHUNK, "GATE": 2, "GATE_GRAD": True, "GIVEN": False, "LAST": False}
    constants |= {"PIECES": WHOLE.value, "REVERSE": True, "DOT": tl.bfloat16, "PRECISION": tl.constexpr(None)}
    arguments = runtime | dict.fromkeys((*POINTERS, "kept", "dkept"), "*bf16+") | widths | constants | launch
    used = compile_sm90(kernel, {name: arguments[name] for name in kernel.arg_names}, warps=launch["num_warps"])
    assert used.spilled <= spill
    assert used.shared <= SMEM // 2, "two programs share an SM"
    assert "wgmma.mma_async" in used.ptx


@pytest.mark.slow
@pytest.mark.parametrize("pieces", [SEQUENCES, SEGMENTS])
def test_pieces(pieces):
    check((64, 64), 2, torch.bfloat16, 260, pieces=pieces)


def test_what_runs_beside_the_walks():
    """Sums of segments, of decays and of heads, and what crosses the ends of segments."""
    assert compile_walk(segment_kernel, walk_config.SEGMENT_16[128], (128, 128), 2, torch.bfloat16).spilled == 0
    of_decays = {"PARTS": 2, "READS": 1, "GATE": 2, "APART": False, "PIECES": SEGMENTS.value, "C": 64}
    of_decays |= {"ENDS": True, "ROWS": walk_decays.DECAY_ROWS}
    of_heads = {"WIDTH": 128, "BLOCK": 128, "ROWS": walk.SUM_ROWS}
    of_states = {"SIZE": 128 * 128, "BLOCK": walk_crossings.BLOCK, "STAGES": walk_crossings.STAGES}
    of_states |= {"GIVEN": True, "ENDS": True, "DOT": tl.bfloat16}
    beside = ((decay_gradient_kernel, 8, of_decays), (sum_heads_kernel, 4, of_heads))
    crossings = ((kernel, 4, of_states) for kernel in (entering_kernel, crossing_kernel, kept_crossing_kernel))
    for kernel, warps, constants in (*beside, *crossings):
        runtime = {p.name: p.annotation_type or "*fp32+" for p in kernel.params if not p.is_constexpr}
        arguments = runtime | dict.fromkeys(("kept", "dkept"), "*bf16+") | constants
        assert compile_sm90(kernel, {name: arguments[name] for name in kernel.arg_names}, warps=warps).spilled <= 80


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("gate", [0, 1, 2])
@pytest.mark.parametrize("widths", [(16, 16), (60, 60), (64, 64), (128, 64), (128, 128), (256, 256)], ids=str)
def test_every_configuration_compiles(widths, gate, dtype):
    check(widths, gate, dtype, 8000)
