"""The long convolution by Toeplitz products in the interpreter; run by `test_interpreted.py` in a process of its own."""

import pytest
import torch

from kernels.conv import long_conv
from kernels.convolutions.long_conv_operator import long_conv_operator
from kernels.dispatch import use_backend
from tests.kernels import cases_long_conv as cases


@pytest.mark.parametrize("shape", cases.SHAPES)
def test_equals_the_definition(shape: tuple[int, int, int, int]):
    cases.check(shape, "cpu", torch.float16)


def test_members():
    cases.check_members("cpu")


def test_operator_is_registered_right():
    x, taps = torch.randn(2, 70, 3, dtype=torch.float16, requires_grad=True), torch.randn(1, 3, 70, requires_grad=True)
    torch.library.opcheck(
        long_conv_operator.overload, (x, taps), test_utils=("test_schema", "test_faketensor", "test_autograd_registration")
    )


def test_what_the_kernel_lacks_is_said():
    with use_backend("triton"), pytest.raises(ValueError, match="2049 tokens are more than 2048"):
        long_conv(torch.randn(1, 2049, 1, dtype=torch.float16), torch.randn(1, 4))
    with use_backend("triton"), pytest.raises(ValueError, match="more exact by an FFT"):
        long_conv(torch.randn(1, 4, 1), torch.randn(1, 4))
