"""Mamba-2 between projection and gate on a CUDA device: exact in 16 bit, and as members."""

from __future__ import annotations

import pytest
import torch

from tests.kernels import cases_ssd as cases

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", (*cases.SHAPES, *cases.LONG))
def test_ssd(shape: cases.Shape, dtype: torch.dtype) -> None:
    cases.check(shape, "cuda", dtype)


def test_a_reader_of_the_convolved_channels() -> None:
    cases.check(cases.LONG[0], "cuda", torch.bfloat16, bias=False, beside=True)


def test_members() -> None:
    cases.check_members("cuda", dtype=torch.bfloat16)
