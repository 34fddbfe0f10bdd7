"""What a first call asks Triton for, and what repeated calls no longer do, on a CPU: nothing is compiled or launched."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from triton import knobs
from triton.runtime.jit import JITFunction

from bench.throughput.draws import Draw
from bench.throughput.kernels import OPERATIONS
from bench.throughput.measure import timed_call
from bench.throughput.names import KERNELS, KernelName
from kernels import _entry, _replay, dispatch
from kernels.delta_rule import delta_hopper_launch
from kernels.dispatch import use_backend

FIRST = (2, 256, 4)
LATER = ((3, 256, 4), (2, 333, 4), (2, 256, 5), (16, 64, 16), (1, 64, 1), (1, 4096, 2))
"""Batch, length and heads."""
CHANNELS = 16
"""Heads where they are channels that kernels take for a constant, as widths of heads elsewhere."""
NAMES = (
    "linear", "constant_decay", "scalar_decay", "ssd", "delta", "gated_delta", "gla", "kda", "taylor", "scan", "selective_scan",
    "short_conv",
)  # fmt: skip
ROWS = [(name, width) for name in NAMES for width in KERNELS[name].widths]  # type: ignore[index]


class Compiled:
    """A kernel that does nothing."""

    function = packed_metadata = None

    def run(self, *_: Any) -> None:
        """See `triton.compiler.CompiledKernel`."""

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args: knobs.runtime.launch_enter_hook(None)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the kernels that Triton is asked for, by calls on a CPU that take themselves for calls on a Hopper GPU."""
    found: list[str] = []

    def run(self: JITFunction, *args: Any, warmup: bool, **_: Any) -> Compiled:
        found.append(self.fn.__name__)
        if not warmup:
            knobs.runtime.launch_enter_hook(None)
        return Compiled()

    monkeypatch.setattr(JITFunction, "run", run)
    monkeypatch.setattr(_entry, "driver", SimpleNamespace(active=SimpleNamespace(get_current_device=lambda: 0)))
    monkeypatch.setattr(_replay, "FIRST_DEVICE", -1)
    monkeypatch.setattr(_replay, "current_device", lambda: -1)
    monkeypatch.setattr(_replay, "current_stream", lambda _: 0)
    monkeypatch.setattr(dispatch, "_interpreted", True)
    monkeypatch.setattr(delta_hopper_launch, "fit", lambda *_: True)
    monkeypatch.setattr(delta_hopper_launch, "multiprocessors", lambda _: 132)
    forget_kernels()
    yield found
    forget_kernels()


def forget_kernels() -> None:
    """Nothing is compiled, as in a new process."""
    for one in gc.get_objects():
        if issubclass(type(one), _entry.Entry):
            one.launched.clear()


@pytest.mark.parametrize(("name", "width"), ROWS)
def test_other_sizes_compile_nothing(name: KernelName, width: int, compiled: list[str]) -> None:
    with use_backend("triton"):
        heads = CHANNELS if name in ("selective_scan", "short_conv") else None
        training_call(name, (*FIRST[:2], heads or FIRST[2]), width)()
        assert compiled
        for sizes in LATER:
            compiled.clear()
            training_call(name, (*sizes[:2], heads or sizes[2]), width)()
            assert compiled == [], f"{sizes} compiled"


@pytest.mark.parametrize("name", NAMES)
def test_repeated_calls_skip_their_python(name: KernelName, compiled: list[str]) -> None:
    call = training_call(name, FIRST, KERNELS[name].widths[0])
    with use_backend("triton"), _replay.forgetful():
        for _ in range(4):
            call()
        plans = [plan for repeated in _replay.functions() for plan in repeated.plans.values()]
        assert len(plans) >= 2
        assert {type(plan) for plan in plans if plan is not None} == {_replay.Plan}


def training_call(name: KernelName, sizes: tuple[int, int, int], width: int) -> Callable[[], object]:
    """A forward and backward pass."""
    draw = Draw(torch.device("cpu"), torch.bfloat16, torch.Generator().manual_seed(0))
    return timed_call(OPERATIONS[name].problem(KERNELS[name].shape(*sizes, width), "train", draw), gradients=True)
