"""The Triton reading of rows in the interpreter; run by `test_interpreted.py` in a process of its own."""

import pytest
import torch

from kernels.dispatch import use_backend
from kernels.rows import read_rows
from tests.kernels import cases_rows as cases


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("kind", cases.WEIGHTS)
@pytest.mark.parametrize("shape", cases.SHAPES)
def test_shapes(shape: tuple[int, int, int, int, int], kind: tuple[str, float | None], window: int | None):
    cases.check(shape, kind, window, "cpu", torch.float32)


def test_members():
    cases.check_members("cpu")


def test_compiles_as_one_graph():
    q, x = torch.randn(3, 2, 1, 4, 8, requires_grad=True), torch.randn(3, 2, 9, 8, requires_grad=True)
    rows = torch.randint(9, (3, 2, 4))
    mapped = torch.vmap(lambda q, x, rows: read_rows(q, x, rows, weights="taylor", eps=1e-6))
    with use_backend("triton"):
        outputs = [torch.compile(mapped, backend="aot_eager", fullgraph=True)(q, x, rows), mapped(q, x, rows)]
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(*(torch.autograd.grad(y.sum(), (q, x)) for y in outputs))


def test_operator_is_registered_right():
    q, x = torch.randn(2, 4, 8, requires_grad=True), torch.randn(2, 9, 8, requires_grad=True)
    torch.library.opcheck(torch.ops.mixer_bench.read_rows.default, (q, x, torch.randint(9, (2, 4)), True, 1e-6, 4))
