"""What the Hopper walks of linear attention take on sm_90, found by the compiler without a GPU."""

import pytest
import triton.language as tl
from triton.experimental.gluon.language import NVMMASharedLayout

from kernels.delta_rule.delta_hopper import shared_layout
from kernels.walks import (
    walk_hopper,
    walk_hopper_back,
    walk_hopper_plan,
    walk_hopper_shared,
    walk_hopper_shared_launch,
    walk_hopper_states,
)
from tests.kernels.offline import compile_sm90
from tests.kernels.test_walk_compiles import SMEM

C = walk_hopper_plan.CHUNK
REGISTERS = 1 << 16
FORWARD, BACKWARD, STATES = walk_hopper.forward_kernel, walk_hopper_back.backward_kernel, walk_hopper_states.states_kernel


def compile_one(kernel, gate, config, widths, constants):
    """The kernel as a call without states runs it; gate is 0, 1 or 2."""
    wide_k, wide_v = widths
    runtime = {p.name: p.annotation_type or "*fp32+" for p in kernel.params if not p.is_constexpr}
    blocks = {width: f"tensordesc<bf16{[1, C, 1, width]},{shared_layout(width, 4)!r}>" for width in widths}
    described = dict.fromkeys(("q", "k", "dq", "dk", "b"), blocks[wide_k]) | dict.fromkeys(
        ("v", "o", "do", "dv", "c"), blocks[wide_v]
    )
    described["states"] = f"tensordesc<bf16{[1, wide_k, wide_v]},{shared_layout(wide_v, 3)!r}>"
    described["line_rows"] = f"tensordesc<fp32{[1, C]},{NVMMASharedLayout(0, 32, rank=2)!r}>" if gate == 2 else blocks[wide_k]
    runtime |= {name: block for name, block in described.items() if name in runtime}
    shared = {"K": wide_k, "V": wide_v, "BK": wide_k, "BV": wide_v, "W": wide_k, "C": C, "DOT": tl.bfloat16, "GATE": gate}
    flags = {
        **dict.fromkeys(("FIRST", "GIVEN", "KEEP", "LAST", "DLAST", "REVERSE"), False),
        "GATE_GRAD": gate == 2,
    }
    flags |= {"PARTS": walk_hopper_shared_launch.PARTS, "LATE": gate == 2}
    arguments = runtime | shared | flags | {"GROUPS": config.groups, "STAGES": config.stages} | constants
    return compile_sm90(kernel, {name: arguments[name] for name in kernel.arg_names}, warps=4 * config.groups)


def check(used, programs, spilled=0):
    assert used.spilled <= spilled, used.spilled
    assert SMEM // (programs + 1) < used.shared <= SMEM // programs, "so many programs share an SM"
    assert "wgmma.mma_async" in used.ptx
    assert "mma.sync" not in used.ptx.replace("wgmma.mma_async.sync", "")


slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("width", "gate"),
    [(64, 1), (128, 2), *(pytest.param(*case, marks=slow) for case in ((64, 0), (64, 2), (128, 0), (128, 1)))],
)
def test_forward(width, gate):
    check(compile_one(FORWARD, gate, walk_hopper_plan.FORWARD[width], (width, width), {}), 1)


@pytest.mark.parametrize("gate", [2, pytest.param(0, marks=slow)])
def test_heads_that_share_keys(gate):
    check(compile_one(FORWARD, gate, walk_hopper_plan.SHARED, (128, 64), {"KEEP": True}), 1)


@pytest.mark.parametrize(
    ("width", "gate"), [(128, 2), *(pytest.param(*case, marks=slow) for case in ((64, 0), (64, 1), (64, 2), (128, 0), (128, 1)))]
)
def test_backward(width, gate):
    config = walk_hopper_plan.BACKWARD[width]
    used = compile_one(BACKWARD, gate, config, (width, width), {"BACK_STAGES": config.back, "SLOTS": config.slots})
    check(used, 2 - width // 128, 8)


@pytest.mark.parametrize(
    ("width", "gate"), [(128, 2), *(pytest.param(*case, marks=slow) for case in ((64, 0), (64, 1), (64, 2), (128, 0), (128, 1)))]
)
def test_sums_of_segments(width, gate):
    for reverse in (False, True):
        used = compile_one(STATES, gate, walk_hopper_plan.SUMS[width], (width, width), {"REVERSE": reverse})
        check(used, 2 if width == 128 else 3)


@pytest.mark.parametrize("gate", [2, pytest.param(0, marks=slow), pytest.param(1, marks=slow)])
def test_states_between_chunks(gate):
    check(compile_one(STATES, gate, walk_hopper_plan.KEPT, (128, 64), {"KEEP": True, "REVERSE": True}), 2)


@pytest.mark.parametrize("gate", [2, pytest.param(0, marks=slow), pytest.param(1, marks=slow)])
def test_gradients_of_heads_that_share_keys(gate):
    """Two programs of each share an SM, and one of queries fits beside one that walks states."""
    config = walk_hopper_plan.Config(1, walk_hopper_plan.GROUPED)
    queries = compile_one(walk_hopper_shared.queries_kernel, gate, config, (128, 64), {})
    keys = compile_one(walk_hopper_shared.keys_kernel, gate, config, (128, 64), {})
    check(queries, 2)
    check(keys, 2, 80)
    walk = compile_one(STATES, gate, walk_hopper_plan.KEPT, (128, 64), {"KEEP": True, "REVERSE": True})
    assert walk.shared + queries.shared <= SMEM
    assert 128 * (2 * walk.registers + queries.registers) <= REGISTERS
    assert not queries.serialised and not keys.serialised
