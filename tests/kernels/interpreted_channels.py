"""The gated long convolution in the interpreter; run by `test_interpreted.py` in a process of its own."""

import pytest
import torch

from kernels.conv import _channel_long_conv, gated_long_conv
from kernels.convolutions.gated_long_conv_operator import gated_long_conv_operator
from kernels.dispatch import use_backend
from tests.kernels import cases_channels as cases
from tests.kernels.oracle import SIXTEEN_BIT, poisoned, require_close

REGISTERED = ("test_schema", "test_faketensor", "test_autograd_registration")


@pytest.mark.parametrize("case", cases.CASES)
def test_equals_the_definition(case: tuple[int, ...]):
    cases.check(case, "cpu", torch.float16)


def test_longer_sequences_take_the_other_kernels():
    x, taps = torch.randn(2, 3, 2, 300, dtype=torch.float16), torch.randn(3, 300) / 300**0.5
    with use_backend("triton"), poisoned():
        got = _channel_long_conv(x, taps)
    true = torch.stack([cases.convolved(heads.double(), taps.double()) for heads in x])
    require_close({"y": got}, {"y": true}, SIXTEEN_BIT)


def test_members():
    cases.check_members("cpu")


def test_operator_is_registered_right():
    leaves = cases.leaves_of((2, 1, 2, 64, 3), "cpu", torch.float16)
    qkv, bias, *filters = (leaf.detach() for leaf in leaves.values())
    arguments = (qkv.unflatten(0, (3, 2))[None], bias.view(1, 3, 2), *(taps[None] for taps in filters))
    torch.library.opcheck(gated_long_conv_operator.overload, tuple(a.requires_grad_() for a in arguments), test_utils=REGISTERED)


@pytest.mark.parametrize(
    ("case", "dtype", "message"),
    [
        ((1, 1, 1, 257, 1), torch.float16, "257 tokens are more than 256"),
        ((3, 1, 1, 4, 1), torch.float16, "heads of 3 channels are wider than 2"),
        ((1, 1, 1, 4, 1), torch.float32, "more exact by an FFT"),
    ],
)
def test_what_the_kernel_lacks_is_said(case: tuple[int, ...], dtype: torch.dtype, message: str):
    leaves = cases.leaves_of(case, "cpu", dtype)
    with use_backend("triton"), pytest.raises(ValueError, match=message):
        gated_long_conv(*leaves.values())
