"""Times the decoding step on a CUDA device under many configurations: python -m tests.benchmarks.decode_step OUT.json.

A row is the median over replays of a CUDA graph with a flushed L2 cache, state in place, 16 heads, bf16 inputs. Beside it stand
what any kernel takes (one element), and a device copy of as many bytes as the state of a batch.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from unittest import mock

import torch

from kernels import step_launch
from kernels.step import recurrent_step, states_in_place
from kernels.step_launch import Config
from tests.benchmarks.facts import facts
from tests.benchmarks.linear_recurrence import graph_ms

HEADS = 16
SHAPES = ((1, 128), (16, 128), (64, 128), (256, 128), (64, 64), (256, 64))
"""Batch, and width of keys and values."""
CONFIGS = tuple(
    Config(elements, warps)
    for elements, warps in ((2048, 1), (2048, 2), (4096, 1), (4096, 2), (4096, 4), (8192, 2), (8192, 4), (8192, 8), (16_384, 8))
)


def microseconds(config: Config, batch: int, width: int, *, state: torch.dtype = torch.float32) -> float:
    """The gated delta rule's step."""
    q, k, v = torch.randn(3, batch, HEADS, width, device="cuda", dtype=torch.bfloat16)
    gate, beta = -torch.rand(batch, HEADS, device="cuda"), torch.rand(batch, HEADS, device="cuda")
    held = torch.zeros(batch, HEADS, width, width, device="cuda", dtype=state)

    @torch.no_grad()
    def step() -> None:
        with states_in_place():
            recurrent_step(q, k, v, held, log_decay=gate, beta_BH=beta)

    k *= width**-0.5
    with mock.patch.object(step_launch, "CONFIG", config):
        return 1e3 * graph_ms(step)


def beside(batch: int, width: int) -> dict[str, float]:
    """A copy of the state's bytes, and the smallest kernel."""
    source, one = torch.zeros(batch, HEADS, width, width, device="cuda"), torch.zeros(1, device="cuda")
    target = torch.empty_like(source)
    calls = {
        "copy_us": lambda: torch.neg(source, out=target),
        "in_place_us": lambda: source.mul_(1.0),
        "one_element_us": lambda: one.add_(1),
    }
    return {name: 1e3 * graph_ms(call) for name, call in calls.items()}


def main() -> None:
    """Writes every configuration at every shape."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    rows: list[dict[str, object]] = []
    for batch, width in SHAPES:
        row: dict[str, object] = {"batch": batch, "heads": HEADS, "width": width, **beside(batch, width)}
        row["us"] = {f"{config.elements} elements, {config.warps} warps": microseconds(config, batch, width) for config in CONFIGS}
        row["bf16_state_us"] = microseconds(step_launch.CONFIG, batch, width, state=torch.bfloat16)
        rows.append(row)
        print(json.dumps(row), flush=True)
    out.write_text(json.dumps({**facts("python -m tests.benchmarks.decode_step"), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
