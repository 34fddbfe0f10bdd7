"""Times Taylor linear attention on a CUDA device: python -m tests.benchmarks.taylor OUT.json [--sweep].

Each row is the median over replays of a CUDA graph with a flushed L2 cache, beside the time that the bytes and the
floating-point operations of the definition would take at the copy and matrix-product rates measured in the same run, and
beside torch's causal softmax attention on the same v. --sweep times many configurations of each kernel instead.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
import triton

from kernels import _replay
from kernels.dispatch import use_backend
from kernels.taylor import n_features, taylor_attention
from kernels.taylor_features import taylor_launch
from tests.benchmarks.facts import facts, swept
from tests.benchmarks.linear_recurrence import CHUNK_OF_FLOPS, ceilings, graph_ms

# batch, length, heads, width of q and k, width of v
MAIN = (8, 2048, 16, 16, 64)
SHAPES = (MAIN, (32, 512, 16, 16, 64), (2, 8192, 16, 16, 64), (1, 32768, 16, 16, 64), (64, 256, 2, 16, 64), (8, 2048, 16, 24, 64))


def floors_ms(shape: tuple[int, ...], rates: tuple[float, float]) -> tuple[float, float]:
    """Least time of the forward pass, and of forward and backward, for 16-bit tensors."""
    batch, length, heads, k_dim, v_dim = shape
    rows = batch * length * heads
    n = n_features(k_dim)
    forward = rows * (2 * CHUNK_OF_FLOPS * (k_dim + v_dim) + 4 * n * v_dim)
    backward = rows * (2 * CHUNK_OF_FLOPS * (3 * k_dim + 2 * v_dim) + 10 * n * v_dim)
    forward_bytes, backward_bytes = 4 * rows * (k_dim + v_dim), 2 * rows * (4 * k_dim + 3 * v_dim)
    first = max(forward_bytes / rates[0], forward / rates[1])
    return first * 1e3, max((forward_bytes + backward_bytes) / rates[0], (forward + backward) / rates[1]) * 1e3


def row(shape: tuple[int, ...]) -> dict[str, float]:
    """Graph times of one shape."""
    batch, length, heads, k_dim, v_dim = shape
    q, k, v = (
        torch.randn(batch, length, heads, n, device="cuda", dtype=torch.bfloat16).requires_grad_() for n in (k_dim, k_dim, v_dim)
    )
    dy = torch.randn_like(v)
    with use_backend("triton"):
        with torch.no_grad():
            forward = graph_ms(lambda: taylor_attention(q, k, v, eps=1e-6))
        both = graph_ms(lambda: torch.autograd.grad(taylor_attention(q, k, v, eps=1e-6)[0], (q, k, v), dy))
    return {"forward_ms": forward, "both_ms": both}


def softmax_row(shape: tuple[int, ...]) -> dict[str, float]:
    """Graph times of causal softmax attention with the width of v."""
    batch, length, heads, _, v_dim = shape
    x = [torch.randn(batch, heads, length, v_dim, device="cuda", dtype=torch.bfloat16).requires_grad_() for _ in range(3)]
    dy = torch.randn_like(x[0])
    with torch.no_grad():
        forward = graph_ms(lambda: F.scaled_dot_product_attention(*x, is_causal=True))
    both = graph_ms(lambda: torch.autograd.grad(F.scaled_dot_product_attention(*x, is_causal=True), x, dy))
    return {"softmax_forward_ms": forward, "softmax_both_ms": both}


def shipped(rates: tuple[float, float]) -> list[dict]:
    """Every shape with the shipped configurations."""
    rows = []
    for shape in SHAPES:
        times, floor = row(shape), floors_ms(shape, rates)
        ratios = {"forward_x": times["forward_ms"] / floor[0], "both_x": times["both_ms"] / floor[1]}
        rows.append({"shape": shape, **times, **ratios, **softmax_row(shape)})
        print(json.dumps(rows[-1]), flush=True)
    return rows


def candidates() -> list[tuple[str, taylor_launch.Config, int]]:
    """Kernel, its configuration and the length of chunks."""
    tiles = {
        "forward": (
            (128, 64, 64, 4, 3),
            (128, 64, 64, 4, 3, 168),
            (64, 64, 64, 4, 2),
            (64, 64, 64, 4, 2, 128),
            (64, 64, 64, 4, 3, 168),
            (64, 64, 32, 4, 2),
        ),
        "state": ((0, 64, 64, 4, 3), (0, 64, 64, 4, 4), (0, 64, 64, 4, 3, 128), (0, 128, 64, 4, 2, 168)),
        "query": ((64, 64, 32, 4, 1), (64, 64, 32, 4, 2), (64, 64, 32, 4, 1, 128), (64, 64, 64, 4, 2, 168), (128, 64, 32, 4, 2)),
        "key": (
            (64, 64, 64, 4, 2),
            (64, 64, 64, 4, 1),
            (64, 64, 32, 4, 1),
            (64, 64, 32, 4, 2, 168),
            (32, 64, 32, 4, 2),
            (32, 64, 64, 4, 2, 168),
        ),
    }
    chosen = [(name, taylor_launch.Config(*tile), 512) for name in tiles for tile in tiles[name]]
    return [("forward", taylor_launch.SIXTEEN_BIT[64].forward, chunk) for chunk in (256, 512)] + chosen


def try_one(candidate: tuple[str, taylor_launch.Config, int], shape: tuple[int, ...]) -> dict:
    """Times one configuration, or says that it does not fit the chip."""
    name, config, chunk = candidate
    shipped_configs, shipped_chunk = taylor_launch.SIXTEEN_BIT[64], taylor_launch.CHUNKS[16]
    taylor_launch.SIXTEEN_BIT[64] = shipped_configs._replace(**{name: config})
    taylor_launch.CHUNKS[16] = chunk
    record = {"kernel": name, "config": config, "chunk": chunk}
    try:
        with _replay.forgetful():
            return record | row(shape)
    except (triton.runtime.errors.OutOfResources, RuntimeError) as error:
        return record | {"error": str(error)[:200]}
    finally:
        taylor_launch.SIXTEEN_BIT[64], taylor_launch.CHUNKS[16] = shipped_configs, shipped_chunk


def compile_one(candidate: tuple[str, taylor_launch.Config, int]) -> None:
    """Leaves the compiled kernels in Triton's cache on disk."""
    try_one(candidate, (1, 1100, 1, 16, 64))


def sweep() -> list[dict]:
    """The main shape with every candidate."""
    return swept(candidates(), compile_one, lambda candidate: try_one(candidate, MAIN))


def main() -> None:
    """Writes the rows with the versions and the ceilings they were measured beside."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--sweep", action="store_true")
    arguments = parser.parse_args()
    rates = ceilings()
    record = {
        **facts("python -m tests.benchmarks.taylor", seed=0),
        "copy_bytes_per_s": rates[0],
        "product_flop_per_s": rates[1],
        "rows": sweep() if arguments.sweep else shipped(rates),
    }
    arguments.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
