"""The delta rule's Hopper kernels, followed on the CPU, against the token loop in fp64: outputs, states and gradients."""

import sys

import pytest
import torch
import triton.language as tl
from triton.experimental.gluon import language as gl

from kernels._entry import entry
from kernels.delta_rule import (
    delta,
    delta_combine_triton,
    delta_hopper,
    delta_hopper_backward,
    delta_hopper_beside,
    delta_hopper_carry,
    delta_hopper_carry_feed,
    delta_hopper_couple,
    delta_hopper_launch,
    delta_hopper_reach,
    delta_hopper_solve,
    delta_hopper_transposed,
    delta_hopper_turned,
)
from kernels.dispatch import use_backend
from tests.kernels.gluon_memory import Descriptor
from tests.kernels.gluon_on_cpu import OnCpu
from tests.kernels.interpreted_delta_rule import assert_equal
from tests.kernels.oracle import poisoned

KERNELS = (
    (delta_hopper, ()),
    (delta_hopper_beside, ()),
    (delta_hopper_turned, ()),
    (delta_hopper_solve, ()),
    (delta_hopper_couple, ("couple_kernel",)),
    (delta_hopper_transposed, ("forward_kernel",)),
    (delta_hopper_reach, ()),
    (delta_hopper_carry_feed, ()),
    (delta_hopper_carry, ("carry_kernel",)),
    (delta_hopper_backward, ("backward_kernel",)),
)
SEGMENTS = delta_hopper_launch.segments_of


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
    for name in ("gdc_wait", "gdc_launch_dependents"):  # Triton's interpreter, too, lacks them
        monkeypatch.setattr(delta_combine_triton, name, lambda: None)
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


# Of one head: walks over 64 columns, which read couplings, and both walks of a program over segments.
@pytest.mark.parametrize(("processors", "length", "gate"), [(2, 300, "scalar"), (2, 200, "none"), (8, 64 * 17, "scalar")])
def test_few_wide_heads(monkeypatch, processors, length, gate):
    monkeypatch.setattr(delta_hopper_launch, "multiprocessors", lambda _: processors)
    monkeypatch.setattr(delta_hopper_launch, "SHORTEST", 4)
    monkeypatch.setattr(delta_hopper_launch, "segments_of", SEGMENTS)
    assert_equal((1, length, 1, 1, 72, 96), gate, state=True)


@pytest.mark.parametrize(("gate", "programs"), [("none", 6), ("scalar", 2)])
def test_many_wide_heads(monkeypatch, gate, programs):
    """Under decays couplings of five chunks are made by two programs."""
    monkeypatch.setattr(delta_hopper_launch, "multiprocessors", lambda _: 1)
    monkeypatch.setattr(delta_hopper_launch, "COUPLING_PROGRAMS", programs)
    assert_equal((1, 300, 1, 1, 72, 96), gate, state=True)


@pytest.mark.parametrize(("length", "segments"), [(130, 2), (200, 4)])
@pytest.mark.parametrize(("gate", "state"), [("none", False), ("scalar", True)])
@pytest.mark.parametrize(("k_dim", "v_dim"), [(24, 40), (72, 40)])
def test_segments(monkeypatch, length, segments, gate, state, k_dim, v_dim):
    """The last segment is shorter; with more than two, states are carried over whole ones."""
    monkeypatch.setattr(delta_hopper_launch, "segments_of", lambda *_: segments)
    assert_equal((1, length, 1, 1, k_dim, v_dim), gate, state=state)


@pytest.mark.parametrize("gate", ["scalar", "strong", "rare", "zero"])
@pytest.mark.parametrize(("k_dim", "v_dim"), [(24, 40), (72, 96)])
def test_segments_whose_beginning_is_forgotten(monkeypatch, gate, k_dim, v_dim):
    """Under scalar decays two of a segment's chunks reach its end, under strong ones the last one alone, under the others all."""
    monkeypatch.setattr(delta_hopper_launch, "segments_of", lambda *_: 3)
    monkeypatch.setattr(delta_hopper_launch, "multiprocessors", lambda _: 24)
    assert_equal((1, 64 * 11 + 5, 1, 1, k_dim, v_dim), gate, state=True)


@entry(gluon=True)
def look_kernel(g, out, n_first: tl.int32, n_last: tl.int32, C: gl.constexpr, REVERSE: gl.constexpr):
    """Stores what is under test."""
    at = out + gl.arange(0, 1, delta_hopper_reach.look_layout(4))
    gl.store(at, delta_hopper_reach.reaching_chunks(g, n_first, n_last, C, REVERSE, 4, False))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("first", "last"), [(0, 0), (2, 9), (5, 400)])
@pytest.mark.parametrize("scale", [0.0, 1.0, 30.0, 1e5])
def test_chunks_that_reach_the_end(scale, first, last, reverse):
    g_NC = torch.rand(420, 4) * -scale
    out = torch.zeros(1, dtype=torch.int32)
    OnCpu(look_kernel, (*(module for module, _ in KERNELS), sys.modules[__name__]))[(1,)](
        g_NC, out, first, last, C=4, REVERSE=reverse, num_warps=4
    )
    whole = g_NC[first : last + 1, 3].double() if reverse else g_NC[first : last + 1, 3].double().flip(0)
    after = whole.cumsum(0) - whole
    assert int(out) == int((after > -126).sum())
