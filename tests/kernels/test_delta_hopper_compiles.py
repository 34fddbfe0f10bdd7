"""What the delta rule's Hopper kernels take on sm_90, found by the compiler without a GPU."""

import pytest
import triton.language as tl

from kernels import delta_hopper_launch, delta_hopper_transposed, delta_hopper_walk
from kernels.delta_hopper import shared_layout
from kernels.delta_hopper_backward import backward_kernel
from kernels.delta_hopper_carry import combine_kernel, forward_carry_kernel, reverse_carry_kernel
from tests.kernels.offline import compile_sm90
from tests.kernels.test_walk_compiles import SMEM

C = delta_hopper_launch.CHUNK
FLAGS = {"FIRST": False, "LAST": False, "DLAST": False}
FORWARD, TRANSPOSED = delta_hopper_walk.forward_kernel, delta_hopper_transposed.forward_kernel


def described(*block):
    return f"tensordesc<bf16{list(block)},{shared_layout(block[-1], len(block))!r}>"


def compile_one(kernel, width, *, gated, tile=None, keep=True):
    """One kernel with K = V = width, as training without a state runs it."""
    whole = kernel in (FORWARD, backward_kernel)
    tile = tile or (width if whole else C)
    groups = 2 if whole and tile == width else 1
    runtime = {p.name: p.annotation_type or "*fp32+" for p in kernel.params if not p.is_constexpr}
    if kernel is not combine_kernel:
        runtime |= dict.fromkeys(("q", "k", "dq", "dk"), described(1, C, 1, width)) | {"h": described(1, C, C)}
        runtime |= dict.fromkeys(("v", "o", "errors", "do", "dv"), described(1, C, 1, tile))
        runtime |= {"states": described(1, width, tile)}
    constants = {"K": width, "V": width, "BK": width, "BV": tile, "D": width, "C": C, "TILE": 16, "DOT": tl.bfloat16}
    constants |= {"GROUPS": groups, "MERGE": tl.float16, "KEEP": keep, "STAGES": delta_hopper_launch.STAGES}
    constants |= {"WALKS": width // C, "SOLVERS": delta_hopper_launch.solvers_of(width, gated=gated)}
    if kernel is FORWARD:
        constants |= {"STAGES": delta_hopper_launch.stages_of(tile, width)}
    arguments = runtime | constants | FLAGS | {"GATED": gated, "GATE_GRAD": gated}
    warps = 8 if kernel is combine_kernel else 4 * groups
    return compile_sm90(kernel, {name: arguments[name] for name in kernel.arg_names}, warps=warps)


KERNELS = (FORWARD, backward_kernel, forward_carry_kernel, reverse_carry_kernel, combine_kernel)
# Bytes of spilled registers at width 128: what the compilers of Triton 3.6 and 3.7 give at most, rounded up; none at 64.
SPILLS = {FORWARD: 0, backward_kernel: 120, forward_carry_kernel: 0, reverse_carry_kernel: 20, combine_kernel: 80}


def check(kernel, width, *, gated, tile=None, keep=True, spilled=0):
    used = compile_one(kernel, width, gated=gated, tile=tile, keep=keep)
    assert used.spilled <= spilled, used.spilled
    assert used.shared <= SMEM
    if kernel is not combine_kernel:
        assert "wgmma.mma_async" in used.ptx
        solves = kernel is TRANSPOSED and delta_hopper_launch.solvers_of(width, gated=gated) > 0  # in blocks of 16 x 16
        assert ("mma.sync" in used.ptx.replace("wgmma.mma_async.sync", "")) == solves


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.__name__)
def test_the_main_configuration(kernel):
    check(kernel, 128, gated=True, spilled=SPILLS[kernel])


OTHERS = [(width, gated, keep) for width in (64, 128) for gated in (False, True) for keep in (False, True)]
# Bytes of spilled registers by width and decays, at most; ptxas 13.5 spills 20, 20, 80 and 0.
BESIDE_SPILLS = {(64, False): 20, (64, True): 160, (128, False): 120, (128, True): 20}


@pytest.mark.parametrize(
    ("width", "gated", "keep"),
    [(128, False, True), *(pytest.param(width, gated, keep, marks=pytest.mark.slow) for width, gated, keep in OTHERS)],
)
def test_transposed_walks(width, gated, keep):
    check(TRANSPOSED, width, gated=gated, keep=keep, spilled=BESIDE_SPILLS[width, gated])


@pytest.mark.slow
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("tile", [32, 64])
def test_walks_over_some_of_the_columns(tile, gated):
    check(FORWARD, 128, gated=gated, tile=tile, spilled=20)


@pytest.mark.slow
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.__name__)
def test_every_configuration(kernel, width, gated):
    check(kernel, width, gated=gated, spilled=SPILLS[kernel] if width > C else 0)
