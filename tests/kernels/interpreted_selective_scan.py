"""The Triton selective scan in the interpreter; run by `test_interpreted.py` in a process of its own."""

import pytest
import torch
import triton
import triton.language as tl

from kernels.dispatch import use_backend
from kernels.scan import selective_scan
from kernels.scans import (
    scan_operator,
    selective_scan_columns,
    selective_scan_columns_forward,
    selective_scan_columns_tile,
    selective_scan_gluon,
    selective_scan_launch,
    selective_scan_quads,
    selective_scan_quads_backward,
    selective_scan_quads_forward,
)
from kernels.scans import selective_scan_segments as segments
from kernels.scans.scan_operator import OWN_STATES
from kernels.scans.selective_scan_rows import over_channels
from tests.kernels import cases_selective_scan as cases
from tests.kernels.gluon_on_cpu import OnCpu

KINDS = torch.bfloat16, torch.float32, torch.float32, torch.bfloat16, torch.bfloat16
"""Dtypes of x, dt, rates, b and c in the mixer."""
QUADS = (selective_scan_gluon, selective_scan_quads, selective_scan_quads_backward, selective_scan_quads_forward, segments)


@pytest.fixture(autouse=True)
def _narrow_programs(monkeypatch: pytest.MonkeyPatch):
    """The interpreter scans element by element, so programs own fewer channels here."""
    monkeypatch.setattr(selective_scan_launch, "CHANNELS", 4)
    forward = OnCpu(selective_scan_gluon.selective_scan_forward, (selective_scan_gluon,))
    monkeypatch.setattr(selective_scan_gluon, "selective_scan_forward", forward)


@pytest.fixture
def four_lanes(monkeypatch: pytest.MonkeyPatch):
    """Kernels for few channels, in programs of one warp, in fp32 too: what they round to bf16 is not rounded here."""
    monkeypatch.setattr(selective_scan_launch, "few_channels", lambda *_: True)
    monkeypatch.setattr(selective_scan_launch, "CHANNELS", 8)
    for module, name in ((selective_scan_launch, "QUAD_WARPS"), (segments, "WARPS")):
        monkeypatch.setattr(module, name, 1)
    for module, name in (
        (selective_scan_quads_forward, "quads_forward"),
        (selective_scan_quads_backward, "quads_backward"),
        (segments, "segment_ends"),
    ):
        monkeypatch.setattr(module, name, OnCpu(getattr(module, name), QUADS))


@pytest.fixture
def full_device(monkeypatch: pytest.MonkeyPatch):
    """Kernels whose threads own channels, at any size; in 16 bit, as they keep states in bf16."""
    monkeypatch.setattr(scan_operator, "FULL", 1)
    monkeypatch.setattr(selective_scan_launch, "FULL", 1)
    monkeypatch.setattr(selective_scan_launch, "CHANNELS", 32)
    for module, name in ((selective_scan_columns, "columns_backward"), (selective_scan_columns_forward, "columns_forward")):
        modules = selective_scan_gluon, selective_scan_columns, selective_scan_columns_forward, selective_scan_columns_tile
        monkeypatch.setattr(module, name, OnCpu(getattr(module, name), modules))


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 5, 3, 2), (1, 16, 4, 1), (1, 33, 5, 3)])
def test_shapes(shape: tuple[int, int, int, int]):
    cases.check(shape, "cpu", torch.float32)
    cases.check_gated(shape, "cpu", torch.float32)


@pytest.mark.parametrize("shape", [(2, 5, 3, 2), (1, 33, 5, 3)])
def test_raw_time_steps(shape: tuple[int, int, int, int]):
    cases.check_stepped(shape, "cpu", torch.float32)


@pytest.mark.usefixtures("four_lanes")
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 5, 3, 2), (1, 33, 9, 16)])
def test_shapes_of_few_channels(shape: tuple[int, int, int, int]):
    cases.check(shape, "cpu", torch.float32)
    cases.check_gated(shape, "cpu", torch.float32)


@pytest.mark.usefixtures("four_lanes")
@pytest.mark.parametrize("programs", [2, 64])
def test_segments(programs: int, monkeypatch: pytest.MonkeyPatch):
    """Of three tiles and the ragged rest, and of one; states and their gradients enter from both ends."""
    monkeypatch.setattr(segments, "PROGRAMS", programs)
    monkeypatch.setattr(segments, "SHORTEST_SEGMENT", 1)
    assert segments.share_out(1, 5, 1) == ((2, 3) if programs == 2 else (5, 1))
    cases.check((1, 65, 5, 3), "cpu", torch.float32)
    cases.check_gated((1, 65, 5, 3), "cpu", torch.float32)


@pytest.mark.usefixtures("four_lanes")
def test_segments_of_members_with_strong_decay(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(segments, "SHORTEST_SEGMENT", 1)
    cases.check_members("cpu")
    cases.check((2, 40, 3, 2), "cpu", torch.float32, strength=10.0)


@pytest.mark.usefixtures("full_device")
@pytest.mark.parametrize(
    "shape", [(1, 16, 32, 16), (2, 48, 96, 16), (1, 16, 32, 8), (2, 48, 96, 8), (1, 16, 32, 24), (2, 32, 96, 24)]
)
def test_shapes_that_fill_a_device(shape: tuple[int, int, int, int], monkeypatch: pytest.MonkeyPatch):
    """The other kernels are not taken, whole tiles and warps given."""
    monkeypatch.setattr(selective_scan_launch, "turned", None)
    cases.check(shape, "cpu", torch.bfloat16)
    cases.check(shape, "cpu", torch.float16, strength=10.0)
    cases.check_stepped(shape, "cpu", torch.bfloat16)
    cases.check_stepped(shape, "cpu", torch.float16)


@pytest.mark.usefixtures("full_device")
@pytest.mark.parametrize("n_states", OWN_STATES)
def test_members_that_fill_a_device(n_states: int):
    cases.check_members("cpu", (2, 16, 32, n_states), torch.bfloat16)


@pytest.mark.usefixtures("full_device")
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # torch takes the members one by one
def test_gradients_taken_inside_of_members_see_their_own_states():
    """What two launches keep of a sequence stays with it."""
    tensors = [x.to(kind) for x, kind in zip(cases.draw(2, 16, 32, 24, leading=(3,)), KINDS, strict=False)]

    def total(*own: torch.Tensor) -> torch.Tensor:
        return selective_scan(*own)[0].float().square().sum()

    of_each = torch.func.grad(total, argnums=tuple(range(5)))
    with use_backend("triton"):
        together, alone = torch.vmap(of_each)(*tensors), [of_each(*own) for own in zip(*tensors, strict=True)]
    for found, expected in zip(together, zip(*alone, strict=True), strict=True):
        assert torch.equal(found, torch.stack(expected))


@pytest.mark.usefixtures("full_device")
@pytest.mark.parametrize("n_states", OWN_STATES)
def test_rows_of_a_projection_are_read_where_they_lie(n_states: int):
    """Its first numbers are those of time steps."""
    x, dt, rate, *_ = (tensor.bfloat16() for tensor in cases.draw(2, 16, 32, n_states))
    rows = torch.randn(2, 16, 8 + 2 * n_states).bfloat16().requires_grad_()
    _, b, c = rows.split((8, n_states, n_states), -1)
    with use_backend("triton"):
        found, expected = (selective_scan(x, dt, rate.float(), *own)[0] for own in ((b, c), (b.contiguous(), c.contiguous())))
    assert torch.equal(found, expected)
    assert torch.equal(*(torch.autograd.grad(y.float().square().sum(), rows)[0] for y in (found, expected)))


@pytest.mark.usefixtures("full_device")
@pytest.mark.parametrize("n_states", OWN_STATES)
def test_kept_states_are_as_announced(n_states: int):
    x, dt, rate, b, c, _ = cases.draw(1, 32, 32, n_states)
    scanned = (x.bfloat16().requires_grad_(), dt, rate[None], b.bfloat16(), c.bfloat16(), None, None, None, None, False)
    call = torch.ops.mixer_bench.selective_scan.default
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        announced = call(*(mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in scanned))
    for found, expected in zip(call(*scanned), announced, strict=True):
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype)


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


@pytest.mark.usefixtures("full_device")
@pytest.mark.parametrize("n_states", OWN_STATES)
def test_operator_of_raw_time_steps_is_registered_right(n_states: int):
    x, dt, rate, b, c, _ = cases.draw(1, 16, 32, n_states)
    narrow = [t.bfloat16().requires_grad_() for t in (x, dt, b, c)]
    sides = [t[None].clone().requires_grad_() for t in (rate, rate[:, 0], rate[:, 1])]
    scanned = (*narrow[:2], sides[0], *narrow[2:], None)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
    for skip in (None, sides[2]):
        torch.library.opcheck(
            torch.ops.mixer_bench.selective_scan.default, (*scanned, sides[1], skip, None, False), test_utils=tests
        )


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
