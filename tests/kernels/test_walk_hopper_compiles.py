"""What the Hopper walk of linear attention takes on sm_90, found by the compiler without a GPU."""

import pytest
import triton.language as tl

from kernels import walk_hopper, walk_hopper_launch
from kernels.delta_hopper import shared_layout
from tests.kernels.offline import compile_sm90
from tests.kernels.test_walk_compiles import SMEM

C = walk_hopper_launch.CHUNK
FORWARD = walk_hopper.forward_kernel


def compile_one(width, gate):
    """The kernel as a call without a state runs it; gate is 0, 1 or 2."""
    config = walk_hopper_launch.FORWARD[width]
    runtime = {p.name: p.annotation_type or "*fp32+" for p in FORWARD.params if not p.is_constexpr}
    block = f"tensordesc<bf16{[1, C, 1, width]},{shared_layout(width, 4)!r}>"
    runtime |= dict.fromkeys(("q", "k", "v", "o"), block)
    constants = {"K": width, "V": width, "W": width, "C": C, "DOT": tl.bfloat16, "GROUPS": config.groups, "STAGES": config.stages}
    constants |= {"GATE": gate, "FIRST": False, "LAST": False}
    arguments = runtime | constants
    return compile_sm90(FORWARD, {name: arguments[name] for name in FORWARD.arg_names}, warps=4 * config.groups)


@pytest.mark.parametrize(
    ("width", "gate", "spilled"),
    [
        (64, 1, 0),
        (128, 2, 80),
        pytest.param(64, 0, 0, marks=pytest.mark.slow),
        pytest.param(128, 0, 0, marks=pytest.mark.slow),
        pytest.param(128, 1, 80, marks=pytest.mark.slow),
    ],
)
def test_what_ships(width, gate, spilled):
    used = compile_one(width, gate)
    assert used.spilled <= spilled, used.spilled
    assert SMEM // 2 < used.shared <= SMEM, "one program has an SM for itself"
    assert "wgmma.mma_async" in used.ptx
    assert "mma.sync" not in used.ptx.replace("wgmma.mma_async.sync", "")
