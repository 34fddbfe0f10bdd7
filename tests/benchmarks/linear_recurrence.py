"""Times the Triton walks on a CUDA device: python -m tests.benchmarks.linear_recurrence OUT.json.

Each row is the median over replays of a CUDA graph with a flushed L2 cache, beside the time that the bytes and the
floating-point operations of the definition would take at the copy and matrix-product rates measured in the same run.
Each shape and gate is compared with the torch form in fp64 before it is timed, on the same inputs at a quarter of the length.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from bench.throughput.clock import replays
from kernels.dispatch import use_backend
from kernels.recurrence import linear_recurrence
from tests.benchmarks.facts import facts
from tests.kernels.oracle import rms_error

# batch, length, groups, heads, key width, value width
SHAPES = (
    (8, 2048, 16, 16, 64, 64),
    (8, 2048, 16, 16, 128, 128),
    (32, 512, 16, 16, 64, 64),
    (32, 512, 16, 16, 128, 128),
    (2, 8192, 16, 16, 64, 64),
    (2, 8192, 16, 16, 128, 128),
    (1, 32768, 16, 16, 64, 64),
    (1, 32768, 16, 16, 128, 128),
    (64, 256, 2, 2, 64, 64),
    (8, 2048, 1, 16, 128, 64),
    (32, 512, 1, 16, 128, 64),
    (2, 8192, 1, 16, 128, 64),
    (1, 32768, 1, 16, 128, 64),
)
GATES = ("none", "constant", "scalar")
CHUNK_OF_FLOPS = 64


def graph_ms(call: Callable[[], object]) -> float:
    """Median milliseconds of a call replayed as a CUDA graph."""
    return replays(call).median_us / 1e3


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


class Problem(NamedTuple):
    """Inputs of one row, the leaves of its gradients, and the gradient of its output."""

    inputs: dict[str, torch.Tensor]
    leaves: list[torch.Tensor]
    do: torch.Tensor


def draw(shape: tuple[int, ...], gate: str, length: int) -> Problem:
    """Random inputs; a scalar decay gets a gradient, a constant one does not."""
    batch, _, groups, heads, k_dim, v_dim = shape

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, device="cuda", dtype=torch.bfloat16)

    inputs = {
        "q_BTGK": normal(batch, length, groups, k_dim),
        "k_BTGK": normal(batch, length, groups, k_dim) * k_dim**-0.5,
        "v_BTHV": normal(batch, length, heads, v_dim),
    }
    if gate != "none":
        inputs["log_decay"] = -torch.rand(*((heads,) if gate == "constant" else (batch, length, heads)), device="cuda")
    leaves = [x.requires_grad_() for name, x in inputs.items() if name != "log_decay" or gate == "scalar"]
    return Problem(inputs, leaves, normal(batch, length, heads, v_dim))


def errors(problem: Problem) -> dict[str, float]:
    """Relative errors of the output and the gradients against the torch form in fp64."""
    exact = {name: x.detach().double().requires_grad_(x.requires_grad) for name, x in problem.inputs.items()}
    names = ["o", *(name for name, x in exact.items() if x.requires_grad)]
    sides = []
    for inputs, backend in ((problem.inputs, "triton"), (exact, "chunked")):
        with use_backend(backend):
            o, _ = linear_recurrence(**inputs)
        leaves = [x for x in inputs.values() if x.requires_grad]
        sides.append([o, *torch.autograd.grad(o, leaves, problem.do.to(o))])
    return {name: rms_error(got, want) for name, got, want in zip(names, *sides, strict=True)}


def row(shape: tuple[int, ...], gate: str) -> dict[str, object]:
    """Errors, and graph times if they are small enough."""
    found = errors(draw(shape, gate, max(64, shape[1] // 4)))
    if any(error > (2e-2 if name == "log_decay" else 5e-3) for name, error in found.items()):
        return {"errors": found, "refused": "an error is too large"}
    problem = draw(shape, gate, shape[1])
    with use_backend("triton"):
        with torch.no_grad():
            forward = graph_ms(lambda: linear_recurrence(**problem.inputs))
        both = graph_ms(lambda: torch.autograd.grad(linear_recurrence(**problem.inputs)[0], problem.leaves, problem.do))
    return {"errors": found, "forward_ms": forward, "both_ms": both}


def main() -> None:
    """Writes the rows, one by one, with the versions and the ceilings they were measured beside."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    rates = ceilings()
    record = facts("python -m tests.benchmarks.linear_recurrence") | {
        "copy_bytes_per_s": rates[0],
        "product_flop_per_s": rates[1],
        "rows": [],
    }
    for shape, gate in itertools.product(SHAPES, GATES):
        found, floor = row(shape, gate), floors_ms(shape, rates)
        ratios = {
            f"{part}_x": found[f"{part}_ms"] / least
            for part, least in zip(("forward", "both"), floor, strict=True)
            if f"{part}_ms" in found
        }
        record["rows"].append({"shape": shape, "gate": gate, **found, **ratios})
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")
        print(json.dumps(record["rows"][-1]), flush=True)


if __name__ == "__main__":
    main()
