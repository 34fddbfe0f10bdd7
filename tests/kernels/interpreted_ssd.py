"""The kernels between Mamba-2's projection and gate in the interpreter; run by `test_interpreted.py` in a process of its own."""

import pytest
import torch

from kernels.dispatch import use_backend
from kernels.narrow import ssd_backward_gluon, ssd_forward_gluon, ssd_launch, ssd_pieces_gluon
from tests.kernels import cases_ssd as cases
from tests.kernels.gluon_on_cpu import OnCpu


@pytest.mark.parametrize("shape", cases.SHAPES)
def test_ssd(shape: cases.Shape):
    cases.check(shape, "cpu", torch.float32)


@pytest.fixture
def one_warp(monkeypatch: pytest.MonkeyPatch):
    """Kernels of one warp a program, whose roundings to 16 bit are none here; chunks as there."""
    for module, name in ((ssd_forward_gluon, "ssd_forward"), (ssd_backward_gluon, "ssd_backward")):
        monkeypatch.setattr(module, name, OnCpu(getattr(module, name), (module, ssd_pieces_gluon)))
    monkeypatch.setattr(ssd_launch, "FP32_CHUNK", ssd_launch.CHUNK)
    monkeypatch.setattr(ssd_launch, "_by_one_warp", lambda *_: True)


@pytest.mark.usefixtures("one_warp")
@pytest.mark.parametrize("shape", [*cases.SHAPES, cases.Shape(1, 64, 4, 1, 64, 16), cases.Shape(2, 70, 3, 1, 16, 8)])
def test_one_warp(shape: cases.Shape):
    cases.check(shape, "cpu", torch.float32)


def test_without_bias_and_with_a_reader_of_the_convolved_channels():
    cases.check(cases.SHAPES[1], "cpu", torch.float32, bias=False, beside=True)


def test_members():
    cases.check_members("cpu")


def test_compiles_as_one_graph():
    shape = cases.Shape(1, 17, 2, 1, 16, 8)
    leaves = tuple(torch.stack([cases.draw(shape)[name] for _ in range(2)]).requires_grad_() for name in cases.NAMES)
    mapped = torch.vmap(lambda *leaves: cases.call(*leaves, shape)[0])
    with use_backend("triton"):
        losses = [call(*leaves).sin().sum() for call in (torch.compile(mapped, backend="aot_eager", fullgraph=True), mapped)]
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*(torch.autograd.grad(loss, leaves) for loss in losses))


def test_operator_is_registered_right():
    weights = [x[None] for x in list(cases.draw(cases.SHAPES[0]).values())[1:]]
    row = torch.randn(1, 3, weights[0].shape[1] + 1, requires_grad=True)
    torch.library.opcheck(torch.ops.mixer_bench.ssd.default, (row, *weights, 16, 8))
