"""Times the Triton delta rule on a CUDA device: python -m tests.benchmarks.delta_rule OUT.json [--sweep].

Each row is the median over replays of a CUDA graph with a flushed L2 cache, beside the time that the bytes and the
floating-point operations of the definition would take at the copy and matrix-product rates measured in the same run.
--sweep times every kernel by itself with many configurations instead of the shipped ones.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
import triton
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from bench import provenance
from kernels import _replay, delta
from kernels.delta import Config, Launch
from kernels.dispatch import use_backend
from kernels.recurrence import linear_recurrence
from tests.benchmarks.linear_recurrence import ceilings, graph_ms

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


def floors_ms(shape: tuple[int, ...], gate: str, rates: tuple[float, float]) -> tuple[float, float]:
    """Least time of the forward pass, and of forward and backward, for 16-bit tensors and fp32 gates."""
    batch, length, heads, width = shape
    rows = batch * length * heads
    gates = rows * 4 * (2 if gate == "scalar" else 1)
    flops = rows * (10 * CHUNK_OF_FLOPS * width + 6 * width**2)
    times = ((rows * width * 2 * tensors + gates * ins) / rates[0] for tensors, ins in ((4, 1), (11, 3)))
    first, both = (max(memory, work / rates[1]) for memory, work in zip(times, (flops, 3.5 * flops), strict=True))
    return first * 1e3, both * 1e3


def calls(shape: tuple[int, ...], gate: str) -> tuple[Callable[[], object], Callable[[], object]]:
    """The forward pass, and forward and backward, on random inputs."""
    batch, length, heads, width = shape
    torch.manual_seed(SEED)
    q, k, v = (torch.randn(batch, length, heads, width, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    leaves = {"q_BTGK": F.normalize(q, dim=-1), "k_BTGK": F.normalize(k, dim=-1), "v_BTHV": v}
    leaves["beta_BTH"] = torch.rand(batch, length, heads, device="cuda")
    if gate == "scalar":
        leaves["log_decay"] = -torch.rand(batch, length, heads, device="cuda") / 8
    do = torch.randn_like(v)
    trained = {name: x.clone().requires_grad_() for name, x in leaves.items()}

    def forward() -> object:
        return linear_recurrence(**leaves)

    def both() -> object:
        return torch.autograd.grad(linear_recurrence(**trained)[0], list(trained.values()), do)

    return forward, both


def kernel_us(call: Callable[[], object], times: int = 10) -> dict[str, float]:
    """Mean microseconds of each kernel of a call."""
    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(times):
            call()
        torch.cuda.synchronize()
    return {event.key[:40]: event.device_time_total / times for event in seen.key_averages() if event.device_time_total}


def shipped(rates: tuple[float, float]) -> list[dict]:
    """Every shape and gate with the shipped configurations."""
    rows = []
    for shape, gate in itertools.product(SHAPES, GATES):
        forward, both = calls(shape, gate)
        times = {"forward_ms": graph_ms(forward), "both_ms": graph_ms(both)}
        floor = floors_ms(shape, gate, rates)
        ratios = {"forward_x": times["forward_ms"] / floor[0], "both_x": times["both_ms"] / floor[1]}
        rows.append({"shape": shape, "gate": gate, **times, **ratios, "kernel_us": kernel_us(both)})
        print(json.dumps(rows[-1]), flush=True)
    return rows


def candidates() -> list[tuple[Config, int, str]]:
    """Configurations, widths and gates of a sweep."""
    return [
        (delta.SIXTEEN_BIT[width]._replace(forward=Launch(tile, 4)), width, gate)
        for width, gate, tile in itertools.product((64, 128), GATES, (32, 64))
    ]


def try_one(candidate: tuple[Config, int, str], batch: int, length: int, heads: int) -> dict:
    """Times the kernels of one configuration, or says why it cannot run."""
    config, width, gate = candidate
    delta.SIXTEEN_BIT[width] = config
    _replay.forget()
    record = {"config": config, "width": width, "gate": gate}
    try:
        return record | kernel_us(calls((batch, length, heads, width), gate)[1])
    except (triton.runtime.errors.OutOfResources, RuntimeError):
        return record | {"error": traceback.format_exc()[-800:]}


def compile_one(candidate: tuple[Config, int, str]) -> dict:
    """Leaves the compiled kernels in Triton's cache on disk, and finds what would take the process down."""
    os.environ["CUDA_LAUNCH_BLOCKING"] = "1"
    with use_backend("triton"):
        return try_one(candidate, 1, 64, 1)


def sweep() -> list[dict]:
    """The main shape with every candidate that can run, compiled by processes of their own beforehand."""
    with ProcessPoolExecutor(14, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        tried = list(pool.map(compile_one, candidates()))
    rows = []
    for candidate, small in zip(candidates(), tried, strict=True):
        rows.append(small if "error" in small else try_one(candidate, 8, 2048, 16))
        print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    """Writes the rows with the versions and the ceilings they were measured beside."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--sweep", action="store_true")
    arguments = parser.parse_args()
    rates = ceilings()
    with use_backend("triton"):
        rows = sweep() if arguments.sweep else shipped(rates)
    record = {
        "commit": provenance.git_state()[0],
        "versions": provenance.versions(),
        "seed": SEED,
        "device": torch.cuda.get_device_name(),
        "copy_bytes_per_s": rates[0],
        "product_flop_per_s": rates[1],
        "rows": rows,
    }
    arguments.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
