"""The Triton cross entropy in the interpreter; run by `test_interpreted.py` in a process of its own."""

import pytest
import torch

from kernels.cross_entropy import labelled_cross_entropy
from kernels.dispatch import use_backend
from tests.kernels import cases_cross_entropy as cases


@pytest.mark.parametrize(("rows", "classes"), cases.SHAPES)
def test_rows(rows: int, classes: int):
    cases.check_rows(rows, classes, "cpu", torch.float32)


def test_members():
    cases.check_members("cpu")


def test_faults():
    cases.check_faults("cpu")


def test_compiles_as_one_graph():
    logits, labels = torch.randn(3, 5, 11, requires_grad=True), torch.randint(11, (3, 5))
    mapped = torch.vmap(labelled_cross_entropy)
    with use_backend("triton"):
        loss, predicted = torch.compile(mapped, backend="aot_eager", fullgraph=True)(logits, labels)
        want, want_predicted = mapped(logits, labels)
    assert torch.equal(loss, want)
    assert torch.equal(predicted, want_predicted)
    assert torch.equal(*(torch.autograd.grad(out.sum(), logits)[0] for out in (loss, want)))


def test_operator_is_registered_right():
    logits, labels = torch.randn(5, 11, requires_grad=True), torch.randint(11, (5,))
    torch.library.opcheck(torch.ops.mixer_bench.cross_entropy.default, (logits, labels))
