"""The torch form of the gated convolution, and what its Triton form takes on sm_90."""

import pytest
import torch

from kernels.conv import MOST_TAPS
from kernels.convolutions.gated_conv_triton import CHANNELS, TILE, TOKENS, WARPS, gated_conv_backward
from kernels.dispatch import use_backend
from kernels.gated_conv import gated_conv
from kernels.products import product_over_rows
from tests.kernels import cases_gated_conv as cases
from tests.kernels.offline import compile_sm90


@pytest.mark.parametrize("taps", cases.TAPS)
@pytest.mark.parametrize("shape", cases.SHAPES)
def test_torch_form(shape: tuple[int, int, int], taps: int):
    cases.check(shape, taps, "cpu", torch.float32, "chunked")


def test_bad_input_is_one_sentence(monkeypatch: pytest.MonkeyPatch):
    x, square, vector = torch.randn(2, 5, 4), torch.randn(4, 4), torch.randn(4)
    with pytest.raises(ValueError, match=r"taps has shape \(3, 3\); with x of shape \(2, 5, 4\) it is \(4, 3\)"):
        gated_conv(x, square, vector, torch.randn(3, 3), vector)
    with pytest.raises(ValueError, match=r"weight has shape \(4, 3\)"):
        gated_conv(x, square[:, :3], vector, torch.randn(4, 3), vector)
    monkeypatch.setattr("kernels.dispatch._interpreted", True)
    with use_backend("triton"), pytest.raises(ValueError, match=f"{MOST_TAPS + 1} taps are more than {MOST_TAPS}"):
        gated_conv(x, square, vector, torch.randn(4, MOST_TAPS + 1), vector)


@pytest.mark.parametrize(("members", "rows"), [(1, 1), (3, 7), (2, 1024), (2, 1536), (70, 3)])
def test_products_over_rows_add_up(members: int, rows: int):
    a, b = torch.randn(members, rows, 5, dtype=torch.float64), torch.randn(members, rows, 4, dtype=torch.float64)
    torch.testing.assert_close(product_over_rows(a, b), a.mT @ b)
    narrow = product_over_rows(a.bfloat16(), b.bfloat16())
    assert narrow.dtype == torch.float32
    torch.testing.assert_close(narrow.double(), a.mT @ b, rtol=0.1, atol=0.02 * rows**0.5)


@pytest.mark.parametrize(
    ("width", "taps", "dtype"), [("i32+", 3, "*bf16+"), ("i32", MOST_TAPS, "*bf16+"), ("i32", MOST_TAPS, "*fp32+")]
)
def test_compiles_for_sm90_without_spills(width: str, taps: int, dtype: str):
    narrow = dict.fromkeys(("dy_ptr", "x_ptr", "projected_ptr", "dz_ptr", "dx_ptr"), dtype)
    wide = dict.fromkeys(("bias_ptr", "taps_ptr", "tap_bias_ptr", "parts_ptr"), "*fp32+")
    sizes = {"n_tokens": "i32", "width": width, "sequences_per_member": "i32"}
    flags = {"TAPS": taps, "TOKENS": TOKENS, "TILE": TILE, "CHANNELS": CHANNELS}
    used = compile_sm90(gated_conv_backward, narrow | wide | sizes | flags, warps=WARPS)
    assert used.spilled == 0
    assert used.registers <= 128, "fewer than four programs of 128 threads fit an SM"
