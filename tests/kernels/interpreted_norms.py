"""The Triton norms in the interpreter; run by `test_interpreted.py` in a process of its own."""

import pytest
import torch

from kernels.dispatch import use_backend
from kernels.norms import norm_pair
from tests.kernels import cases_norms as cases


@pytest.mark.parametrize("shape", cases.SHAPES)
def test_layer_norm(shape: tuple[int, int, int]):
    cases.check_layer_norm(shape, "cpu", torch.float32, "triton")


@pytest.mark.parametrize("at_rows", [False, True])
@pytest.mark.parametrize("shape", cases.SHAPES)
def test_pair(shape: tuple[int, int, int], at_rows: bool):
    cases.check_pair(shape, "cpu", torch.float32, "triton", at_rows=at_rows)


@pytest.mark.parametrize("shape", cases.SHAPES)
def test_stream(shape: tuple[int, int, int]):
    cases.check_stream(shape, "cpu", torch.float32, "triton")


def test_members():
    cases.check_members("cpu", "triton")


def test_compiles_as_one_graph():
    r, rows = torch.randn(3, 2, 7, 5, requires_grad=True), torch.tensor([[0, 3], [6, 2]]).expand(3, 2, 2)
    parameters = [torch.randn(3, 5, requires_grad=True) for _ in range(4)]
    mapped = torch.vmap(lambda r, a, b, c, d, rows: norm_pair(r, (a, b), (c, d), rows))
    with use_backend("triton"):
        calls = (torch.compile(mapped, backend="aot_eager", fullgraph=True), mapped)
        losses = [sum(y.sin().sum() for y in call(r, *parameters, rows)) for call in calls]
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*(torch.autograd.grad(loss, (r, *parameters)) for loss in losses))


@pytest.mark.parametrize("pair", [False, True])
def test_operator_is_registered_right(pair: bool):
    r = torch.randn(2, 6, 5, requires_grad=True)
    parameters = [torch.randn(2, 5, requires_grad=True) if i < 2 or pair else None for i in range(4)]
    rows = torch.tensor([[[0, 2]], [[1, 5]]]) if pair else None
    torch.library.opcheck(torch.ops.mixer_bench.norms.default, (r, *parameters, rows, 1e-5))


def test_operator_of_a_stream_is_registered_right():
    r, weight = torch.randn(2, 6, 5, requires_grad=True), torch.randn(2, 5, requires_grad=True)
    torch.library.opcheck(torch.ops.mixer_bench.stream_norm.default, (r, weight, torch.tensor([[[0, 2]], [[1, 5]]]), 1e-5))
