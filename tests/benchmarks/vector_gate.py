"""Times the vector-gate kernels on a CUDA device: python -m tests.benchmarks.vector_gate OUT.json [--parts].

Each row is the median over replays of a CUDA graph with a flushed L2 cache, beside the time that the bytes and the
floating-point operations of the definition would take at the copy and matrix-product rates measured in the same run.
--parts adds each kernel's own time.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, normalize

from kernels.dispatch import use_backend
from kernels.recurrence import linear_recurrence
from kernels.vector_gates import vector_gate, vector_gate_kept
from tests.benchmarks.facts import facts
from tests.benchmarks.linear_recurrence import CHUNK_OF_FLOPS, ceilings, graph_ms

# batch, length, heads, key and value width
SHAPES = (
    (8, 2048, 16, 64),
    (8, 2048, 16, 128),
    (32, 512, 16, 64),
    (32, 512, 16, 128),
    (2, 8192, 16, 64),
    (2, 8192, 16, 128),
    (1, 32768, 16, 128),
    (64, 256, 2, 64),
)
GATES = {
    "weak": lambda z, u: logsigmoid(z) / 16,
    "plain": lambda z, u: logsigmoid(z),
    "bench throughput": lambda z, u: -5 * u**4,
    "to -10": lambda z, u: -10 * u,
    "strong": lambda z, u: 10 * logsigmoid(z),
}
"""Log decays from a normal and a uniform distribution."""
SEED = 0


def draw(shape: tuple[int, int, int, int], *, delta: bool, gate: str, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """Leaves; the log decays in bf16 are what the floor counts, mixers pass fp32."""
    batch, length, heads, width = shape
    torch.manual_seed(SEED)
    q, k, v, z = (torch.randn(batch, length, heads, width, device="cuda") for _ in range(4))
    u = torch.rand(batch, length, heads, width, device="cuda")
    leaves = {"q_BTGK": q.bfloat16(), "k_BTGK": normalize(k, dim=-1).bfloat16(), "v_BTHV": v.bfloat16()}
    leaves["log_decay"] = GATES[gate](z, u).to(dtype)
    if delta:
        leaves["beta_BTH"] = torch.rand(batch, length, heads, device="cuda")
    return {name: x.requires_grad_() for name, x in leaves.items()}


def floors_ms(shape: tuple[int, int, int, int], rates: tuple[float, float], *, delta: bool, gate_bytes: int) -> tuple[float, float]:
    """Least time of the forward pass, and of forward and backward, with every input and output moved once."""
    batch, length, heads, width = shape
    rows = batch * length * heads
    step = rows * (4 if delta else 0)
    first = rows * width * (8 + gate_bytes) + step
    second = rows * width * (14 + 2 * gate_bytes) + 2 * step
    chunk, square = 2 * CHUNK_OF_FLOPS * width, width * width
    forward = rows * (5 * chunk + 6 * square if delta else 2 * chunk + 4 * square)
    both = 3.5 * forward if delta else rows * (7 * chunk + 14 * square)
    return tuple(1e3 * max(moved / rates[0], done / rates[1]) for moved, done in ((first, forward), (first + second, both)))


def times(leaves: dict[str, Tensor]) -> dict[str, float]:
    """Graph times of forward, and of forward and backward."""
    do = torch.randn_like(leaves["v_BTHV"])

    def both() -> None:
        torch.autograd.grad(linear_recurrence(**leaves)[0], list(leaves.values()), do)

    with use_backend("triton"):
        with torch.no_grad():
            forward = graph_ms(lambda: linear_recurrence(**leaves))
        return {"forward_ms": forward, "both_ms": graph_ms(both)}


def parts(leaves: dict[str, Tensor]) -> dict[str, object]:
    """Graph times of each kernel, and the kinds of the chunks."""
    q, k, v, gate, beta = (None if x is None else x.detach() for x in (*leaves.values(), *[None] * (5 - len(leaves))))
    do = torch.randn_like(v)
    flags = {"delta": beta is not None, "keep": True}
    kept = vector_gate_kept.kept_in(vector_gate_kept.kept_memory(q, k, v, **flags), q, k, v, **flags)
    call = vector_gate.Call(q, k, v, gate, beta, None, None, kept)
    call.prepare()
    call.walk(return_state=False, keep=True)
    dv, _, _, dstates = call.reverse(do, None)
    calls = {
        "prepare": call.prepare,
        "walk": lambda: call.walk(return_state=False, keep=False),
        "walk, keeping": lambda: call.walk(return_state=False, keep=True),
        "reverse": lambda: call.reverse(do, None),
        "gradients": lambda: call.gradients(do, dv, dstates),
    }
    return {name: graph_ms(f) for name, f in calls.items()} | {"blocks": levels(call)}


def levels(call: vector_gate.Call) -> dict[str, int]:
    """How many chunks are gentle in blocks of how many tokens; for `parts`."""
    found, counts = torch.unique(call.kept.levels, return_counts=True)
    return {str(2**level): count for level, count in zip(found.tolist(), counts.tolist(), strict=True)}


def shipped(rates: tuple[float, float], *, with_parts: bool) -> Iterator[dict]:
    """Every shape with the shipped configurations; other gates and an fp32 gate at the main shape."""
    main = SHAPES[1]
    cases = [(shape, "weak", torch.bfloat16) for shape in (main, *SHAPES)]
    cases += [(main, gate, torch.bfloat16) for gate in GATES if gate != "weak"] + [(main, "weak", torch.float32)]
    cases += [(SHAPES[-1], "bench throughput", torch.bfloat16)]
    for (shape, gate, dtype), delta in itertools.product(dict.fromkeys(cases), (False, True)):
        leaves = draw(shape, delta=delta, gate=gate, dtype=dtype)
        found, floor = times(leaves), floors_ms(shape, rates, delta=delta, gate_bytes=dtype.itemsize)
        ratios = {"forward_x": found["forward_ms"] / floor[0], "both_x": found["both_ms"] / floor[1]}
        names = {"shape": shape, "delta": delta, "gate": gate, "gate_dtype": str(dtype)}
        yield names | found | ratios | (parts(leaves) if with_parts else {})


def main() -> None:
    """Writes the rows with the versions and the ceilings they were measured beside."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--parts", action="store_true")
    arguments = parser.parse_args()
    rates = ceilings()
    record = {
        **facts("python -m tests.benchmarks.vector_gate"),
        "seed": SEED,
        "copy_bytes_per_s": rates[0],
        "product_flop_per_s": rates[1],
        "rows": [],
    }
    for row in shipped(rates, with_parts=arguments.parts):
        record["rows"].append(row)
        print(json.dumps(row), flush=True)
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
