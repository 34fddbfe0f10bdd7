"""The Triton short convolution in the interpreter; run by `test_interpreted.py` in a process of its own."""

import pytest
import torch

from kernels.conv import short_conv
from kernels.convolutions import conv_backward_triton
from kernels.dispatch import use_backend
from tests.kernels import cases_short_conv as cases


@pytest.mark.parametrize("options", cases.OPTIONS)
def test_options(options: tuple[int, bool, bool, bool]):
    cases.check((2, 5, 3), options, "cpu", torch.float32)


@pytest.mark.parametrize("shape", cases.SHAPES)
def test_shapes(shape: tuple[int, int, int]):
    cases.check(shape, (4, True, True, False), "cpu", torch.float32)


@pytest.mark.parametrize("shape", [(16, 16, 96), (16, 37, 6), (6, 24, 32)])
@pytest.mark.parametrize("taps", [1, 3, 4])
def test_walks_of_several_runs(shape: tuple[int, int, int], taps: int, monkeypatch: pytest.MonkeyPatch):
    """Whole ones whose lanes lie in two runs, ragged ones, and a number of runs that four does not divide."""
    monkeypatch.setattr(conv_backward_triton, "ENOUGH", 0)
    monkeypatch.setattr(conv_backward_triton, "LONG_RUN", 16)
    cases.check(shape, (taps, True, True, False), "cpu", torch.float32)
    cases.check_two_terms(shape, "cpu", torch.float32)


@pytest.mark.parametrize("options", [option for option in cases.OPTIONS if not option[3]])
def test_step(options: tuple[int, bool, bool, bool]):
    cases.check_step(options, "cpu", torch.float32)


def test_members():
    cases.check_members("cpu")


def test_compiles_as_one_graph():
    x, weight = torch.randn(3, 2, 7, 5, requires_grad=True), torch.randn(3, 5, 4, requires_grad=True)
    mapped = torch.vmap(lambda x, weight: short_conv(x, weight, silu=True)[0])
    with use_backend("triton"):
        outputs = [torch.compile(mapped, backend="aot_eager", fullgraph=True)(x, weight), mapped(x, weight)]
    assert torch.equal(*outputs)
    for found, want in zip(*(torch.autograd.grad(y.sum(), (x, weight)) for y in outputs), strict=True):
        assert torch.equal(found, want)


@pytest.mark.parametrize("with_bias", [False, True])
def test_operator_is_registered_right(with_bias: bool):
    x, weight = torch.randn(4, 7, 5, requires_grad=True), torch.randn(2, 5, 4, requires_grad=True)
    bias = torch.randn(2, 5, requires_grad=True) if with_bias else None
    torch.library.opcheck(torch.ops.mixer_bench.short_conv.default, (x, weight, bias, True))
