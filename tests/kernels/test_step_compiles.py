"""What the decoding step takes on sm_90, found by the compiler without a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton.language as tl

from kernels.operands import _precision
from kernels.step_form import StepForm
from kernels.steps.kept_step_triton import kept_step_kernel
from kernels.steps.step_launch import NOTHING_AROUND, config_of, constants, spread, tile_widths, together
from kernels.steps.step_triton import step_kernel
from kernels.steps.window_step_triton import window_step_kernel
from kernels.window_step import tile_of
from tests.kernels.cases_layer_step import CONVOLVED, DECAYS, FORMS
from tests.kernels.offline import Resources, compile_sm90

WIDE = (
    "decay_bias", "log_rate", "taps", "conv_bias", "tail", "new_tail", "sums", "new_sums", "skip", "norm_weight", "norm_bias",
    "raw",
)  # fmt: skip
STATES = {"fp32": "*fp32+", "bf16": "*bf16+", "fp16": "*fp16+"}


def compile_kernel(
    form: StepForm, flags: dict[str, Any], k_dim: int, v_dim: int, *, state: str = "fp32", group: int = 1
) -> Resources:
    """One specialisation, with 16-bit inputs and fp32 weights."""
    config = config_of(form, k_dim, v_dim)
    keys, values = tile_widths(k_dim, v_dim, config)
    flags = constants(form, NOTHING_AROUND, 0, None, None) | flags
    wait = together(form, -(-v_dim // values), group, taps=flags["TAPS"] > 1)
    runtime = {p.name: p.annotation_type or "*bf16+" for p in step_kernel.params if not p.is_constexpr}
    runtime |= dict.fromkeys(WIDE, "*fp32+") | {"old": STATES[state], "new": STATES[state], "arrived": "*i32+"}
    arguments = runtime | flags | {"K": k_dim, "V": v_dim, "BK": keys, "BV": values, "TOGETHER": wait}
    arguments |= spread(keys, values, config)
    options = {} if config.registers is None else {"maxnreg": config.registers}
    return compile_sm90(step_kernel, {name: arguments[name] for name in step_kernel.arg_names}, warps=config.warps, **options)


def compile_step(k_dim: int, v_dim: int, gate: int, *, delta: bool, state: str, rank_one: bool = False) -> Resources:
    """The bare recurrence."""
    return compile_kernel(StepForm(), {"GATE": gate, "DELTA": delta, "RANK_ONE": rank_one}, k_dim, v_dim, state=state)


def compile_form(name: str, k_dim: int, v_dim: int) -> Resources:
    """A layer's step, with all that the layer has around it."""
    form, ssd = FORMS[name], name == "mamba2"
    flags = {
        "GATE": {None: 0, 1: 1, 2: 1, 3: 2}[DECAYS.get(name)],
        "DELTA": form.open_beta,
        "TAPS": 4 if name in CONVOLVED and name != "bare" else 0,
        "CONV_BIAS": ssd,
        "SKIP": ssd,
        "NORM_WEIGHT": form.norm in ("rms", "layer", "row"),
        "NORM_BIAS": name == "retention",
    }
    return compile_kernel(form, flags, k_dim, v_dim, group=16 if ssd else 1)


@pytest.mark.parametrize("name", ["gated_delta_net", "kda", "mamba2", "retention"])
def test_a_layer_fits(name: str):
    assert compile_form(name, 64, 64).spilled <= 8


@pytest.mark.slow
@pytest.mark.parametrize("widths", [(16, 16), (60, 100), (128, 64), (128, 128), (256, 256)])
@pytest.mark.parametrize("name", list(FORMS))
def test_every_layer_compiles(name: str, widths: tuple[int, int]):
    used = compile_form(name, *widths)
    assert used.spilled <= (256 if config_of(FORMS[name], *widths).registers else 0)  # fewer registers for a second program


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


@pytest.mark.parametrize(("width", "dtype", "spill"), [(64, torch.bfloat16, 0), (256, torch.bfloat16, 0), (128, torch.float32, 32)])
@pytest.mark.parametrize("kernel", [window_step_kernel, kept_step_kernel], ids=["window", "kept"])
def test_a_window_fits(kernel: Any, width: int, dtype: torch.dtype, spill: int):
    keys, warps = tile_of(width, dtype)
    pointer, dot = ("*fp32+", tl.float32) if dtype == torch.float32 else ("*bf16+", tl.bfloat16)
    runtime = {p.name: p.annotation_type or pointer for p in kernel.params if not p.is_constexpr}
    sizes = {"K": width, "V": width, "BK": width, "BV": width, "M": 16, "N": keys, "DOT": dot}
    sizes |= {"PRECISION": tl.constexpr(_precision(dtype))}
    rows = {"BP": 16} if kernel is window_step_kernel else {"BS": 16, "BP": 512, "BL": 256}
    scores = dict.fromkeys(("score", "kept_score", "near_score"), "*fp32+")
    arguments = runtime | sizes | rows | scores | {"position": "*i64+"}
    used = compile_sm90(kernel, {name: arguments[name] for name in kernel.arg_names}, warps=warps)
    assert used.spilled <= spill
    assert "wgmma" not in used.ptx  # sixteen rows are too few for it
