"""Clocks: CUDA-graph replays, eager calls, first calls, peak memory, and the rates that bound them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch

from bench.speed_records import Timing

Call = Callable[[], Any]

WARM_UP_MS, MEASURED_MS = 10, 60
"""Of graph replays."""
LOOPS, LOOP_SECONDS, MOST_SECONDS = 7, 0.01, 1.0
"""Eager calls are timed in loops of this length; slow calls in fewer loops."""
COPIED = {"cuda": 1 << 30, "cpu": 1 << 27}
PRODUCT = {"cuda": 8192, "cpu": 1024}


class Ceilings(NamedTuple):
    """Rates that the device reaches in this run."""

    copy_bytes_per_second: float
    product_flops_per_second: float
    product_dtype: str


def timing(microseconds: list[float]) -> Timing:
    """Quantiles of measured times."""
    low, high = _quantile(microseconds, 0.2), _quantile(microseconds, 0.8)
    return Timing(median_us=statistics.median(microseconds), low_us=low, high_us=high, n=len(microseconds))


def _quantile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def synchronize(device: torch.device) -> None:
    """Waits for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def eager(call: Call, device: torch.device, loops: int = LOOPS) -> Timing:
    """Wall time of a call from Python: at most so many loops of calls with one synchronisation at the end of each."""
    began = time.perf_counter()
    call()
    synchronize(device)
    once = max(time.perf_counter() - began, 1e-7)
    repeats = max(1, round(LOOP_SECONDS / once))
    found: list[float] = []
    for _ in range(max(3, min(loops, round(MOST_SECONDS / (repeats * once))))):
        began = time.perf_counter()
        for _ in range(repeats):
            call()
        synchronize(device)
        found.append((time.perf_counter() - began) / repeats * 1e6)
    return timing(found)


def replays(call: Call) -> Timing:
    """Device time of a call captured as a CUDA graph, the L2 cache flushed before each replay.

    Raises:
        RuntimeError: the call cannot be captured.
    """
    from triton.testing import do_bench

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    found = cast(list[float], do_bench(graph.replay, warmup=WARM_UP_MS, rep=MEASURED_MS, return_mode="all"))
    return timing([1e3 * milliseconds for milliseconds in found])


@contextmanager
def peak_memory(device: torch.device) -> Iterator[list[int]]:
    """Holds, after the block, the most bytes of device memory held inside; nothing on a CPU."""
    found: list[int] = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    yield found
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        found.append(torch.cuda.max_memory_allocated(device))


def ceilings(device: torch.device) -> Ceilings:
    """Measures the device's copy rate (read and written) and its rate of large matrix products.

    The copy is an elementwise kernel: a memcpy node of a CUDA graph may take a slower engine.
    """
    kind = device.type
    source = torch.zeros(COPIED[kind] // 4, device=device)
    target = torch.empty_like(source)
    dtype = torch.bfloat16 if kind == "cuda" else torch.float32
    size = PRODUCT[kind]
    a = torch.randn(size, size, device=device, dtype=dtype)
    clock = replays if kind == "cuda" else lambda call: eager(call, device)
    copy, product = clock(lambda: torch.neg(source, out=target)), clock(lambda: a @ a)
    rates = 2 * COPIED[kind] / copy.median_us * 1e6, 2 * size**3 / product.median_us * 1e6
    return Ceilings(*rates, str(dtype).removeprefix("torch."))
