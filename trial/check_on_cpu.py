"""The trial kernels on the CPU (run with TRITON_INTERPRET=1 by pytest)."""

import pytest

from kernels import delta, delta_coupling_triton, delta_hopper, delta_hopper_launch
from kernels.dispatch import use_backend
from tests.kernels.gluon_on_cpu import Descriptor, OnCpu
from tests.kernels.interpreted_delta_rule import assert_equal
from tests.kernels.oracle import poisoned
from trial import backward, carry, hopper, launch, lean

KERNELS = (
    (hopper, ("forward_kernel",)),
    (lean, ("forward_kernel", "fused_kernel", "couple_kernel")),
    (carry, ("forward_carry_kernel", "reverse_carry_kernel")),
    (backward, ("backward_kernel",)),
)


@pytest.fixture(autouse=True)
def _hopper(monkeypatch):
    modules = (*(module for module, _ in KERNELS),)
    for module, names in KERNELS:
        for name in names:
            monkeypatch.setattr(module, name, OnCpu(getattr(module, name), modules))
    monkeypatch.setattr(delta, "FP32", delta.SIXTEEN_BIT)
    for m in (delta_hopper_launch, launch):
        monkeypatch.setattr(m, "_described", Descriptor)
        monkeypatch.setattr(m, "segments_of", lambda *_: 1)
    monkeypatch.setattr(delta_hopper_launch, "fit", lambda *_: True)
    monkeypatch.setattr(delta_hopper_launch, "multiprocessors", lambda _: 132)
    monkeypatch.setattr(launch, "_Capped", lambda kernel, _: kernel)
    for name in ("forward", "backward"):
        monkeypatch.setattr(delta_hopper_launch, name, None)
    monkeypatch.setattr(delta_coupling_triton, "coupling_kernel", None)
    with use_backend("triton"), poisoned():
        yield


@pytest.mark.parametrize("forward", [("next", 128, 8), ("next", 64, 4), ("lean", 128, 8), ("fused", 128, 8), ("fused", 128, 4, 168, 8)], ids=str)
@pytest.mark.parametrize("shape", [(1, 66, 1, 2, 16, 40), (1, 130, 1, 1, 72, 96)], ids=str)
@pytest.mark.parametrize("gate", ["none", "strong"])
def test_walks(shape, gate, forward):
    launch.choose(("gluon" if forward[0] == "lean" else "next", 168), forward, ("next", None), "next")
    assert_equal(shape, gate, state=True)


@pytest.mark.parametrize("forward", [("next", 128, 8), ("lean", 128, 8)], ids=str)
@pytest.mark.parametrize(("gate", "state"), [("none", False), ("scalar", True)])
def test_segments(monkeypatch, gate, state, forward):
    monkeypatch.setattr(launch, "segments_of", lambda *_: 4)
    launch.choose(("next", 168), forward, ("next", None), "next", "all")
    assert_equal((1, 200, 1, 1, 24, 40), gate, state=state)


@pytest.mark.parametrize("gate", ["none", "scalar"])
def test_many_rounds(gate):
    """More rounds of four chunks than there is room for."""
    launch.choose(("next", 168), ("fused", 128, 8), ("next", None), "next")
    assert_equal((1, 64 * 13 + 5, 1, 1, 24, 40), gate, state=True)
