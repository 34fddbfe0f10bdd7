"""The causal convolutions against torch's own and against the sum that defines them."""

import pytest
import torch
from torch.nn import functional as F

from kernels.conv import long_conv, short_conv, short_conv_step


@pytest.mark.parametrize("taps", [1, 2, 4])
@pytest.mark.parametrize("length", [1, 2, 3, 9])
def test_short_conv(length, taps):
    torch.manual_seed(length)
    x = torch.randn(2, length, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, taps, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(5, dtype=torch.float64, requires_grad=True)
    tail = torch.randn(2, taps - 1, 5, dtype=torch.float64, requires_grad=True)
    y, new_tail = short_conv(x, weight, bias, tail)
    padded = torch.cat((tail, x), dim=1)
    expected = F.conv1d(padded.mT, weight[:, None], bias, groups=5).mT
    torch.testing.assert_close(y, expected)
    assert torch.equal(new_tail, padded[:, length:])
    out = torch.randn_like(y)
    leaves = (x, weight, bias)
    for got, true in zip(torch.autograd.grad(y, leaves, out), torch.autograd.grad(expected, leaves, out), strict=True):
        torch.testing.assert_close(got, true)

    y, none = short_conv(x, weight)
    assert none is None
    torch.testing.assert_close(y, short_conv(x, weight, None, torch.zeros_like(tail))[0])


def test_short_conv_step_continues_a_segment():
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 9, 5), torch.randn(5, 4), torch.randn(5)
    whole, _ = short_conv(x, weight, bias)
    y, tail = short_conv(x[:, :2], weight, bias, torch.zeros(2, 3, 5))
    outputs = [y]
    for t in range(2, 9):
        y, tail = short_conv_step(x[:, t], weight, bias, tail)
        outputs.append(y[:, None])
    torch.testing.assert_close(torch.cat(outputs, dim=1), whole)


@pytest.mark.parametrize(("length", "taps"), [(1, 1), (7, 7), (8, 20), (33, 40)])
def test_long_conv(length, taps):
    torch.manual_seed(length)
    x = torch.randn(2, length, 3, dtype=torch.float64)
    kernel = torch.randn(3, taps, dtype=torch.float64)
    expected = sum(F.pad(x[:, : length - s], (0, 0, s, 0)) * kernel[:, s] for s in range(length))
    torch.testing.assert_close(long_conv(x, kernel), expected)


def test_long_conv_of_members_under_autocast():
    """The transform stays in fp32, and the output takes the dtype of the input."""
    x, taps = torch.randn(3, 2, 33, 5).bfloat16(), torch.randn(3, 5, 40)

    def call(x, taps):
        with torch.autocast("cpu", torch.bfloat16):
            return long_conv(x, taps)

    together = torch.func.vmap(call)(x, taps)
    assert together.dtype == torch.bfloat16
    for i in range(3):
        torch.testing.assert_close(together[i].double(), long_conv(x[i].double(), taps[i].double()), rtol=1e-2, atol=1e-2)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning", "ignore:Torchinductor does not support:UserWarning")
def test_long_conv_compiles_on_any_order_in_memory():
    """A transform's place in memory once turned a compiled filter's gradient into that of another tap, by 150 %."""
    torch.manual_seed(0)
    x = torch.randn(6, 40, 3).permute(2, 1, 0).requires_grad_()
    taps, out = torch.randn(6, 40, requires_grad=True), torch.randn(3, 40, 6)
    got, want = (convolve(x, taps) for convolve in (torch.compile(long_conv, fullgraph=True), long_conv))
    torch.testing.assert_close(got, want)
    for compiled, eager in zip(torch.autograd.grad(got, (x, taps), out), torch.autograd.grad(want, (x, taps), out), strict=True):
        torch.testing.assert_close(compiled, eager)
