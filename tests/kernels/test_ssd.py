"""What the kernels between Mamba-2's projection and gate take on sm_90, and what they refuse."""

import pytest
import torch

from kernels.narrow import ssd_backward_gluon, ssd_forward_gluon
from kernels.narrow import ssd_launch as launch
from kernels.narrow.ssd_backward_triton import ssd_backward
from kernels.narrow.ssd_forward_triton import ssd_behind, ssd_forward
from kernels.ssd import Conv, Heads, Sizes, State, ssd
from tests.kernels import cases_ssd as cases
from tests.kernels.offline import compile_sm90

CONFIGS = {ssd_forward: launch.FORWARD[16], ssd_behind: launch.BEHIND, ssd_backward: launch.BACKWARD}


@pytest.mark.parametrize(
    ("kernel", "states", "dtype"),
    [*((kernel, 16, "*bf16+") for kernel in CONFIGS), (ssd_backward, 24, "*bf16+"), (ssd_backward, 16, "*fp32+")],
)
def test_compiles_for_sm90(kernel, states: int, dtype: str):
    narrow = dict.fromkeys(("xbc", "dy", "raw", "y", "kept", "dkept", "dxbc", "draw"), dtype)
    wide = dict.fromkeys(("bias", "log_rate", "skip", "parts"), "*fp32+")
    sizes = dict.fromkeys(("length", "per_member", "raw_t", "draw_t"), "i32")
    chunk = launch.FP32_CHUNK if dtype == "*fp32+" else launch.CHUNK
    config, padded = CONFIGS[kernel], max(16, 1 << (states - 1).bit_length())
    flags = {"H": 4, "P": 64, "G": 1, "N": states, "BN": padded, "BP": launch.COLUMNS, "C": chunk, "STAGES": config.stages}
    every = narrow | wide | sizes | flags
    used = compile_sm90(kernel, {name: every[name] for name in kernel.arg_names}, warps=config.warps, maxnreg=config.registers)
    assert used.spilled <= 200
    assert used.shared <= 48 << 10


@pytest.mark.parametrize(("states", "heads", "whole"), [(16, 4, True), (16, 4, False), (8, 8, True), (24, 2, True)])
@pytest.mark.parametrize("place", [0, 1])
def test_one_warp_compiles_for_sm90(place: int, states: int, heads: int, whole: bool):
    kernel = (ssd_forward_gluon.ssd_forward, ssd_backward_gluon.ssd_backward)[place]
    tensors = dict.fromkeys(("xbc", "dy", "raw", "y", "kept", "dkept", "dxbc", "draw"), "*bf16+")
    wide = dict.fromkeys(("bias", "log_rate", "skip", "parts"), "*fp32+")
    sizes = dict.fromkeys(("length", "per_member", "raw_t", "draw_t"), "i32")
    padded = max(16, 1 << (states - 1).bit_length())
    flags = {"H": heads, "P": 64, "G": 1, "N": states, "BN": padded, "C": launch.CHUNK, "HEADS": heads, "WHOLE": whole}
    every = tensors | wide | sizes | flags
    given = {name: every[name] for name in kernel.arg_names}
    used = compile_sm90(kernel, given, warps=1)
    assert used.spilled <= (200 if states == 24 else 0)  # 24 bytes, 144 by Triton 3.6
    assert used.reread <= (40 if states == 24 else 0)
    assert used.shared <= 24 << 10


@pytest.mark.parametrize("shape", cases.SHAPES)
def test_torch_form(shape: cases.Shape):
    cases.check(shape, "cpu", torch.float32, "chunked", beside=True)


def test_members_of_the_torch_form():
    cases.check_members("cpu", "chunked")


def test_a_sequence_in_two_segments():
    shape = cases.SHAPES[1]
    row, taps, bias, *heads = cases.draw(shape).values()
    given = Conv(taps, bias), Heads(*heads), Sizes(shape.G, shape.N, shape.P)
    state = State(torch.zeros(shape.B, shape.H, shape.N, shape.P), torch.zeros(shape.B, cases.TAPS - 1, len(taps)))
    whole, _, _ = ssd(row, *given)
    first, _, state = ssd(row[:, :15], *given, state)
    second, _, _ = ssd(row[:, 15:], *given, state)
    torch.testing.assert_close(torch.cat((first, second), 1), whole)


def test_rows_that_hold_too_little_are_refused():
    _, taps, bias, *heads = cases.draw(cases.SHAPES[0]).values()
    with pytest.raises(ValueError, match="row has 32 numbers; 1 heads of 16 in 1 groups of 8 states need 33"):
        ssd(torch.randn(1, 2, 32), Conv(taps, bias), Heads(*heads), Sizes(1, 8, 16))
