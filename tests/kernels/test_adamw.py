"""The torch form of the fleet's AdamW step, and what its Triton form takes on sm_90."""

import pytest
import torch

from kernels.adamw import adamw_step
from kernels.between.adamw_triton import BLOCK, WARPS, adamw_kernel
from tests.kernels import cases_adamw as cases
from tests.kernels.offline import compile_sm90


@pytest.mark.parametrize(("members", "parameters"), cases.SHAPES)
def test_torch_form(members: int, parameters: int):
    cases.check_steps(members, parameters, "cpu", "chunked")


def test_bad_input_is_one_sentence():
    weights = [torch.zeros(2, 3) for _ in range(4)]
    with pytest.raises(ValueError, match=r"rates has shape \(3,\); with weights of shape \(2, 3\) it is \(2,\)"):
        adamw_step(*weights, torch.zeros(3), torch.zeros(2), weight_decay=0.0)
    with pytest.raises(ValueError, match=r"gradient is torch.float64 with strides \(3, 1\); AdamW takes contiguous torch.float32"):
        adamw_step(weights[0], weights[1].double(), *weights[2:], torch.zeros(2), torch.zeros(2), weight_decay=0.0)


def test_compiles_for_sm90_without_spills():
    pointers = ("weights_ptr", "gradient_ptr", "first_ptr", "second_ptr", "rates_ptr", "steps_ptr")
    numbers = {"n_parameters": "i32", "decay": "fp32", "rest1": "fp32", "rest2": "fp32", "eps": "fp32", "BLOCK": BLOCK}
    numbers |= {"LOG_BETA1": -0.105, "LOG_BETA2": -0.001}
    used = compile_sm90(adamw_kernel, dict.fromkeys(pointers, "*fp32+") | numbers, warps=WARPS)
    assert used.spilled == 0
    assert used.registers <= 64, "fewer than eight programs of 128 threads fit an SM"
