"""The Triton gate with its norm in the interpreter; run by `test_interpreted.py` in a process of its own."""

import pytest
import torch

from kernels.dispatch import use_backend
from kernels.gated_norm import gated_norm
from tests.kernels import cases_gated_norm as cases


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("shape", cases.SHAPES)
def test_gated_norm(shape: tuple[int, int, int], norm: bool):
    cases.check(shape, "cpu", torch.float32, "triton", norm=norm)
    cases.check_rows_for_two(shape, "cpu", torch.float32, "triton", norm=norm)


def test_members():
    cases.check_members("cpu", "triton")


def test_compiles_as_one_graph():
    leaves = tuple(torch.randn(3, *shape, requires_grad=True) for shape in ((2, 7, 5), (2, 7, 5), (5,)))
    mapped = torch.vmap(gated_norm)
    with use_backend("triton"):
        losses = [call(*leaves).sin().sum() for call in (torch.compile(mapped, backend="aot_eager", fullgraph=True), mapped)]
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*(torch.autograd.grad(loss, leaves) for loss in losses))


@pytest.mark.parametrize("norm", [False, True])
def test_operator_is_registered_right(norm: bool):
    x, gate = (torch.randn(2, 6, 5, requires_grad=True) for _ in range(2))
    weight = torch.randn(2, 5, requires_grad=True) if norm else None
    torch.library.opcheck(torch.ops.mixer_bench.gated_norm.default, (x, gate, weight, 1e-5))
