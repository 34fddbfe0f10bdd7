"""The Triton cross entropy in the interpreter; run by `test_interpreted.py` in a process of its own."""

import pytest
import torch

from kernels.cross_entropy import labelled_cross_entropy
from kernels.dispatch import use_backend
from kernels.labelled_head import labelled_head
from tests.kernels import cases_cross_entropy as cases


@pytest.mark.parametrize(("rows", "classes"), cases.SHAPES)
def test_rows(rows: int, classes: int):
    cases.check_rows(rows, classes, "cpu", torch.float32)


@pytest.mark.parametrize(("rows", "classes"), cases.SHAPES)
def test_head(rows: int, classes: int):
    cases.check_head(rows, classes, "cpu", torch.float32)


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


def test_head_compiles_as_one_graph():
    h, weight, labels = (
        torch.randn(3, 5, 4, requires_grad=True),
        torch.randn(3, 11, 4, requires_grad=True),
        torch.randint(11, (3, 5)),
    )
    mapped = torch.vmap(labelled_head)
    with use_backend("triton"):
        calls = (torch.compile(mapped, backend="aot_eager", fullgraph=True), mapped)
        losses = [call(h, weight, labels)[0] for call in calls]
        alone = torch.stack([labelled_head(h[i], weight[i], labels[i])[0] for i in range(3)])
    for loss in losses:
        torch.testing.assert_close(loss, alone)
        gradients = (torch.autograd.grad(y.sin().sum(), (h, weight), retain_graph=True) for y in (loss, alone))
        torch.testing.assert_close(*gradients)


def test_operator_is_registered_right():
    logits, labels = torch.randn(5, 11, requires_grad=True), torch.randint(11, (5,))
    torch.library.opcheck(torch.ops.mixer_bench.cross_entropy.default, (logits, labels))
    h, weight = torch.randn(2, 5, 4, requires_grad=True), torch.randn(2, 11, 4, requires_grad=True)
    torch.library.opcheck(torch.ops.mixer_bench.labelled_head.default, (h, weight, torch.randint(11, (2, 5))))
