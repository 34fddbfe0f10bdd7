"""Kept launches: Triton binds a launch once for each description of its arguments, and later ones pass the same arguments on."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton.language as tl
from triton.runtime.jit import JITFunction

from kernels import _entry
from kernels._entry import Entry


def kernel(x, y, size: tl.int32, step, rate: tl.float32, A: tl.constexpr, B: tl.constexpr):
    """Never runs."""


class Compiled:
    """What Triton returns; remembers its launches."""

    def __init__(self) -> None:
        self.launches: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args: self.launches.append((grid, args))


@pytest.fixture
def bound(monkeypatch: pytest.MonkeyPatch) -> list[Compiled]:
    """The compiled kernels that Triton's own launches returned."""
    found: list[Compiled] = []

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **constants: Any) -> Compiled:
        found.append(Compiled())
        return found[-1]

    monkeypatch.setattr(JITFunction, "run", run)
    monkeypatch.setattr(_entry, "driver", SimpleNamespace(active=SimpleNamespace(get_current_device=lambda: 0)))
    return found


def test_a_known_description_is_launched_at_once(bound: list[Compiled]):
    made, x = Entry(kernel, do_not_specialize=["size"]), torch.zeros(64)
    made[(5,)](x, x, 7, 3, 0.5, B=2, A=1, num_warps=4)
    made[(6, 2)](x, x, 8, 3, 0.25, B=2, A=1, num_warps=4)
    assert len(bound) == 1
    ((grid, args),) = bound[0].launches
    assert grid == (6, 2, 1)
    assert args[2:] == (8, 3, 0.25, 1, 2)  # constants in the order of the signature


@pytest.mark.parametrize("change", ["dtype", "address", "number", "large", "constant", "option"])
def test_what_compilation_depends_on_is_bound_anew(bound: list[Compiled], change: str):
    made, x = Entry(kernel, do_not_specialize=["size"]), torch.zeros(64)

    def launch(x: torch.Tensor = x, step: int = 3, a: int = 1, warps: int = 4) -> None:
        made[(5,)](x, x, 7, step, 0.5, A=a, B=2, num_warps=warps)

    launch()
    changed: dict[str, dict[str, Any]] = {
        "dtype": {"x": x.half()},
        "address": {"x": x[1:]},
        "number": {"step": 16},
        "large": {"step": (1 << 40) + 3},
        "constant": {"a": 2},
        "option": {"warps": 8},
    }
    launch(**changed[change])
    launch(**changed[change])
    assert len(bound) == 2
    assert len(bound[1].launches) == 1


def test_integers_of_a_known_type_compile_nothing():
    made = _entry.entry(kernel)
    assert made.fixed[:5] == [False, False, True, False, False]
