"""Repeated calls: what was noted of one call is right for others of the same description, and no other is repeated."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from triton import knobs

from kernels import _ahead, _entry, _replay
from kernels._operator import operator
from kernels._replay import Plan, Repeated, Unseen


class Added:
    """A compiled kernel, out = x + y + step, that gets tensors or their addresses."""

    function = packed_metadata = None

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any) -> None:
            knobs.runtime.launch_enter_hook(None)
            self.run(*grid, 0, None, None, None, None, None, *args)

        return launch

    def run(self, x: int, _y: int, _z: int, *args: Any) -> None:
        *tensors, step = args[6:]
        addresses = (p if isinstance(p, int) else p.data_ptr() for p in tensors)
        a, b, out = (np.ctypeslib.as_array((ctypes.c_float * x).from_address(p)) for p in addresses)
        out[:] = a + b + step


def kernel(x, y, out, step):
    """Never runs."""


@pytest.fixture
def add(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A kernel that is launched on a CPU, where calls are repeated for once."""
    made = _entry.Entry(kernel)
    monkeypatch.setattr(_entry.JITFunction, "run", lambda self, *args, grid, warmup: Added()[(*grid, 1, 1)](*args) or Added())
    monkeypatch.setattr(_entry, "driver", SimpleNamespace(active=SimpleNamespace(get_current_device=lambda: 0)))
    monkeypatch.setattr(_replay, "FIRST_DEVICE", -1)
    monkeypatch.setattr(_replay, "current_device", lambda: -1)
    monkeypatch.setattr(_replay, "current_stream", lambda _: 0)
    with _replay.forgetful():
        yield made


def counted(fn: Any) -> tuple[Repeated, list[int]]:
    """A repeated function, and how often its own Python ran."""
    ran: list[int] = []

    def counting(*args: Any) -> Any:
        ran.append(1)
        return fn(*args)

    return Repeated(counting), ran


def inputs(*sizes: int) -> list[Tensor]:
    """Fresh tensors."""
    return [torch.randn(*sizes) for _ in range(2)]


def test_allocations_launches_and_operators(add: Any) -> None:
    def mixed(x: Tensor, y: Tensor, step: int) -> tuple[Tensor, Tensor]:
        spare = x.new_empty(x.shape)
        add[(x.numel(),)](x, y, spare, step)
        out = torch.empty_like(spare)
        add[(x.numel(),)](spare, torch.cat([y[:1] * 2, y[1:]]), out, step)
        return out, out.sum(0)

    repeated, ran = counted(mixed)
    after = []
    for _ in range(5):
        x, y = inputs(8)
        out, total = repeated(x, y, 3)
        want = x + 2 * y + 6
        want[0] += y[0]
        torch.testing.assert_close(out, want)
        torch.testing.assert_close(total, want.sum())
        after.append(len(ran))
    assert after[1:] == [after[1]] * 4


def test_other_descriptions_are_other_calls(add: Any) -> None:
    def double(x: Tensor, twice: bool) -> Tensor:
        return x.contiguous() * 2 if twice else x + x.stride(0)

    repeated, ran = counted(double)
    (x, _), (wide, _) = inputs(4, 4), inputs(4, 6)
    calls = ((x, True), (x.mT, True), (x, False), (x.double(), True), (wide[:, :4], True), (wide[:, 1:5], True))
    for number, (tensor, flag) in enumerate(calls, 1):
        for _ in range(4):
            torch.testing.assert_close(repeated(tensor, flag), tensor * 2 if flag else tensor + tensor.stride(0))
        assert len(ran) == 2 * number


def test_what_cannot_be_watched_is_not_repeated(add: Any) -> None:
    hidden = torch.ones(4)

    def secret(x: Tensor) -> Tensor:
        out = x.new_empty(x.shape)
        add[(4,)](x, hidden, out, 0)
        return out

    def unnoticed(x: Tensor) -> Tensor:
        out = x.new_empty(x.shape)
        Added()[(4, 1, 1)](x, x, out, 0)  # a kernel that is no `Entry`
        return out

    for fn, factor, more in ((secret, 1, 1), (unnoticed, 2, 0)):
        repeated, ran = counted(fn)
        for _ in range(4):
            (x, _) = inputs(4)
            before = len(ran)
            torch.testing.assert_close(repeated(x), factor * x + more)
            assert len(ran) > before
        assert [type(plan) for plan in repeated.plans.values()] == [Unseen]


def test_one_tensor_in_two_places(add: Any) -> None:
    def product(x: Tensor, y: Tensor) -> Tensor:
        out = x.new_empty(x.shape)
        add[(4,)](x, y, out, 0)
        return out

    repeated, _ = counted(product)
    x, y = inputs(4)
    for _ in range(4):
        torch.testing.assert_close(repeated(x, x), x + x)
    torch.testing.assert_close(repeated(x, y), x + y)


def test_memory_is_given_back_in_between(add: Any) -> None:
    repeated, _ = counted(lambda x: ((x * 2) * 3) * 4)
    for _ in range(3):
        repeated(torch.ones(4))
    (plan,) = repeated.plans.values()
    assert isinstance(plan, Plan)
    assert [line.split(" = ")[0].strip() for line in plan.source.splitlines()[1:]] == [
        "t1",
        "t2",
        "del t1",
        "t3",
        "del t2",
        "return t3",
    ]


def test_parts_of_a_tensor_lie_where_they_lay(add: Any) -> None:
    def cut(x: Tensor, y: Tensor) -> Tensor:
        both = x.new_empty(8)
        add[(4,)](x[4:], y[:4], both[4:], 0)
        add[(0,)](x[4:4], y[8:], both[4:4], 0)  # parts without elements have no address
        add[(4,)](both[4:], y[4:], both[:4], 1)
        return both

    repeated, _ = counted(cut)
    for _ in range(4):
        x, y = inputs(8)
        later = x[4:] + y[:4]
        torch.testing.assert_close(repeated(x, y), torch.cat((later + y[4:] + 1, later)))
    (plan,) = repeated.plans.values()
    assert isinstance(plan, Plan)
    assert "-" not in plan.source


def test_descriptions_do_not_pile_up(add: Any) -> None:
    repeated, _ = counted(lambda x: x * 2)
    for length in range(1, _replay.MOST + 3):
        repeated(torch.ones(length))
    assert len(repeated.plans) <= _replay.MOST


@operator("mixer_bench_test::shifted")
def shifted(x: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    """2 x, and x itself for a backward pass."""
    return x * 2, x.clone() if keep else x.new_empty(0)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1])


shifted.register_autograd(lambda ctx, dy, _: (dy * ctx.saved_tensors[0].sign() * 2, None), setup_context=_save, keep=True)


def test_gradients_are_repeated(add: Any) -> None:
    for _ in range(4):
        x = torch.randn(5, requires_grad=True)
        y, _ = shifted(x, False)
        (dx,) = torch.autograd.grad(y.sum(), x)
        torch.testing.assert_close((y, dx), (2 * x, 2 * x.sign()))
    assert any(isinstance(plan, Plan) for plan in shifted.repeated.plans.values())


@operator("mixer_bench_test::cubed_backward")
def cubed_backward(dy: Tensor, x: Tensor) -> Tensor:
    """The gradient of a cube."""
    return 3 * dy * x * x


@operator("mixer_bench_test::cubed")
def cubed(x: Tensor) -> Tensor:
    """A cube."""
    return x * x * x


cubed.register_autograd(
    lambda ctx, dy: cubed_backward(dy, *ctx.saved_tensors), setup_context=lambda ctx, inputs, _: ctx.save_for_backward(*inputs)
)


def test_a_second_derivative_is_not_silently_zero(add: Any) -> None:
    x = torch.randn(5, requires_grad=True)
    (dx,) = torch.autograd.grad(cubed(x).sum(), x, create_graph=True)
    torch.testing.assert_close(dx, 3 * x * x)
    with pytest.warns(UserWarning, match="an autograd kernel was not registered"):
        torch.autograd.grad((x + dx).sum(), x)


def test_what_is_known_is_not_launched_where_calls_are_tried_out(add: Any) -> None:
    """Their arguments are memory that nobody has written; see `kernels._ahead`."""

    def once(x: Tensor, y: Tensor) -> Tensor:
        out = torch.full_like(x, 7.0)
        add[(x.numel(),)](x, y, out, 3)
        return out

    repeated, ran = counted(once)
    for _ in range(3):
        repeated(*inputs(8))
    ran.clear()
    with _ahead._set(_ahead.Wanted()):
        assert bool((repeated(*inputs(8)) == 7).all())
    assert len(ran) == 1
    x, y = inputs(8)
    torch.testing.assert_close(repeated(x, y), x + y + 3)
    assert len(ran) == 1
