"""Plans: memory of temporaries, views, and launches as Triton's C function takes them; kernels here add numbers on a CPU."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels import _descriptors, _plan
from kernels._descriptors import Described, Place
from kernels._plan import Allocation, Launch, Operation, View, written

EMPTY = torch.empty(4)
METAS = [{"number": 0}, {"number": 1}]


def add(x: int, y: int, out: int) -> None:
    """out = x + y, four numbers at these addresses."""
    a, b, c = (np.ctypeslib.as_array((ctypes.c_float * 4).from_address(address)) for address in (x, y, out))
    c[:] = a + b


class Launcher:
    """What a compiled kernel is launched by in an unknown version of Triton."""

    def __call__(self, *args: Any) -> None:
        assert args[:9] == (4, 1, 1, 7, 5, "packed", None, None, None)
        add(*(x if isinstance(x, int) else x.base.data_ptr() for x in args[9:]))


class Launcher36(Launcher):
    """The same in Triton 3.6: Python around a C function."""

    launch_cooperative_grid = launch_pdl = False
    global_scratch_size = profile_scratch_size = 0

    def __call__(self, *args: Any) -> None:
        raise AssertionError("the C function is there")

    @property
    def launch(self) -> Any:
        """Fetches the C function, which gets what stands for descriptors in their places."""

        def launcher(*args: Any) -> None:
            assert args[:13] == (4, 1, 1, 7, 5, False, False, None, None, "packed", None, None, None)
            add(*args[13:])

        def inner(*args: Any) -> None:
            launcher(*args)

        return inner


class Descriptor:
    """Of four numbers."""

    base = None


def kernel(launcher: Any, metas: Any = None) -> Any:
    """A compiled kernel."""
    return SimpleNamespace(run=launcher, function=5, packed_metadata="packed", metadata=SimpleNamespace(tensordesc_meta=metas))


def launch(compiled: Any, *args: Any) -> Launch:
    """A launch on four numbers."""
    return Launch(compiled, (4, 1, 1), [Place(x) if isinstance(x, int) else x for x in args])


@pytest.mark.parametrize("launcher", [Launcher(), Launcher36()])
def test_temporaries_share_memory(launcher: Launcher):
    plan = written(
        [Allocation(i, EMPTY) for i in (2, 3, 4)] + [launch(kernel(launcher), *x) for x in ((0, 1, 2), (0, 2, 3), (2, 3, 4))], 2, 4
    )
    x, y = torch.randn(4), torch.randn(4)
    torch.testing.assert_close(plan.run(7, x, y), 3 * x + 2 * y)
    assert plan.source.count("empty_strided") == 2


def test_large_temporaries_are_given_back(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_plan, "SMALL", 31)
    plan = written(
        [Allocation(i, EMPTY) for i in (1, 2, 3)] + [launch(kernel(Launcher()), *x) for x in ((0, 0, 1), (0, 1, 2), (2, 2, 3))],
        1,
        3,
    )
    torch.testing.assert_close(plan.run(7, torch.ones(4)), torch.full((4,), 6.0))
    assert [line.strip() for line in plan.source.splitlines() if "del" in line] == ["del t1", "del t2"]
    assert plan.source.count("empty_strided") == 3


def test_views_are_addresses_until_an_operator_sees_them():
    def half(x: Tensor, of: int, at: int, index: int) -> list[Any]:
        cut = Operation(torch.ops.aten.slice.Tensor, [Place(of), 0, at, at + 4], {}, [index])
        return [View(index, of, at * x.element_size(), cut)]

    both = torch.empty(8)
    steps = [Allocation(1, both), *half(both, 0, 0, 2), *half(both, 0, 4, 3), *half(both, 1, 0, 4), *half(both, 1, 4, 5)]
    steps += [launch(kernel(Launcher()), 2, 3, 4), launch(kernel(Launcher()), 3, 3, 5)]
    unseen = written([*steps, Allocation(6, EMPTY), launch(kernel(Launcher()), 4, 5, 6)], 1, 6)
    seen = written([*steps, Operation(torch.ops.aten.mul.Tensor, [Place(5), 2], {}, [6])], 1, (6, 4))
    x = torch.randn(8)
    torch.testing.assert_close(unseen.run(7, x), x[:4] + 3 * x[4:])
    torch.testing.assert_close(seen.run(7, x), (4 * x[4:], x[:4] + x[4:]))
    assert unseen.source.count("t4 =") == 0
    assert seen.source.count("t4 =") == seen.source.count("t5 =") == 1


@pytest.mark.parametrize(("launcher", "metas"), [(Launcher(), None), (Launcher36(), METAS)])
def test_descriptors_are_encoded_once_an_address(launcher: Launcher, metas: Any, monkeypatch: pytest.MonkeyPatch):
    encoded: list[tuple[int, int]] = []

    def encode(descriptor: Any, meta: Any) -> list[int]:
        encoded.append((descriptor.base.data_ptr(), meta["number"]))
        return [descriptor.base.data_ptr()]

    monkeypatch.setattr("triton.backends.nvidia.driver.make_tensordesc_arg", encode)
    monkeypatch.setattr(_descriptors, "MOST", 2)
    described = [Described(Descriptor(), Place(i), EMPTY.device) for i in (0, 1)]
    plan = written([Allocation(2, EMPTY), launch(kernel(launcher, metas), *described, 2)], 2, 2)
    tensors = [torch.full((4,), float(i)) for i in range(5)]
    for x, y in ((0, 1), (0, 1), (2, 1), (3, 1), (3, 4), (0, 1)):
        torch.testing.assert_close(plan.run(7, tensors[x], tensors[y]), tensors[x] + tensors[y])
    at = [x.data_ptr() for x in tensors]
    assert encoded == ([] if metas is None else [(at[0], 0), (at[1], 1), (at[2], 0), (at[3], 0), (at[4], 1), (at[0], 0)])
