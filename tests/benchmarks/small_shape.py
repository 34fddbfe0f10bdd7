"""Times every recurrence at the size of small models on a CUDA device: python -m tests.benchmarks.small_shape OUT.json [--profile].

B=64 H=2 T=256 D=64 in bf16. Eager is wall time a call from Python in a loop without synchronisation, graph the replay of the
same call with a flushed L2 cache. --profile prints where Python spends the eager time.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import os
import pstats
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from bench.throughput import clock
from bench.throughput.bounds import Shape
from bench.throughput.draws import Draw
from bench.throughput.kernels import OPERATIONS
from bench.throughput.measure import timed_call
from bench.throughput.names import KERNELS
from bench.throughput.problem import Problem
from kernels.dplr import dplr_recurrence
from tests.benchmarks.facts import facts

BATCH, LENGTH, HEADS, WIDTH = 64, 256, 2, 64
MODES = {"forward": False, "both": True}
LOOPS = 21
NAMES = (
    "linear", "constant_decay", "scalar_decay", "ssd", "delta", "gated_delta", "gla", "kda", "taylor", "selective_scan", "scan",
    "short_conv",
)  # fmt: skip


def rwkv7(draw: Draw) -> Problem:
    """RWKV-7's recurrence, which `bench throughput` does not time."""
    q, k, v, b = (draw.normal(BATCH, LENGTH, HEADS, WIDTH) for _ in range(4))
    b = torch.nn.functional.normalize(b, dim=-1)
    decay = -draw.uniform(BATCH, LENGTH, HEADS, WIDTH)
    inputs = {"q": q, "k": k * WIDTH**-0.5, "v": v, "a": -0.5 * b, "b": b, "log_decay": decay}

    def call(own: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        *vectors, log_decay = own.values()
        return {"o": dplr_recurrence(*vectors, log_decay_BTHK=log_decay)[0]}

    return Problem(inputs, call, call, tuple(inputs))


def problem_of(name: str, draw: Draw) -> Problem:
    """One recurrence, with gradients of every input."""
    if name == "rwkv7":
        return rwkv7(draw)
    shape: Shape = KERNELS[name].shape(BATCH, LENGTH, HEADS, WIDTH)  # type: ignore[index]
    return OPERATIONS[name].problem(shape, "train", draw)  # type: ignore[index]


def bounds_us(name: str, rates: clock.Ceilings) -> dict[str, float]:
    """Least times by bytes and operations, for what `bench throughput` knows."""
    if name not in KERNELS:
        return {}
    shape: Shape = KERNELS[name].shape(BATCH, LENGTH, HEADS, WIDTH)
    costs = {mode: OPERATIONS[name].cost(shape, timed, 2) for mode, timed in (("forward", "forward"), ("both", "train"))}
    return {
        f"{mode}_bound_us": round(1e6 * max(cost.seconds(rates.copy_bytes_per_second, rates.product_flops_per_second)), 2)
        for mode, cost in costs.items()
    }


def row(name: str, draw: Draw, rates: clock.Ceilings) -> dict[str, Any]:
    """Medians in microseconds, of eager times the quantiles too."""
    problem = problem_of(name, draw)
    found: dict[str, Any] = {"kernel": name, **bounds_us(name, rates)}
    for mode, gradients in MODES.items():
        call = timed_call(problem, gradients=gradients)
        for _ in range(5):
            call()
        eager = clock.eager(call, draw.device, loops=LOOPS)
        found |= {f"{mode}_eager_us": round(eager.median_us, 1), f"{mode}_eager_low_us": round(eager.low_us, 1)}
        found |= {f"{mode}_eager_high_us": round(eager.high_us, 1), f"{mode}_graph_us": round(clock.replays(call).median_us, 1)}
        if gradients:
            with torch.autograd.set_multithreading_enabled(False):  # backward in the thread that called it
                found["both_one_thread_us"] = round(clock.eager(call, draw.device, loops=LOOPS).median_us, 1)
    return found


def floor_us(draw: Draw) -> dict[str, float]:
    """What torch alone takes: a function of three tensors that allocates its results, and is differentiated by one that does."""
    inputs = [draw.normal(BATCH, LENGTH, HEADS, WIDTH).requires_grad_() for _ in range(3)]
    weight = draw.normal(BATCH, LENGTH, HEADS, WIDTH)

    def both() -> object:
        return torch.autograd.grad([Empty.apply(*inputs)], inputs, [weight])

    def microseconds(call: clock.Call) -> float:
        return round(clock.eager(call, draw.device, loops=LOOPS).median_us, 1)

    found = {"forward_torch_us": microseconds(lambda: Empty.apply(*inputs)), "both_torch_us": microseconds(both)}
    with torch.autograd.set_multithreading_enabled(False):
        return found | {"both_torch_one_thread_us": microseconds(both)}


class Empty(torch.autograd.Function):
    """Does nothing but what every differentiable function written in Python has to."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """Room for outputs."""
        ctx.save_for_backward(q, k, v)
        return torch.empty_like(v)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, ...]:  # type: ignore[override]
        """Room for gradients."""
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors)


def calls_of(name: str, draw: Draw) -> Iterator[tuple[str, clock.Call]]:
    """A recurrence in every mode."""
    problem = problem_of(name, draw)
    for mode, gradients in MODES.items():
        yield mode, timed_call(problem, gradients=gradients)


def launches(call: clock.Call) -> int:
    """Kernels and memory operations of one call on the device."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    return sum(event.count for event in profiler.key_averages() if event.device_type == torch.autograd.DeviceType.CUDA)


def profiled(name: str, draw: Draw, calls: int = 200) -> None:
    """Prints what Python does in the training call."""
    call = timed_call(problem_of(name, draw), gradients=True)
    call()
    torch.cuda.synchronize()
    with cProfile.Profile() as profile:
        for _ in range(calls):
            call()
    torch.cuda.synchronize()
    print("profile of", name, calls, "calls")
    pstats.Stats(profile).sort_stats("tottime").print_stats(22)


def main() -> None:
    """Writes one row for each recurrence."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--profile", nargs="*", default=[])
    given = parser.parse_args()
    draw = Draw(torch.device("cuda"), torch.bfloat16, torch.Generator("cuda").manual_seed(0))
    rows, rates = [], clock.ceilings(draw.device)
    record = {
        **facts("python -m tests.benchmarks.small_shape"),
        **rates._asdict(),
        **floor_us(draw),
        "load": os.getloadavg(),
        "rows": rows,
    }
    for name in (*NAMES, "rwkv7"):
        try:
            rows.append(row(name, draw, rates))
        except Exception as error:  # a row that fails is a finding too
            rows.append({"kernel": name, "error": f"{type(error).__name__}: {error}"})
        print(json.dumps(rows[-1]), flush=True)
        given.out.write_text(json.dumps(record, indent=1) + "\n")
    for found in rows:  # last, as a profiler slows down every later launch
        if "error" not in found:
            found |= {f"{mode}_launches": launches(call) for mode, call in calls_of(found["kernel"], draw)}
    given.out.write_text(json.dumps(record, indent=1) + "\n")
    for name in given.profile:
        profiled(name, draw)


if __name__ == "__main__":
    main()
