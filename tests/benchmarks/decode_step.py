"""Times decoding steps on a CUDA device: python -m tests.benchmarks.decode_step OUT.json [--sweep].

A row is the median over replays of a CUDA graph with a flushed L2 cache, states in place, 16 heads, bf16 inputs, fp32 states.
`bare` is the recurrence of the gated delta rule, `layer` what `kernels.layer_step` does in the same launch, `mixer` a whole
mixer of 2,048 channels with its projections, fused and with a launch for everything. Beside them stand what any kernel takes
(one element), and an elementwise copy of as many bytes as the states. --sweep times other configurations too.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch

from bench import catalog
from kernels.step import recurrent_step, states_in_place
from kernels.steps import step_launch
from kernels.steps.step_launch import Config
from mixers import _fused
from tests.benchmarks.facts import facts
from tests.benchmarks.linear_recurrence import graph_ms
from tests.benchmarks.small_shape import launches
from tests.kernels import cases_layer_step as cases

HEADS = 16
SHAPES = ((1, 128), (16, 128), (64, 128), (256, 128), (64, 64), (256, 64))
"""Batch, and width of keys and values."""
LAYERS = ("delta_net", "gated_delta_net", "gla", "kda", "mamba2", "retention")
MIXERS = {
    "delta_net": {"n_heads": HEADS},
    "gated_delta_net": {"n_heads": HEADS, "expand_v": 1.0, "output_gate": True},
    "gla": {"n_heads": HEADS, "expand_k": 1.0},
    "kda": {"n_heads": HEADS},
    "mamba2": {"d_state": 128},
    "retention": {"n_heads": HEADS},
}
CONFIGS = tuple(
    Config(elements, warps)
    for elements, warps in ((2048, 1), (2048, 2), (4096, 1), (4096, 2), (4096, 4), (8192, 2), (8192, 4), (8192, 8), (16_384, 8))
)


def us(call: Callable[[], object]) -> float:
    """Microseconds of a call without gradients, states in place."""

    @torch.no_grad()
    def in_place() -> None:
        with states_in_place():
            call()

    return round(1e3 * graph_ms(in_place), 2)


def bare(batch: int, width: int, *, state: torch.dtype = torch.float32) -> Callable[[], object]:
    """The gated delta rule's step."""
    q, k, v = torch.randn(3, batch, HEADS, width, device="cuda", dtype=torch.bfloat16)
    gate, beta = -torch.rand(batch, HEADS, device="cuda"), torch.rand(batch, HEADS, device="cuda")
    held = torch.zeros(batch, HEADS, width, width, device="cuda", dtype=state)
    k *= width**-0.5
    return lambda: recurrent_step(q, k, v, held, log_decay=gate, beta_BH=beta)


def layer(name: str, batch: int, width: int) -> Callable[[], object]:
    """One form of `kernels.layer_step`; Mamba-2 has values half as wide."""
    shape = (batch, HEADS, width, width // 2 if name == "mamba2" else width)
    tensors = cases.draw(name, shape, device="cuda", dtype=torch.bfloat16)
    return lambda: cases.step(cases.FORMS[name], tensors)


def mixer_rows(name: str, batch: int) -> dict[str, float]:
    """A whole mixer, with one launch beside its projections and with many."""
    mixer = catalog.load("mixer", name)(128 * HEADS, **MIXERS[name]).to("cuda", torch.bfloat16)
    x = torch.randn(batch, 128 * HEADS, device="cuda", dtype=torch.bfloat16)
    state = mixer.init_state(batch, 1, device="cuda")
    row: dict[str, float] = {}
    for form, taken in (("fused", _fused.fuses), ("apart", lambda *_, **__: False)):
        with mock.patch.object(_fused, "fuses", taken):
            row[f"{form}_us"] = us(lambda: mixer(x[:, None], state))
            with torch.no_grad(), states_in_place():
                row[f"{form}_launches"] = launches(lambda: mixer(x[:, None], state))
    return row


def beside(batch: int, width: int) -> dict[str, float]:
    """A copy of the state's bytes, and the smallest kernel."""
    source, one = torch.zeros(batch, HEADS, width, width, device="cuda"), torch.zeros(1, device="cuda")
    target = torch.empty_like(source)
    calls = {
        "copy_us": lambda: torch.neg(source, out=target),
        "in_place_us": lambda: source.mul_(1.0),
        "one_element_us": lambda: one.add_(1),
    }
    return {name: us(call) for name, call in calls.items()}


def main() -> None:
    """Writes every row as soon as it is there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--sweep", action="store_true")
    given = parser.parse_args()
    rows: list[dict[str, object]] = []

    def keep(row: dict[str, object]) -> None:
        rows.append(row)
        print(json.dumps(row), flush=True)
        given.out.write_text(json.dumps({**facts("python -m tests.benchmarks.decode_step"), "rows": rows}, indent=1) + "\n")

    for batch, width in SHAPES:
        sizes = {"batch": batch, "heads": HEADS, "width": width}
        row: dict[str, object] = {**sizes, **beside(batch, width), "bare_us": us(bare(batch, width))}
        row["bare_bf16_state_us"] = us(bare(batch, width, state=torch.bfloat16))
        row["layer_us"] = {name: us(layer(name, batch, width)) for name in LAYERS}
        if given.sweep:
            row["bare_sweep_us"] = {}
            for config in CONFIGS:
                with mock.patch.object(step_launch, "CONFIG", config):
                    row["bare_sweep_us"][f"{config.elements} elements, {config.warps} warps"] = us(bare(batch, width))
        keep(row)
    for batch in (1, 64):
        for name in MIXERS:
            keep({"mixer": name, "batch": batch, **mixer_rows(name, batch)})


if __name__ == "__main__":
    main()
