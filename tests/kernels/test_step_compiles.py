"""What the decoding step takes on sm_90, found by the compiler without a GPU."""

from __future__ import annotations

import pytest

from kernels.step_launch import CONFIG, tile_widths
from kernels.step_triton import step_kernel
from tests.kernels.offline import Resources, compile_sm90

STATES = {"fp32": "*fp32+", "bf16": "*bf16+", "fp16": "*fp16+"}


def compile_step(k_dim: int, v_dim: int, gate: int, *, delta: bool, state: str, rank_one: bool = False) -> Resources:
    """One specialisation, with 16-bit inputs."""
    keys, values = tile_widths(k_dim, v_dim)
    runtime = {p.name: p.annotation_type or "*bf16+" for p in step_kernel.params if not p.is_constexpr}
    runtime |= {"gate": "*fp32+", "beta": "*fp32+", "old": STATES[state], "new": STATES[state]}
    constants = {"K": k_dim, "V": v_dim, "BK": keys, "BV": values, "GATE": gate, "DELTA": delta, "RANK_ONE": rank_one}
    arguments = runtime | constants
    return compile_sm90(step_kernel, {name: arguments[name] for name in step_kernel.arg_names}, warps=CONFIG.warps)


@pytest.mark.parametrize(("gate", "delta"), [(0, False), (1, True), (2, True)])
@pytest.mark.parametrize("width", [64, 128, 256])
def test_nothing_spills_and_loads_are_wide(width: int, gate: int, delta: bool):
    used = compile_step(width, width, gate, delta=delta, state="fp32")
    assert used.spilled == 0
    assert used.registers <= 128  # 16 warps an SM at least, which is what hides the memory's latency
    assert "v4.b32" in used.ptx


def test_a_rank_one_transition_does_not_spill():
    used = compile_step(64, 64, 2, delta=False, state="fp32", rank_one=True)
    assert used.spilled == 0


@pytest.mark.slow
@pytest.mark.parametrize("state", list(STATES))
@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("gate", [0, 1, 2])
@pytest.mark.parametrize("widths", [(16, 16), (60, 100), (153, 64), (128, 128), (273, 65), (1024, 64)])
def test_every_configuration_compiles(widths: tuple[int, int], gate: int, delta: bool, state: str):
    assert compile_step(*widths, gate, delta=delta, state=state).spilled == 0
