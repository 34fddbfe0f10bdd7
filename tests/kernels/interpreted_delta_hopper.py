"""The delta rule's Hopper kernels, followed on the CPU, against the token loop in fp64: outputs, states and gradients."""

import pytest

from kernels import (
    delta,
    delta_hopper,
    delta_hopper_backward,
    delta_hopper_beside,
    delta_hopper_carry,
    delta_hopper_launch,
    delta_hopper_solve,
    delta_hopper_transposed,
)
from kernels.dispatch import use_backend
from tests.kernels.gluon_on_cpu import Descriptor, OnCpu
from tests.kernels.interpreted_delta_rule import assert_equal
from tests.kernels.oracle import poisoned

KERNELS = (
    (delta_hopper, ()),
    (delta_hopper_beside, ()),
    (delta_hopper_solve, ()),
    (delta_hopper_transposed, ("forward_kernel",)),
    (delta_hopper_carry, ("carry_kernel",)),
    (delta_hopper_backward, ("backward_kernel",)),
)


@pytest.fixture(autouse=True)
def _hopper(monkeypatch):
    modules = tuple(module for module, _ in KERNELS)
    for module, names in KERNELS:
        for name in names:
            monkeypatch.setattr(module, name, OnCpu(getattr(module, name), modules))
    monkeypatch.setattr(delta, "FP32", delta.SIXTEEN_BIT)
    monkeypatch.setattr(delta_hopper_launch, "_described", Descriptor)
    monkeypatch.setattr(delta_hopper_launch, "fit", lambda *_: True)
    monkeypatch.setattr(delta_hopper_launch, "multiprocessors", lambda _: 132)
    monkeypatch.setattr(delta_hopper_launch, "segments_of", lambda *_: 1)
    with use_backend("triton"), poisoned():
        yield


# batch, length, groups, heads, key width, value width
@pytest.mark.parametrize("shape", [(1, 66, 1, 2, 16, 40), (1, 130, 1, 1, 72, 96)], ids=str)
@pytest.mark.parametrize("gate", ["none", "constant", "strong"])
def test_equals_the_token_loop(shape, gate):
    """Narrow heads, whose couplings are made beside the walk, and wide ones."""
    assert_equal(shape, gate, state=gate != "constant")


@pytest.mark.parametrize(("gate", "v_dim"), [("none", 24), ("scalar", 40)])
def test_more_couplings_than_there_is_room_for(gate, v_dim):
    assert_equal((1, 64 * 13 + 5, 1, 1, 24, v_dim), gate, state=True)


@pytest.mark.parametrize(("processors", "width"), [(1, 72), (2, 72)])
def test_programs_with_all_columns_or_half(monkeypatch, processors, width):
    monkeypatch.setattr(delta_hopper_launch, "multiprocessors", lambda _: processors)
    assert_equal((1, 200, 1, 1, width, width), "scalar", state=True)


@pytest.mark.parametrize(("length", "segments"), [(130, 2), (200, 4)])
@pytest.mark.parametrize(("gate", "state"), [("none", False), ("scalar", True)])
def test_segments(monkeypatch, length, segments, gate, state):
    """The last segment is shorter; with more than two, states are carried over whole ones."""
    monkeypatch.setattr(delta_hopper_launch, "segments_of", lambda *_: segments)
    assert_equal((1, length, 1, 1, 24, 40), gate, state=state)


@pytest.mark.parametrize(("gate", "state"), [("none", False), ("scalar", True)])
@pytest.mark.parametrize(("length", "makers", "width"), [(64 * 10 + 5, 2, 24), (200, 1, 72)])
def test_couplings_by_other_programs(monkeypatch, length, makers, width, gate, state):
    """Those of groups of chunks, the last of them not whole."""
    monkeypatch.setattr(delta_hopper_launch, "plan_of", lambda *_, **__: delta_hopper_launch.Plan(1, 1, 0, 3, 4, makers))
    assert_equal((1, length, 1, 2, width, width), gate, state=state)


@pytest.mark.parametrize(("gate", "state"), [("none", False), ("scalar", True)])
def test_merged(monkeypatch, gate, state):
    monkeypatch.setattr(delta_hopper_launch, "plan_of", lambda *_, **__: delta_hopper_launch.Plan(1, 2, 3, 3, 2))
    assert_equal((1, 300, 1, 2, 72, 96), gate, state=state)
