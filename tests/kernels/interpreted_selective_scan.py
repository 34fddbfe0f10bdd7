"""The Triton selective scan in the interpreter; run by `test_interpreted.py` in a process of its own."""

import pytest
import torch
import triton
import triton.language as tl

from kernels import selective_scan_gluon, selective_scan_launch
from kernels.dispatch import use_backend
from kernels.scan import selective_scan
from kernels.selective_scan_rows import over_channels
from tests.kernels import cases_selective_scan as cases
from tests.kernels.gluon_on_cpu import OnCpu


@pytest.fixture(autouse=True)
def _narrow_programs(monkeypatch: pytest.MonkeyPatch):
    """The interpreter scans element by element, so programs own fewer channels here."""
    monkeypatch.setattr(selective_scan_launch, "CHANNELS", 4)
    forward = OnCpu(selective_scan_gluon.selective_scan_forward, (selective_scan_gluon,))
    monkeypatch.setattr(selective_scan_gluon, "selective_scan_forward", forward)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 5, 3, 2), (1, 16, 4, 1), (1, 33, 5, 3)])
def test_shapes(shape: tuple[int, int, int, int]):
    cases.check(shape, "cpu", torch.float32)
    cases.check_gated(shape, "cpu", torch.float32)


@pytest.mark.parametrize("strength", [0.0, 10.0, 100.0])
def test_weak_and_strong_decay(strength: float):
    cases.check((1, 17, 3, 2), "cpu", torch.float32, strength=strength)


def test_states_are_kept_for_gradients_only():
    x, dt, rate, b, c, _ = cases.draw(1, 33, 3, 2)
    call = torch.ops.mixer_bench.selective_scan.default
    plain = call(x, dt, rate[None], b, c, None, None, None, None, False)
    trained = call(x.requires_grad_(), dt, rate[None], b, c, None, None, None, None, False)
    assert plain[2].shape == (1, 0, 2, 3)
    assert trained[2].shape == (1, 4, 2, 3)
    assert torch.equal(plain[0], trained[0])
    assert torch.equal(plain[1], trained[1])


def test_members():
    cases.check_members("cpu")
    cases.check_shared_input("cpu")


def test_compiles_as_one_graph():
    leaves = [tensor.requires_grad_() for tensor in cases.draw(1, 5, 3, 2, leading=(2,))[:5]]
    mapped = torch.vmap(lambda *own: selective_scan(*own)[0])
    with use_backend("triton"):
        outputs = [torch.compile(mapped, backend="aot_eager", fullgraph=True)(*leaves), mapped(*leaves)]
    assert torch.equal(*outputs)
    for found, want in zip(*(torch.autograd.grad(y.sum(), leaves) for y in outputs), strict=True):
        assert torch.equal(found, want)


def test_operator_is_registered_right():
    x, dt, rate, b, c, state = (tensor.requires_grad_() for tensor in cases.draw(1, 3, 3, 2))
    scanned = (x, dt, rate[None].detach().requires_grad_(), b, c, state)
    around = (rate[None, :, 0].detach().requires_grad_(), rate[None, :, 1].detach().requires_grad_(), x.detach().requires_grad_())
    for more in ((None, None, None), around):
        torch.library.opcheck(torch.ops.mixer_bench.selective_scan.default, (*scanned, *more, False))


@triton.jit
def _summed(x_ptr, sums_ptr, L: tl.constexpr, C: tl.constexpr):
    row_L = tl.arange(0, L)
    x_LC = tl.load(x_ptr + row_L[:, None] * C + tl.arange(0, C)[None, :])
    tl.store(sums_ptr + row_L, over_channels(x_LC, L, C, True))


def test_products_sum_over_channels():
    """In fp16, as the interpreter gets products in bf16 wrong."""
    x_LC, sums_L = torch.randint(-8, 8, (16, 32)).half(), torch.empty(16)
    _summed[(1,)](x_LC, sums_L, L=16, C=32)
    assert torch.equal(sums_L, x_LC.sum(1).float())
