"""The Triton elementwise scan in the interpreter; run by `test_interpreted.py` in a process of its own."""

import pytest
import torch

from kernels.dispatch import use_backend
from kernels.scan import scan
from kernels.scans import scan_segments_triton, scan_triton
from tests.kernels import cases_scan as cases


@pytest.fixture(autouse=True)
def _narrow_programs(monkeypatch: pytest.MonkeyPatch):
    """The interpreter scans element by element, so programs own fewer channels here."""
    monkeypatch.setattr(scan_triton, "CHANNELS", 4)


@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (2, 5, 3), (1, 16, 4), (2, 33, 5), (2, 7, 2, 3)])
def test_shapes(shape: tuple[int, ...], with_state: bool):
    cases.check(shape, "cpu", torch.float32, with_state=with_state)


@pytest.mark.parametrize("with_state", [False, True])
def test_segments(monkeypatch: pytest.MonkeyPatch, with_state: bool):
    monkeypatch.setattr(scan_segments_triton, "SHORTEST_SEGMENT", 16)
    assert scan_segments_triton.share_out(1, 40, 1, 16) == (2, 2)
    cases.check((1, 75, 3), "cpu", torch.float32, with_state=with_state)


def test_members():
    cases.check_members("cpu")


def test_compiles_as_one_graph():
    leaves = [tensor.requires_grad_() for tensor in cases.draw((2, 5, 3), with_state=True)]
    mapped = torch.vmap(lambda *own: scan(*(tensor[None] for tensor in own)))
    with use_backend("triton"):
        outputs = [torch.compile(mapped, backend="aot_eager", fullgraph=True)(*leaves), mapped(*leaves)]
    assert torch.equal(*outputs)
    for found, want in zip(*(torch.autograd.grad(h.sum(), leaves) for h in outputs), strict=True):
        assert torch.equal(found, want)


@pytest.mark.parametrize("with_state", [False, True])
def test_operator_is_registered_right(with_state: bool):
    a, x, *state = (tensor.requires_grad_() for tensor in cases.draw((2, 5, 3), with_state=with_state))
    torch.library.opcheck(torch.ops.mixer_bench.scan.default, (a, x, state[0] if state else None))
