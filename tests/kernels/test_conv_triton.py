"""What the Triton short convolution takes on sm_90, and what its entry points refuse."""

from __future__ import annotations

import pytest
import torch

from kernels.conv import MOST_TAPS, short_conv, short_conv_step
from kernels.convolutions.conv_backward_triton import AT_ONCE, COLUMNS, REGISTERS, short_conv_backward, sum_shares
from kernels.convolutions.conv_triton import AHEAD, CHANNELS, RUN, STEP_CHANNELS, WARPS, short_conv_forward, short_conv_update
from kernels.dispatch import use_backend
from tests.kernels.offline import Resources, compile_sm90

NARROW = ("x_ptr", "y_ptr", "dx_ptr", "dy_ptr", "beside_ptr", "tail_ptr", "new_tail_ptr")
WIDE = ("weight_ptr", "bias_ptr", "parts_ptr", "dweight_ptr", "dbias_ptr")
SIZES = ("n_tokens", "n_places", "sequences_per_member", "walks_per_member", "run_length", "walks", "n_parts")


def compiled(kernel, dtype: str, taps: int, warps: int, *, registers: int | None = None, **own) -> Resources:
    flags = {
        "TAPS": taps,
        "BIAS": True,
        "SILU": True,
        "RUN": RUN,
        "AHEAD": AHEAD,
        "CHANNELS": CHANNELS,
        "FAST": True,
        "BESIDE": False,
    }
    types = dict.fromkeys(NARROW, dtype) | dict.fromkeys(WIDE, "*fp32+") | dict.fromkeys(SIZES, "i32")
    every = types | flags | own
    return compile_sm90(kernel, {name: every[name] for name in kernel.arg_names}, warps=warps, maxnreg=registers)


@pytest.mark.parametrize("dtype", ["*bf16+", "*fp16+", "*fp32+"])
@pytest.mark.parametrize("taps", [3, MOST_TAPS])
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize(("stride", "width"), [(512, 256), (296, 288), (41, 37)])
def test_walks_compile_for_sm90_without_spills(stride: int, width: int, whole: bool, taps: int, dtype: str):
    sizes = {"X_STRIDE": stride, "DX_STRIDE": stride, "WIDTH": width, "WHOLE": whole}
    forward = compiled(short_conv_forward, dtype, taps, WARPS, **sizes)
    few = REGISTERS if whole and dtype != "*fp32+" else None
    backward = compiled(short_conv_backward, dtype, taps, WARPS, registers=few, **sizes)
    for used in (forward, backward):
        assert used.shared == 0  # time lies in a thread's registers, so nothing is exchanged
    assert forward.spilled == 0
    assert forward.registers <= 96
    assert backward.spilled <= (24 if few else 0), "numbers that only borders of runs need"
    both = compiled(short_conv_backward, dtype, taps, WARPS, registers=few, **sizes, BESIDE=True)
    assert both.spilled <= (80 if few else 16)
    if few and width % 2 == 0:
        assert backward.ptx.count("ld.global.b32") >= 4 * AHEAD, "a pair of channels is one load"
        assert backward.ptx.count("st.global.b32") >= AHEAD, "and one store"


@pytest.mark.parametrize("dtype", ["*bf16+", "*fp16+", "*fp32+"])
@pytest.mark.parametrize("width", ["i32", "i32+"])
def test_the_rest_compiles_for_sm90_without_spills(width: str, dtype: str):
    assert compiled(short_conv_update, dtype, MOST_TAPS, 4, width=width, CHANNELS=STEP_CHANNELS).spilled == 0
    assert compiled(sum_shares, dtype, MOST_TAPS, 4, width=width, COLUMNS=COLUMNS, AT_ONCE=AT_ONCE).spilled == 0


def test_bad_input_is_one_sentence():
    x, weight = torch.randn(2, 5, 3), torch.randn(3, 4)
    with pytest.raises(ValueError, match=r"tail has shape \(2, 4, 3\); with x of shape \(2, 5, 3\) it is \(2, 3, 3\)"):
        short_conv(x, weight, None, torch.randn(2, 4, 3))
    with pytest.raises(ValueError, match=r"bias has shape \(4,\)"):
        short_conv_step(x[:, 0], weight, torch.randn(4), torch.randn(2, 3, 3))
    with use_backend("triton"), pytest.raises(ValueError, match="tensors are on cpu"):
        short_conv(x, weight)


def test_many_taps_take_the_torch_form(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("kernels.dispatch._interpreted", True)
    with use_backend("triton"), pytest.raises(ValueError, match=f"{MOST_TAPS + 1} taps are more than {MOST_TAPS}"):
        short_conv(torch.randn(2, 5, 3), torch.randn(3, MOST_TAPS + 1))
