"""The torch form of the distillation rows, and what its Triton form takes on sm_90."""

import pytest
import torch

from kernels.between.distillation_triton import BLOCK, WARPS, distillation_kernel
from kernels.distillation import IGNORED, distillation_rows
from tests.kernels.cases_distillation import SETTINGS, exact_rows
from tests.kernels.offline import compile_sm90


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("setting", SETTINGS)
def test_torch_form(setting: tuple[float, float, float], dtype: torch.dtype):
    student, teacher = torch.randn(2, 6, 9).to(dtype).unbind(0)
    labels = torch.tensor([0, 3, IGNORED, 8, 1, 1])
    kl, ce, temperature = setting
    losses, gradient = distillation_rows(student, teacher, labels, kl=kl, ce=ce, temperature=temperature)
    true, true_gradient = exact_rows(student, teacher, labels, *setting)
    assert gradient.dtype == dtype
    torch.testing.assert_close(losses.double(), true, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient.double(), true_gradient, rtol=1e-2, atol=1e-2 if dtype == torch.bfloat16 else 1e-6)


def test_bad_input_is_one_sentence():
    student, labels = torch.randn(2, 3), torch.zeros(2, dtype=torch.long)
    with pytest.raises(ValueError, match=r"logits have shape \(3,\); distillation takes \[rows, classes\]"):
        distillation_rows(student[0], None, labels, kl=0, ce=1)
    with pytest.raises(ValueError, match=r"teacher has shape \(1, 3\); with logits of shape \(2, 3\) it is \(2, 3\)"):
        distillation_rows(student, student[:1], labels, kl=1, ce=0)


@pytest.mark.parametrize("dtype", ["*bf16+", "*fp32+"])
@pytest.mark.parametrize("teacher", [True, False])
def test_compiles_for_sm90_without_spills(teacher: bool, dtype: str):
    pointers = {"student_ptr": dtype, "teacher_ptr": dtype, "labels_ptr": "*i64+", "losses_ptr": "*fp32+", "gradient_ptr": "*bf16+"}
    numbers = {"n_classes": "i32+", "kl": "fp32", "ce": "fp32", "temperature": "fp32", "ignored": "i32"}
    arguments = {**pointers, **numbers, "HAS_TEACHER": teacher, "BLOCK": BLOCK}
    used = compile_sm90(distillation_kernel, arguments, warps=WARPS)
    assert used.spilled == 0
    assert used.registers <= 80, "fewer than three programs of 256 threads fit an SM"
