"""What the delta rule's Hopper kernels take on sm_90, found by the compiler without a GPU."""

import itertools

import pytest
import torch
import triton.language as tl

from kernels.delta_rule import delta_hopper_launch
from kernels.delta_rule.delta_combine_triton import combine_kernel
from kernels.delta_rule.delta_hopper import shared_layout
from kernels.delta_rule.delta_hopper_backward import backward_kernel
from kernels.delta_rule.delta_hopper_carry import carry_kernel
from kernels.delta_rule.delta_hopper_couple import couple_kernel
from kernels.delta_rule.delta_hopper_transposed import forward_kernel
from tests.kernels.offline import compile_sm90
from tests.kernels.test_walk_compiles import SMEM

C = delta_hopper_launch.CHUNK
FLAGS = {"FIRST": False, "LAST": False, "DLAST": False, "GIVEN": False, "BETWEEN": True}


def described(*block):
    return f"tensordesc<bf16{list(block)},{shared_layout(block[-1], len(block))!r}>"


def compile_one(kernel, width, *, gated, **more):
    """One kernel with K = V = width, as training without a state runs it."""
    tile = width if kernel is backward_kernel else C
    runtime = {p.name: p.annotation_type or "*fp32+" for p in kernel.params if not p.is_constexpr}
    if kernel is not combine_kernel:
        runtime |= dict.fromkeys(("q", "k", "dq", "dk"), described(1, C, 1, width)) | {"h": described(1, C, C)}
        runtime |= dict.fromkeys(("v", "o", "errors", "do", "dv"), described(1, C, 1, tile))
        runtime |= {"states": described(1, width, tile)}
    constants = {"K": width, "V": width, "BK": width, "BV": tile, "D": width, "C": C, "TILE": 16, "DOT": tl.bfloat16}
    constants |= {"MERGE": tl.float16, "KEEP": True, "GATED": gated, "GATE_GRAD": gated}
    arguments = runtime | constants | FLAGS | more
    warps = 8 if kernel in (combine_kernel, backward_kernel) else 4
    capped = {"maxnreg": delta_hopper_launch.COUPLING_REGISTERS} if kernel is couple_kernel else {}
    return compile_sm90(kernel, {name: arguments[name] for name in kernel.arg_names}, warps=warps, **capped)


def check(kernel, width, *, gated, spilled=0, reread=None, **more):
    used = compile_one(kernel, width, gated=gated, **more)
    assert used.spilled <= spilled, used.spilled
    assert reread is None or used.reread <= reread, used.reread
    assert used.shared <= SMEM
    if kernel is not combine_kernel:
        assert "wgmma.mma_async" in used.ptx
        # Couplings are made in blocks of 16 x 16.
        assert ("mma.sync" in used.ptx.replace("wgmma.mma_async.sync", "")) == (more.get("SOLVERS", 0) > 0)
        assert not used.serialised


MANY, FEW, CUT = (8, 2048, 16), (2, 8192, 16), (1, 32768, 16)  # heads fill the chip; do not; a sequence is cut


def planned(monkeypatch, sizes, width, *, gated, keep):
    """The constants of the forward walk of such a batch, length and number of heads."""
    batch, length, heads = sizes
    monkeypatch.setattr(delta_hopper_launch, "multiprocessors", lambda _: 132)
    rows = torch.empty(batch, length, heads, width, device="meta")
    found = delta_hopper_launch.plan_of(rows, rows, gated=gated, keep=keep)
    return {"STAGES": found.stages, "DEPTH": found.depth, "WALKS": found.walks, "SOLVERS": found.solvers}


WALKS = list(itertools.product((MANY, FEW, CUT), (64, 128), (False, True), (False, True)))
# By width and decays, with Triton 3.7 and at most: bytes of spilled registers, and how often loops read them. What Triton 3.6
# compiles spills 16, 16, 40 and 12 bytes with ptxas 13.5, read 2, 2, 9 and 3 times.
FORWARD_SPILLS = {(64, False): (20, 2), (64, True): (40, 2), (128, False): (80, 11), (128, True): (40, 9)}


@pytest.mark.parametrize(
    ("sizes", "width", "gated", "keep"),
    [(MANY, 128, False, True), *(pytest.param(*walk, marks=pytest.mark.slow) for walk in WALKS)],
)
def test_forward_walks(monkeypatch, sizes, width, gated, keep):
    constants = planned(monkeypatch, sizes, width, gated=gated, keep=keep)
    spilled, reread = FORWARD_SPILLS[width, gated]
    check(forward_kernel, width, gated=gated, KEEP=keep, spilled=spilled, reread=reread, **constants)


@pytest.mark.parametrize(
    ("width", "gated"),
    [(128, True), *(pytest.param(*one, marks=pytest.mark.slow) for one in ((128, False), (64, True), (64, False)))],
)
def test_couplings(width, gated):
    """As many programs fit on a multiprocessor as are meant to."""
    used = compile_one(couple_kernel, width, gated=gated)
    assert used.spilled <= 4, used.spilled
    assert used.reread <= 1, used.reread
    assert used.registers * 128 * delta_hopper_launch.COUPLING_PROGRAMS <= 65536
    assert (used.shared + 1024) * delta_hopper_launch.COUPLING_PROGRAMS <= 228 * 1024
    assert "wgmma.mma_async" in used.ptx
    assert "mma.sync" in used.ptx.replace("wgmma.mma_async.sync", "")
    assert not used.serialised


@pytest.mark.parametrize("reverse", [False, True])
def test_carries(reverse):
    check(carry_kernel, 128, gated=True, REVERSE=reverse, STAGES=delta_hopper_launch.CARRY_STAGES[reverse], spilled=20)


# Bytes of spilled registers at width 128: what the compilers of Triton 3.6 and 3.7 give at most, rounded up; at 64 at most 8.
SPILLS = {backward_kernel: 120, combine_kernel: 80}


@pytest.mark.parametrize("kernel", SPILLS, ids=lambda kernel: kernel.__name__)
def test_the_main_configuration(kernel):
    check(kernel, 128, gated=True, spilled=SPILLS[kernel])


@pytest.mark.slow
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("kernel", [*SPILLS, carry_kernel], ids=lambda kernel: kernel.__name__)
def test_every_configuration(kernel, width, gated):
    for reverse in (False, True) if kernel is carry_kernel else (False,):
        spilled = SPILLS.get(kernel, 20) if width > C else 8
        check(kernel, width, gated=gated, REVERSE=reverse, STAGES=delta_hopper_launch.CARRY_STAGES[reverse], spilled=spilled)
