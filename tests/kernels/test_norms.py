"""The torch form of the norms between layers, and what their Triton form takes on sm_90."""

import pytest
import torch

from kernels.between import stream_norm_triton
from kernels.between.norms_triton import ROWS, TILE_ELEMENTS, WARPS, norms_backward
from kernels.dispatch import use_backend
from kernels.norms import MOST_WIDTH, layer_norm, norm_pair
from tests.kernels import cases_norms as cases
from tests.kernels.offline import compile_sm90


@pytest.mark.parametrize("shape", cases.SHAPES)
def test_torch_form(shape: tuple[int, int, int]):
    cases.check_layer_norm(shape, "cpu", torch.float32, "chunked")
    cases.check_stream(shape, "cpu", torch.float32, "chunked")
    for at_rows in (False, True):
        cases.check_pair(shape, "cpu", torch.float32, "chunked", at_rows=at_rows)


def test_members_of_the_torch_form():
    cases.check_members("cpu", "chunked")


def test_bad_input_is_one_sentence(monkeypatch: pytest.MonkeyPatch):
    norm = (torch.ones(4), torch.zeros(3))
    with pytest.raises(ValueError, match=r"bias has shape \(3,\); with x of shape \(2, 5, 4\) it is \(4,\)"):
        layer_norm(torch.randn(2, 5, 4), norm)
    with pytest.raises(ValueError, match=r"second\[1\] has shape \(3,\)"):
        norm_pair(torch.randn(2, 5, 4), (torch.ones(4), torch.zeros(4)), norm)
    monkeypatch.setattr("kernels.dispatch._interpreted", True)
    wide = MOST_WIDTH + 1
    with use_backend("triton"), pytest.raises(ValueError, match=f"width {wide} is above {MOST_WIDTH}"):
        layer_norm(torch.randn(1, 2, wide), (torch.ones(wide), torch.zeros(wide)))


@pytest.mark.parametrize("pair", [False, True])
@pytest.mark.parametrize(("width", "dtype"), [(48, "*fp32+"), (128, "*bf16+"), (256, "*bf16+"), (MOST_WIDTH, "*bf16+")])
def test_compiles_for_sm90_without_spills(width: int, dtype: str, pair: bool):
    block = max(16, 1 << (width - 1).bit_length())
    narrow = dict.fromkeys(("ds_ptr", "dpicked_ptr", "dy_ptr", "r_ptr", "dr_ptr"), dtype)
    wide = dict.fromkeys(("weight1_ptr", "bias1_ptr", "weight2_ptr", "parts_ptr"), "*fp32+")
    sizes = {"place_ptr": "*i32+", "n_rows": "i32", "n_tokens": "i32", "n_places": "i32", "width": "i32+", "eps": "fp32"}
    flags = {"PAIR": pair, "PLACED": pair, "ROWS": ROWS, "TILE": max(1, TILE_ELEMENTS // block), "BLOCK": block}
    used = compile_sm90(norms_backward, narrow | wide | sizes | flags, warps=WARPS)
    assert used.spilled == 0
    assert used.registers <= 128, "fewer than four programs of 128 threads fit an SM"


@pytest.mark.parametrize(("width", "dtype"), [(48, "*fp32+"), (128, "*bf16+"), (256, "*bf16+"), (MOST_WIDTH, "*bf16+")])
def test_the_norm_of_a_stream_compiles_without_spills(width: int, dtype: str):
    block = max(16, 1 << (width - 1).bit_length())
    tensors = dict.fromkeys(("ds_ptr", "dpicked_ptr", "dy_ptr", "r_ptr", "dr_ptr"), dtype)
    tensors |= dict.fromkeys(("weight_ptr", "parts_ptr"), "*fp32+") | {"place_ptr": "*i32+"}
    sizes = {"n_rows": "i32", "n_tokens": "i32", "n_places": "i32", "width": "i32+", "eps": "fp32"}
    flags = {"ROWS": stream_norm_triton.ROWS, "TILE": max(1, stream_norm_triton.TILE_ELEMENTS // block), "BLOCK": block}
    used = compile_sm90(stream_norm_triton.stream_norm_backward, tensors | sizes | flags, warps=stream_norm_triton.WARPS)
    assert used.spilled == 0
    assert used.registers <= 128, "fewer than four programs of 128 threads fit an SM"
