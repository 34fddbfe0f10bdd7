"""Times the Triton delta rule on a CUDA device: python -m tests.benchmarks.delta_rule OUT.json.

Each row is the median over replays of a CUDA graph with a flushed L2 cache, beside the time that the bytes and the
floating-point operations of the definition would take at the copy and matrix-product rates measured in the same run. Before it
is timed, a row is compared with the torch form in fp64 on a part of its length.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from bench.throughput.clock import MEASURED_MS, replays
from kernels.dispatch import use_backend
from kernels.recurrence import linear_recurrence
from tests.benchmarks.facts import facts
from tests.benchmarks.linear_recurrence import ceilings
from tests.kernels.oracle import rms_error

# batch, length, heads, key and value width
SHAPES = (
    (8, 2048, 16, 64),
    (8, 2048, 16, 128),
    (32, 512, 16, 64),
    (32, 512, 16, 128),
    (2, 8192, 16, 64),
    (2, 8192, 16, 128),
    (1, 32768, 16, 64),
    (1, 32768, 16, 128),
    (64, 256, 2, 64),
)
GATES = ("none", "scalar")
CHUNK_OF_FLOPS = 64
SEED = 0
# Relative RMS errors: of outputs, of gradients, of those of betas and decays.
LIMITS = {"o": 5e-3, "beta_BTH": 2e-2, "log_decay": 2e-2}
GRADIENT = 8e-3


def floors_ms(shape: tuple[int, ...], gate: str, rates: tuple[float, float]) -> tuple[float, float]:
    """Least time of the forward pass, and of forward and backward, for 16-bit tensors and fp32 gates."""
    batch, length, heads, width = shape
    rows = batch * length * heads
    gates = rows * 4 * (2 if gate == "scalar" else 1)
    flops = rows * (10 * CHUNK_OF_FLOPS * width + 6 * width**2)
    times = ((rows * width * 2 * tensors + gates * ins) / rates[0] for tensors, ins in ((4, 1), (11, 3)))
    first, both = (max(memory, work / rates[1]) for memory, work in zip(times, (flops, 3.5 * flops), strict=True))
    return first * 1e3, both * 1e3


def draw(shape: tuple[int, ...], gate: str) -> tuple[dict[str, Any], torch.Tensor]:
    """Random inputs, and the gradient of the output."""
    batch, length, heads, width = shape
    torch.manual_seed(SEED)
    q, k, v = (torch.randn(batch, length, heads, width, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    inputs = {"q_BTGK": F.normalize(q, dim=-1), "k_BTGK": F.normalize(k, dim=-1), "v_BTHV": v}
    inputs["beta_BTH"] = torch.rand(batch, length, heads, device="cuda")
    if gate == "scalar":
        inputs["log_decay"] = -torch.rand(batch, length, heads, device="cuda") / 8
    return inputs, torch.randn_like(v)


def calls(shape: tuple[int, ...], gate: str) -> tuple[Callable[[], object], Callable[[], object]]:
    """The forward pass, and forward and backward, on random inputs."""
    inputs, do = draw(shape, gate)
    trained = {name: x.clone().requires_grad_() for name, x in inputs.items()}

    def forward() -> object:
        return linear_recurrence(**inputs)

    def both() -> object:
        return torch.autograd.grad(linear_recurrence(**trained)[0], list(trained.values()), do)

    return forward, both


def errors(shape: tuple[int, ...], gate: str) -> dict[str, float]:
    """Relative errors of the output and the gradients against the torch form in fp64, on a quarter of the tokens."""
    batch, length, heads, width = shape
    inputs, do = draw((max(1, batch // 4), length if batch > 1 else length // 4, heads, width), gate)
    sides = []
    for dtype, backend in ((None, "triton"), (torch.float64, "chunked")):
        leaves = {name: x.detach().to(dtype or x.dtype).requires_grad_() for name, x in inputs.items()}
        with use_backend(backend):
            o, _ = linear_recurrence(**leaves)
        sides.append([o, *torch.autograd.grad(o, list(leaves.values()), do.to(o))])
    return {name: rms_error(got, want) for name, got, want in zip(["o", *inputs], *sides, strict=True)}


def replayed(call: Callable[[], object], part: str) -> dict[str, float]:
    """Median milliseconds of a call replayed as a CUDA graph, the times below which 20 and 80 % are, and the number of replays."""
    time = replays(call)
    return {
        f"{part}_ms": time.median_us / 1e3,
        f"{part}_ms_p20": time.low_us / 1e3,
        f"{part}_ms_p80": time.high_us / 1e3,
        f"{part}_n": time.n,
    }


def kernel_us(call: Callable[[], object], times: int = 10) -> dict[str, float]:
    """Mean microseconds of each kernel of a call."""
    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(times):
            call()
        torch.cuda.synchronize()
    return {event.key[:40]: event.device_time_total / times for event in seen.key_averages() if event.device_time_total}


def row(shape: tuple[int, ...], gate: str, rates: tuple[float, float]) -> dict[str, object]:
    """Errors, and times if they are small enough."""
    found = errors(shape, gate)
    if not all(error <= LIMITS.get(name, GRADIENT) for name, error in found.items()):
        return {"errors": found, "refused": "an error is too large"}
    forward, both = calls(shape, gate)
    times = replayed(forward, "forward") | replayed(both, "both")
    first, whole = floors_ms(shape, gate, rates)
    ratios = {"forward_x": times["forward_ms"] / first, "both_x": times["both_ms"] / whole}
    return {"errors": found, **times, **ratios, "kernel_us": kernel_us(both)}


def main() -> None:
    """Writes the rows, one by one, with the versions and the ceilings they were measured beside."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    rates = ceilings()
    record = facts("python -m tests.benchmarks.delta_rule OUT.json", SEED) | {
        "n": f"replays of a CUDA graph within {MEASURED_MS} ms, as many as a row says, L2 flushed before each; median, 20 and 80 %",
        "copy_bytes_per_s": rates[0],
        "product_flop_per_s": rates[1],
    }
    rows = []
    for shape, gate in itertools.product(SHAPES, GATES):
        with use_backend("triton"):
            rows.append({"shape": shape, "gate": gate, **row(shape, gate, rates)})
        arguments.out.write_text(json.dumps(record | {"rows": rows}, indent=1) + "\n")
        print(json.dumps(rows[-1]), flush=True)


if __name__ == "__main__":
    main()
