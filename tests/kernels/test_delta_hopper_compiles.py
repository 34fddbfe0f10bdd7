"""What the delta rule's Hopper kernels take on sm_90, found by the compiler without a GPU."""

import pytest
import triton.language as tl

from kernels import delta_hopper_launch
from kernels.delta_hopper import shared_layout
from kernels.delta_hopper_backward import backward_kernel
from kernels.delta_hopper_carry import combine_kernel, forward_carry_kernel, reverse_carry_kernel
from kernels.delta_hopper_walk import forward_kernel
from tests.kernels.offline import compile_sm90
from tests.kernels.test_walk_compiles import SMEM

C = delta_hopper_launch.CHUNK
FLAGS = {"FIRST": False, "LAST": False, "DLAST": False}


def described(*block):
    return f"tensordesc<bf16{list(block)},{shared_layout(block[-1], len(block))!r}>"


def compile_one(kernel, width, *, gated, tile, keep):
    """One kernel with K = V = width, as training without a state runs it."""
    runtime = {p.name: p.annotation_type or "*fp32+" for p in kernel.params if not p.is_constexpr}
    if kernel is not combine_kernel:
        runtime |= dict.fromkeys(("q", "k", "dq", "dk"), described(1, C, 1, width)) | {"h": described(1, C, C)}
        columns = width if kernel is backward_kernel else C
        runtime |= dict.fromkeys(("v", "o", "errors", "do", "dv"), described(1, C, 1, columns))
        runtime |= {"states": described(1, width, columns)}
    walks = tile // C
    constants = {"K": width, "V": width, "BK": width, "BV": C, "D": width, "C": C, "TILE": 16, "DOT": tl.bfloat16}
    constants |= {"WALKS": walks, "WALK_REGISTERS": delta_hopper_launch.WALK_REGISTERS, "MERGE": tl.float16, "STAGES": delta_hopper_launch.STAGES}
    constants |= {"REGISTERS": delta_hopper_launch.REGISTERS[walks], "KEEP": keep, "LATE": delta_hopper_launch.LATE[walks]}
    arguments = runtime | constants | FLAGS | {"GATED": gated, "GATE_GRAD": gated}
    warps = 8 if kernel in (combine_kernel, backward_kernel) else 4
    return compile_sm90(kernel, {name: arguments[name] for name in kernel.arg_names}, warps=warps)


KERNELS = (forward_kernel, backward_kernel, forward_carry_kernel, reverse_carry_kernel, combine_kernel)
# Bytes of spilled registers at width 128: what the compilers of Triton 3.6 and 3.7 give at most, rounded up; none at 64.
SPILLS = {forward_kernel: 160, backward_kernel: 120, forward_carry_kernel: 0, reverse_carry_kernel: 20, combine_kernel: 80}


def check(kernel, width, *, gated, tile=None, keep=True, spilled=0):
    tile = tile or (width if kernel in (forward_kernel, backward_kernel) else C)
    used = compile_one(kernel, width, gated=gated, tile=tile, keep=keep)
    assert used.spilled <= spilled, used.spilled
    assert used.shared <= SMEM
    if kernel is not combine_kernel:
        assert "wgmma.mma_async" in used.ptx
        solves = kernel is not backward_kernel  # the products of 16 x 16 blocks are those of a warp
        assert ("mma.sync" in used.ptx.replace("wgmma.mma_async.sync", "")) == solves


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.__name__)
def test_the_main_configuration(kernel):
    check(kernel, 128, gated=True, spilled=SPILLS[kernel])


@pytest.mark.slow
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("width", "tile"), [(128, 128), (128, 64), (64, 64)])
def test_walks_with_and_without_training(width, tile, gated, keep):
    check(forward_kernel, width, gated=gated, tile=tile, keep=keep, spilled=SPILLS[forward_kernel] if tile > C else 32)


@pytest.mark.slow
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("kernel", KERNELS[1:], ids=lambda kernel: kernel.__name__)
def test_every_configuration(kernel, width, gated):
    check(kernel, width, gated=gated, spilled=SPILLS[kernel] if width > C else 0)
