"""First calls: everything that a call and its backward pass will launch is compiled before anything is launched."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

from kernels import _ahead, _entry, _replay
from kernels._operator import operator


class Compiled:
    """What Triton returns; writes down its launches."""

    function = packed_metadata = run = 0

    def __init__(self, name: str, told: list[str]) -> None:
        self.name, self.told = name, told

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args: self.told.append(f"launch {self.name}")


def one(x, y):
    """Never runs."""


def two(x, y):
    """Never runs."""


def back(x, y):
    """Never runs."""


NOTHING = _ahead.Later(lambda *_: ())
KERNELS = {fn.__name__: _entry.Entry(fn) for fn in (one, two, back)}


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What Triton is asked for, in order."""
    found: list[str] = []

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **_: Any) -> Compiled:
        found.append(f"{'compile' if warmup else 'bind'} {self.fn.__name__}")
        if "broken" in self.fn.__name__:
            raise ValueError("no such kernel")
        return Compiled(self.fn.__name__, found)

    monkeypatch.setattr(JITFunction, "run", run)
    monkeypatch.setattr(_entry, "driver", SimpleNamespace(active=SimpleNamespace(get_current_device=lambda: 0)))
    monkeypatch.setattr(_replay, "FIRST_DEVICE", -1)
    monkeypatch.setattr(_replay, "current_device", lambda: -1)
    for kernel in KERNELS.values():
        kernel.launched.clear()
    with _replay.forgetful():
        yield found


def both(x: Tensor) -> Tensor:
    """Two kernels, one after the other."""
    out = x.new_zeros(x.shape)
    KERNELS["one"][(1,)](x, out)
    KERNELS["two"][(1,)](x, out)
    return out


def test_all_kernels_are_compiled_first(told: list[str]) -> None:
    _ahead.together(both, (torch.ones(3),), NOTHING)
    assert told == ["compile one", "compile two", "launch one", "launch two"]
    told.clear()
    _ahead.together(both, (torch.ones(5),), NOTHING)
    assert told == ["launch one", "launch two"]


def test_other_sizes_compile_nothing_later(told: list[str]) -> None:
    def by_size(x: Tensor) -> Tensor:
        KERNELS["one" if x.shape[0] < 64 else "two"][(1,)](x, x)
        return x

    later = _ahead.Later(lambda x: [(sizes.of(x, "BTH"),) for sizes in _ahead.other_sizes(2, 4)], lambda args, _: seen.append(args))
    seen: list[tuple[Tensor, ...]] = []
    _ahead.together(by_size, (torch.ones(100, 7, 4, 3),), later)
    assert sorted(told[:2]) == ["compile one", "compile two"]
    assert told[2:] == ["launch two"]
    assert [tuple(x.shape) for (x,) in seen] == [(100, 7, 4, 3), (16, 64, 32, 3), (1, 4096, 2, 3)]


def test_an_error_is_told_by_the_launch(told: list[str]) -> None:
    def broken(x, y):
        """Never runs."""

    kernel = _entry.Entry(broken)

    def call(x: Tensor) -> None:
        KERNELS["one"][(1,)](x, x)
        kernel[(1,)](x, x)

    with pytest.raises(ValueError, match="no such kernel"):
        _ahead.together(call, (torch.ones(3),), NOTHING)


@operator("mixer_bench_test::ahead_backward")
def differentiated(dy: Tensor) -> Tensor:
    """The gradient."""
    out = dy.clone()
    KERNELS["back"][(1,)](dy, out)
    return out


@operator("mixer_bench_test::ahead")
def called(x: Tensor) -> Tensor:
    """Two kernels, with a gradient that has one of its own."""
    return both(x)


called.register_autograd(lambda ctx, dy: differentiated(dy), setup_context=lambda ctx, inputs, _: ctx.save_for_backward(*inputs))


def test_the_backward_pass_is_compiled_beside_the_forward_pass(told: list[str]) -> None:
    x = torch.ones(3, requires_grad=True)
    y = called(x)
    assert sorted(told[:3]) == ["compile back", "compile one", "compile two"]
    assert told[3:] == ["launch one", "launch two"]
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], torch.ones(3))
    assert told[5:] == ["launch back"]


def test_what_is_tried_out_twice_is_launched_later(told: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that launches nothing, because kernels are being compiled, must not be taken for what calls of its description do."""
    monkeypatch.setattr(_replay, "current_stream", lambda _: 0)
    x = torch.ones(3, requires_grad=True)
    for _ in range(3):
        KERNELS["one"].launched.clear()
        called.repeated.plans.clear()
        y = called(x)
    for _ in range(3):
        told.clear()
        torch.autograd.grad(y, x, torch.ones(3), retain_graph=True)  # dense, as what was tried out
        assert told == ["launch back"]
