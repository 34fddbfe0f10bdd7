"""Times the Triton walks on a CUDA device: python -m tests.benchmarks.linear_recurrence OUT.json [--sweep].

Each row is the median over replays of a CUDA graph with a flushed L2 cache, beside the time that the bytes and the
floating-point operations of the definition would take at the copy and matrix-product rates measured in the same run.
--sweep times many configurations instead of the shipped ones.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
import triton
from triton.testing import do_bench

from kernels import walk
from kernels.dispatch import use_backend
from kernels.recurrence import linear_recurrence

# batch, length, groups, heads, key width, value width
SHAPES = (
    (8, 2048, 16, 16, 64, 64),
    (8, 2048, 16, 16, 128, 128),
    (32, 512, 16, 16, 64, 64),
    (32, 512, 16, 16, 128, 128),
    (2, 8192, 16, 16, 64, 64),
    (2, 8192, 16, 16, 128, 128),
    (64, 256, 2, 2, 64, 64),
    (8, 2048, 1, 16, 128, 64),
)
GATES = ("none", "constant", "scalar")
CHUNK_OF_FLOPS = 64


def graph_ms(call: Callable[[], object]) -> float:
    """Median milliseconds of a call replayed as a CUDA graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return do_bench(graph.replay, warmup=20, rep=100, return_mode="median")


def ceilings() -> tuple[float, float]:
    """Bytes a second of an elementwise pass over 1 GiB, and FLOP/s of an 8192^3 bf16 product.

    A plain copy would become a memcpy node of the graph, which is slower than a kernel (docs/log.md, "speeds").
    """
    source = torch.randn(2**28, device="cuda")
    target = torch.empty_like(source)
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    return 2 * 2**30 / graph_ms(lambda: torch.neg(source, out=target)) * 1e3, 2 * 8192**3 / graph_ms(lambda: a @ a) * 1e3


def floors_ms(shape: tuple[int, ...], rates: tuple[float, float]) -> tuple[float, float]:
    """Least time of the forward pass, and of forward and backward, for 16-bit tensors."""
    batch, length, groups, heads, k_dim, v_dim = shape
    tokens = batch * length
    qk, v = 2 * tokens * groups * k_dim * 2, tokens * heads * v_dim * 2
    forward_bytes, backward_bytes = qk + 2 * v, 2 * qk + 3 * v
    chunk = 2 * CHUNK_OF_FLOPS
    forward = tokens * heads * (chunk * (k_dim + v_dim) + 4 * k_dim * v_dim)
    backward = tokens * heads * (chunk * (3 * k_dim + 2 * v_dim) + 10 * k_dim * v_dim)
    first = max(forward_bytes / rates[0], forward / rates[1])
    both = max((forward_bytes + backward_bytes) / rates[0], (forward + backward) / rates[1])
    return first * 1e3, both * 1e3


def row(shape: tuple[int, ...], gate: str) -> dict[str, float]:
    """Graph times of one shape and gate."""
    batch, length, groups, heads, k_dim, v_dim = shape

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, device="cuda", dtype=torch.bfloat16)

    q, k, v = (
        normal(batch, length, groups, k_dim),
        normal(batch, length, groups, k_dim) * k_dim**-0.5,
        normal(batch, length, heads, v_dim),
    )
    decay = {
        "none": None,
        "constant": -torch.rand(heads, device="cuda"),
        "scalar": -torch.rand(batch, length, heads, device="cuda"),
    }[gate]
    leaves = [x.requires_grad_() for x in (q, k, v, *([decay] if gate == "scalar" else []))]
    do = normal(*v.shape)

    def both() -> None:
        torch.autograd.grad(linear_recurrence(q, k, v, log_decay=decay)[0], leaves, do)

    with use_backend("triton"):
        with torch.no_grad():
            forward = graph_ms(lambda: linear_recurrence(q, k, v, log_decay=decay))
        return {"forward_ms": forward, "both_ms": graph_ms(both)}


def shipped(rates: tuple[float, float]) -> list[dict]:
    """Every shape and gate with the shipped configurations."""
    rows = []
    for shape, gate in itertools.product(SHAPES, GATES):
        times, floor = row(shape, gate), floors_ms(shape, rates)
        ratios = {"forward_x": times["forward_ms"] / floor[0], "both_x": times["both_ms"] / floor[1]}
        rows.append({"shape": shape, "gate": gate, **times, **ratios})
        print(json.dumps(rows[-1]), flush=True)
    return rows


def candidates() -> list[tuple[walk.Config, int, str]]:
    """Configurations, widths and gates of a sweep."""
    shapes = [(64, 4), (64, 8), (128, 8)]
    options = [walk.Config(chunk, tile, warps, stages) for (chunk, warps) in shapes for tile in (32, 64) for stages in (1, 2, 3)]
    return list(itertools.product(options, (64, 128), ("none", "scalar")))


def try_one(candidate: tuple[walk.Config, int, str], batch: int, length: int, heads: int) -> dict:
    """Times one configuration, or says that it does not fit the chip."""
    config, width, gate = candidate
    walk.FORWARD_16[width] = walk.BACKWARD_16[width] = config
    record = {"config": config, "width": width, "gate": gate}
    try:
        return record | row((batch, length, heads, heads, width, width), gate)
    except triton.runtime.errors.OutOfResources as error:
        return record | {"error": str(error)}


def compile_one(candidate: tuple[walk.Config, int, str]) -> None:
    """Leaves the compiled kernels in Triton's cache on disk."""
    try_one(candidate, 1, 64, 1)


def sweep() -> list[dict]:
    """The main shape with every candidate, compiled by several processes beforehand."""
    with ProcessPoolExecutor(12, mp_context=get_context("spawn")) as pool:
        list(pool.map(compile_one, candidates()))
    rows = []
    for candidate in candidates():
        rows.append(try_one(candidate, 8, 2048, 16))
        print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    """Writes the rows with the versions and the ceilings they were measured beside."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--sweep", action="store_true")
    arguments = parser.parse_args()
    rates = ceilings()
    record = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "copy_bytes_per_s": rates[0],
        "product_flop_per_s": rates[1],
        "rows": sweep() if arguments.sweep else shipped(rates),
    }
    arguments.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
