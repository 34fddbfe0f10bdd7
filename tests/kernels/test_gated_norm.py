"""The torch form of the gate with its norm, and what its Triton form takes on sm_90."""

import pytest
import torch

from kernels.between.gated_norm_triton import ONE_WARP, ROWS, TILE_ELEMENTS, WARPS, gated_norm_backward
from kernels.dispatch import use_backend
from kernels.gated_norm import MOST_WIDTH, gated_norm
from tests.kernels import cases_gated_norm as cases
from tests.kernels.offline import compile_sm90


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("shape", cases.SHAPES)
def test_torch_form(shape: tuple[int, int, int], norm: bool):
    cases.check(shape, "cpu", torch.float32, "chunked", norm=norm)


def test_members_of_the_torch_form():
    cases.check_members("cpu", "chunked")


def test_too_wide_rows_are_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("kernels.dispatch._interpreted", True)
    x = torch.randn(1, 2, MOST_WIDTH + 1)
    with use_backend("triton"), pytest.raises(ValueError, match=f"width {MOST_WIDTH + 1} is above {MOST_WIDTH}"):
        gated_norm(x, x)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(("width", "dtype"), [(48, "*fp32+"), (128, "*bf16+"), (256, "*bf16+"), (MOST_WIDTH, "*bf16+")])
def test_compiles_for_sm90_without_spills(width: int, dtype: str, norm: bool):
    block = max(16, 1 << (width - 1).bit_length())
    tensors = dict.fromkeys(("x_ptr", "gate_ptr", "dy_ptr", "dx_ptr", "dgate_ptr"), dtype)
    tensors |= dict.fromkeys(("weight_ptr", "parts_ptr"), "*fp32+")
    sizes = {"n_rows": "i32", "gate_stride": "i32", "dgate_stride": "i32", "width": "i32+", "eps": "fp32"}
    flags = {"NORM": norm, "UNIT": 8, "ROWS": ROWS, "TILE": max(1, TILE_ELEMENTS // block), "BLOCK": block}
    used = compile_sm90(gated_norm_backward, tensors | sizes | flags, warps=1 if width <= ONE_WARP else WARPS)
    assert used.spilled == 0
    assert used.shared == 0 or width > ONE_WARP, "a row is summed inside of a warp"
    if dtype == "*bf16+":
        assert used.ptx.count("ld.global.v4.b32") >= 6, "two tiles of three tensors, 16 bytes a load, the gate's rows too"
