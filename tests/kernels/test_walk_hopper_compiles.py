"""What the Hopper walks of linear attention take on sm_90, found by the compiler without a GPU."""

import pytest
import triton.language as tl

from kernels import walk_hopper, walk_hopper_launch
from kernels.delta_hopper import shared_layout
from tests.kernels.offline import compile_sm90
from tests.kernels.test_walk_compiles import SMEM

C = walk_hopper_launch.CHUNK
FORWARD, BACKWARD = walk_hopper.forward_kernel, walk_hopper.backward_kernel
TOGETHER, QUERIES_AND_KEYS, VALUES = (0, 3), (0, 2), (2, 1)
HALF_AN_SM = 113 * 1024


def described(width):
    return f"tensordesc<bf16{[1, C, 1, width]},{shared_layout(width, 4)!r}>"


def compile_one(kernel, widths, gate, *, parts=TOGETHER, tiles=1):
    """One kernel as training without a state runs it; gate is 0, 1 or 2."""
    wide_k, wide_v = (max(C, width) for width in widths)
    config = (walk_hopper_launch.FORWARD if kernel is FORWARD else walk_hopper_launch.BACKWARD)[max(wide_k, wide_v)]
    groups = config.groups if tiles == 1 else 1
    tile_k, tile_v = wide_k // tiles, wide_v // tiles
    of_keys, of_values = (wide_k, tile_v) if kernel is FORWARD or parts == VALUES else (tile_k, wide_v)
    runtime = {p.name: p.annotation_type or "*fp32+" for p in kernel.params if not p.is_constexpr}
    blocks = {"q": of_keys, "k": of_keys, "v": of_values, "do": of_values, "o": tile_v, "dq": tile_k, "dk": tile_k, "dv": tile_v}
    runtime |= {name: described(width) for name, width in blocks.items()}
    constants = {"K": widths[0], "V": widths[1], "BK": wide_k, "BV": wide_v, "TK": tile_k, "TV": tile_v, "C": C, "DOT": tl.bfloat16}
    constants |= {"GROUPS": groups, "STAGES": config.stages, "SLOTS": config.slots, "FIRST_PART": parts[0], "PARTS": parts[1]}
    constants |= {"GATE": gate, "START": 0, "DLAST": 0, "LAST": False, "ENTER": False, "GATE_GRAD": gate == 2}
    arguments = runtime | constants
    return compile_sm90(kernel, {name: arguments[name] for name in kernel.arg_names}, warps=4 * groups)


def check(used, spilled):
    assert used.spilled <= spilled, used.spilled
    assert used.shared <= SMEM
    assert "wgmma.mma_async" in used.ptx
    assert "mma.sync" not in used.ptx.replace("wgmma.mma_async.sync", "")


@pytest.mark.parametrize(
    ("kernel", "width", "gate", "spilled"),
    [
        (FORWARD, 64, 2, 0),
        (BACKWARD, 64, 2, 40),
        (FORWARD, 128, 0, 0),
        pytest.param(FORWARD, 128, 2, 80, marks=pytest.mark.slow),
        pytest.param(BACKWARD, 128, 0, 0, marks=pytest.mark.slow),
        pytest.param(BACKWARD, 128, 2, 360, marks=pytest.mark.slow),
    ],
)
def test_the_main_configurations(kernel, width, gate, spilled):
    used = compile_one(kernel, (width, width), gate)
    check(used, spilled)
    if kernel is BACKWARD and width == 64:
        assert used.shared <= HALF_AN_SM, "two programs share an SM"


@pytest.mark.slow
@pytest.mark.parametrize(("kernel", "parts"), [(FORWARD, TOGETHER), (BACKWARD, QUERIES_AND_KEYS), (BACKWARD, VALUES)])
@pytest.mark.parametrize(("widths", "tiles"), [((128, 64), 1), ((128, 128), 4), ((64, 64), 2)])
def test_shared_keys_and_tiles_of_columns(kernel, parts, widths, tiles):
    check(compile_one(kernel, widths, 2, parts=parts, tiles=tiles), 120)
