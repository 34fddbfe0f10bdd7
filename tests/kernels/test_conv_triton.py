"""What the Triton short convolution takes on sm_90, and what its entry points refuse."""

from __future__ import annotations

import pytest
import torch

from kernels.conv import MOST_TAPS, short_conv, short_conv_step
from kernels.convolutions.conv_triton import (
    AHEAD,
    CHANNELS,
    RUN,
    STEP_CHANNELS,
    WARPS,
    short_conv_backward,
    short_conv_forward,
    short_conv_update,
)
from kernels.dispatch import use_backend
from tests.kernels.offline import compile_sm90


@pytest.mark.parametrize("dtype", ["*bf16+", "*fp16+", "*fp32+"])
@pytest.mark.parametrize("taps", [3, MOST_TAPS])
@pytest.mark.parametrize("width", ["i32", "i32+"])
@pytest.mark.parametrize("kernel", [short_conv_forward, short_conv_backward, short_conv_update], ids=lambda kernel: kernel.__name__)
def test_compiles_for_sm90_without_spills(kernel, width: str, taps: int, dtype: str):
    narrow = dict.fromkeys(("x_ptr", "y_ptr", "dx_ptr", "dy_ptr", "tail_ptr", "new_tail_ptr"), dtype)
    wide = dict.fromkeys(("weight_ptr", "bias_ptr", "parts_ptr"), "*fp32+")
    sizes = {"x_stride": width, "dx_stride": width, "width": width}
    sizes |= dict.fromkeys(("n_tokens", "sequences_per_member", "run_length"), "i32")
    channels = STEP_CHANNELS if kernel is short_conv_update else CHANNELS
    flags = {"TAPS": taps, "BIAS": True, "SILU": True, "RUN": RUN, "AHEAD": AHEAD, "CHANNELS": channels}
    every = narrow | wide | sizes | flags
    warps = 4 if kernel is short_conv_update else WARPS
    used = compile_sm90(kernel, {name: every[name] for name in kernel.arg_names}, warps=warps)
    assert used.spilled == 0
    assert used.shared == 0 or kernel is short_conv_update  # time lies in a thread's registers, so nothing is exchanged
    assert used.registers <= (168 if kernel is short_conv_backward else 96)


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
