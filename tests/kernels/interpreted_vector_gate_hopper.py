"""The vector-gate walks for Hopper, followed on the CPU, against the token loop in fp64: outputs, states and gradients."""

import pytest
import torch

from kernels import (
    delta_hopper,
    delta_hopper_launch,
    delta_hopper_walk,
    vector_gate,
    vector_gate_config,
    vector_gate_hopper,
    vector_gate_hopper_launch,
)
from tests.kernels import cases_vector_gate as cases
from tests.kernels.gluon_on_cpu import Descriptor, OnCpu

MODULES = (vector_gate_hopper, delta_hopper, delta_hopper_walk)


@pytest.fixture(autouse=True)
def _hopper(monkeypatch: pytest.MonkeyPatch):
    for name in ("walk_kernel", "reverse_kernel"):
        monkeypatch.setattr(vector_gate_hopper, name, OnCpu(getattr(vector_gate_hopper, name), MODULES))
    monkeypatch.setattr(vector_gate_config, "FP32", vector_gate_config.SIXTEEN_BIT)
    monkeypatch.setattr(delta_hopper_launch, "_described", Descriptor)
    monkeypatch.setattr(delta_hopper_launch, "multiprocessors", lambda _: 2)
    monkeypatch.setattr(vector_gate_hopper_launch, "fit", lambda *_: True)


# batch, length, heads, key width, value width
@pytest.mark.parametrize("shape", [(1, 200, 2, 72, 96), (1, 70, 1, 24, 128), (1, 1, 1, 16, 16)], ids=str)
@pytest.mark.parametrize("gate", ["weak", "strong"])
@pytest.mark.parametrize("delta", [False, True])
def test_equals_the_token_loop(shape: tuple[int, int, int, int, int], gate: str, delta: bool):
    """Gentle and rough chunks; programs with all columns of wide heads, with half of them, and of narrow heads."""
    for state in (False, True):
        cases.check(shape, gate, "cpu", torch.float32, delta=delta, state=state)


def test_few_heads_are_walked_in_segments_by_the_plain_kernels(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(vector_gate, "SEGMENT", 1)
    cases.check((1, 300, 1, 16, 16), "weak", "cpu", torch.float32, delta=False, state=True)
