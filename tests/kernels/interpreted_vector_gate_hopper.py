"""The vector-gate walks for Hopper, followed on the CPU, against the token loop in fp64: outputs, states and gradients."""

import pytest
import torch

from kernels.delta_rule import delta_hopper, delta_hopper_launch
from kernels.vector_gates import (
    vector_gate,
    vector_gate_config,
    vector_gate_hopper,
    vector_gate_hopper_back,
    vector_gate_hopper_launch,
)
from tests.kernels import cases_vector_gate as cases
from tests.kernels.gluon_memory import Descriptor
from tests.kernels.gluon_on_cpu import OnCpu

MODULES = (vector_gate_hopper, vector_gate_hopper_back, delta_hopper)


@pytest.fixture(autouse=True)
def _hopper(monkeypatch: pytest.MonkeyPatch):
    for module, name in ((vector_gate_hopper, "walk_kernel"), (vector_gate_hopper_back, "reverse_kernel")):
        monkeypatch.setattr(module, name, OnCpu(getattr(module, name), MODULES))
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


@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")
@pytest.mark.parametrize("delta", [False, True])
def test_decays_at_the_limit_of_gentle_chunks(monkeypatch: pytest.MonkeyPatch, delta: bool):
    """As for bf16 operands: masked products overflow. That no factor underflows only a GPU sees, here factors are in fp64."""
    monkeypatch.setattr(vector_gate, "gentle_limit", lambda _: vector_gate_config.gentle_limit(torch.bfloat16))
    cases.check((1, 200, 1, 24, 24), "middle", "cpu", torch.float32, delta=delta, state=True)


@pytest.mark.parametrize("width", [32, 64])
def test_programs_with_some_of_the_columns(monkeypatch: pytest.MonkeyPatch, width: int):
    monkeypatch.setattr(delta_hopper_launch, "multiprocessors", lambda _: 128 // width)
    cases.check((1, 130, 1, 72, 96), "strong", "cpu", torch.float32, delta=True, state=True)


@pytest.mark.parametrize("state", [False, True])
def test_segments(monkeypatch: pytest.MonkeyPatch, state: bool):
    """With the delta rule; the last segment is shorter."""
    monkeypatch.setattr(vector_gate_hopper_launch, "FEW_WIDE", 3)
    monkeypatch.setattr(delta_hopper_launch, "segments_of", lambda *_: 3)
    cases.check((1, 64 * 4 + 9, 1, 72, 96), "weak", "cpu", torch.float32, delta=True, state=state)


def test_segments_without_the_delta_rule_are_those_of_the_plain_kernels(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(vector_gate, "SEGMENT", 1)
    cases.check((1, 300, 1, 16, 16), "weak", "cpu", torch.float32, delta=False, state=True)
