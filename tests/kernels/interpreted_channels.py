"""Convolutions that work channel by channel in the interpreter; run by `test_interpreted.py` in a process of its own."""

import pytest
import torch

from kernels.conv import gated_long_conv
from kernels.convolutions.channel_short_conv_operator import channel_short_conv_operator
from kernels.convolutions.gated_long_conv_operator import gated_long_conv_operator
from kernels.dispatch import use_backend
from tests.kernels import cases_channels as cases

REGISTERED = ("test_schema", "test_faketensor", "test_autograd_registration")


@pytest.mark.parametrize("case", cases.GATED)
def test_gated_equals_the_definition(case: tuple[int, ...]):
    cases.check_gated(case, "cpu", torch.float16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("case", cases.SHORT)
def test_short_equals_the_definition(case: tuple[int, ...], dtype: torch.dtype):
    cases.check_short(case, "cpu", dtype)


def test_members():
    cases.check_members("cpu")


def test_operators_are_registered_right():
    leaves = cases.gated_leaves((2, 1, 2, 64, 3, 0), "cpu", torch.float16)
    qkv = leaves["qkv"].detach().unflatten(0, (3, 2))[None].requires_grad_()
    arguments = (qkv, leaves["bias"].detach().view(1, 3, 2).requires_grad_(), leaves["filter"][None], leaves["shift"][None], 0)
    torch.library.opcheck(gated_long_conv_operator.overload, arguments, test_utils=REGISTERED)
    short = [leaf.detach()[None].requires_grad_() for leaf in cases.short_leaves((2, 3, 5, 3), "cpu", torch.float16).values()]
    torch.library.opcheck(channel_short_conv_operator.overload, tuple(short), test_utils=REGISTERED)


@pytest.mark.parametrize(
    ("case", "dtype", "message"),
    [
        ((1, 1, 1, 257, 0, 0), torch.float16, "257 tokens are more than 256"),
        ((3, 1, 1, 4, 0, 0), torch.float16, "heads of 3 channels are wider than 2"),
        ((1, 1, 1, 4, 0, 0), torch.float32, "more exact by an FFT"),
    ],
)
def test_what_the_kernel_lacks_is_said(case: tuple[int, ...], dtype: torch.dtype, message: str):
    leaves = cases.gated_leaves(case, "cpu", dtype)
    with use_backend("triton"), pytest.raises(ValueError, match=message):
        gated_long_conv(leaves["qkv"], leaves["bias"], leaves["filter"])
