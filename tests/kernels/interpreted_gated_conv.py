"""The Triton gated convolution in the interpreter; run by `test_interpreted.py` in a process of its own."""

import pytest
import torch

from kernels.dispatch import use_backend
from kernels.gated_conv import gated_conv
from tests.kernels import cases_gated_conv as cases


@pytest.mark.parametrize("taps", cases.TAPS)
@pytest.mark.parametrize("shape", cases.SHAPES)
def test_shapes(shape: tuple[int, int, int], taps: int):
    cases.check(shape, taps, "cpu", torch.float32, "triton")


def test_members():
    cases.check_members("cpu", "triton")


def arguments() -> list[torch.Tensor]:
    return [torch.randn(shape, requires_grad=True) for shape in ((3, 2, 7, 5), (3, 5, 5), (3, 5), (3, 5, 4), (3, 5))]


def test_compiles_as_one_graph():
    leaves, mapped = arguments(), torch.vmap(gated_conv)
    with use_backend("triton"):
        outputs = [torch.compile(mapped, backend="aot_eager", fullgraph=True)(*leaves), mapped(*leaves)]
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(*(torch.autograd.grad(y.sum(), leaves) for y in outputs))


def test_operator_is_registered_right():
    x, weight, bias, taps, tap_bias = arguments()
    torch.library.opcheck(torch.ops.mixer_bench.taps_first.default, (taps,))
    leaves = (x.detach().flatten(0, 1).requires_grad_(), weight, bias, taps.detach().mT.contiguous().requires_grad_(), tap_bias)
    torch.library.opcheck(torch.ops.mixer_bench.gated_conv.default, leaves)
