"""The Triton distillation rows in the interpreter; run by `test_interpreted.py` in a process of its own."""

import pytest
import torch

from tests.kernels import cases_distillation as cases


@pytest.mark.parametrize("setting", cases.SETTINGS)
@pytest.mark.parametrize(("rows", "classes"), cases.SHAPES)
def test_rows(rows: int, classes: int, setting: tuple[float, float, float]):
    cases.check_rows(rows, classes, setting, "cpu", torch.float32)


def test_without_a_teacher():
    cases.check_without_a_teacher("cpu")
