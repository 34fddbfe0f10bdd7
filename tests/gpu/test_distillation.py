"""The Triton distillation rows on a GPU."""

import pytest
import torch

from tests.kernels import cases_distillation as cases

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("setting", cases.SETTINGS)
@pytest.mark.parametrize(("rows", "classes"), [*cases.SHAPES, (70_000, 33), (300, 128_256)])
def test_rows(rows: int, classes: int, setting: tuple[float, float, float], dtype: torch.dtype):
    cases.check_rows(rows, classes, setting, "cuda", dtype)


def test_without_a_teacher():
    cases.check_without_a_teacher("cuda")
