"""Times attention over an index on a CUDA device: python -m tests.benchmarks.indexed_attention OUT.json [--sweep].

Each row is the median over replays of a CUDA graph with a flushed L2 cache, beside the time that the bytes and the
floating-point operations of the keys attended would take at the copy and matrix-product rates measured in the same run, and
beside torch's peers: FlexAttention for windows, fused causal attention to all keys for chosen blocks and for one token.
--sweep times many configurations of the window instead.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from kernels.dispatch import use_backend
from kernels.indexed import indexed_launch
from kernels.indexed.indexed_op import indexed_attention
from kernels.indexed_attention import block_attention, choose_blocks, decode_attention
from tests.benchmarks.facts import facts, swept
from tests.benchmarks.linear_recurrence import ceilings, graph_ms

# batch, heads of q, heads of k and v, length, head dim, window
WINDOWS = (
    (8, 16, 16, 2048, 128, 128),
    (8, 16, 16, 2048, 64, 128),
    (8, 16, 16, 2048, 64, 64),
    (8, 16, 16, 2048, 128, 512),
    (2, 16, 16, 8192, 128, 128),
    (1, 16, 16, 32768, 128, 128),
    (64, 2, 2, 256, 64, 64),
)
# batch, heads of q, heads of k and v, length, head dim, block, blocks chosen
CHOICES = (
    (8, 16, 1, 2048, 128, 64, 16),
    (2, 16, 1, 8192, 128, 64, 16),
    (1, 16, 1, 32768, 128, 64, 16),
    (8, 16, 16, 2048, 64, 64, 8),
    (64, 2, 2, 256, 64, 16, 4),
)
# batch, heads of q, heads of k and v, stored keys, head dim
CACHES = ((1, 16, 16, 32768, 128), (64, 16, 16, 2048, 128), (8, 32, 8, 8192, 128))


def qkv(batch: int, heads: int, kv_heads: int, length: int, width: int) -> list[Tensor]:
    """Queries, keys and values as a projection leaves them: time before heads."""
    sizes = ((batch, length, n, width) for n in (heads, kv_heads, kv_heads))
    return [torch.randn(size, device="cuda", dtype=torch.bfloat16).transpose(1, 2).requires_grad_() for size in sizes]


def timed(call: Callable[..., Tensor], tensors: list[Tensor]) -> tuple[float, float]:
    """Milliseconds of the forward pass, and of forward and backward."""
    with torch.no_grad():
        forward = graph_ms(lambda: call(*tensors))
    dy = torch.randn_like(call(*tensors))
    return forward, graph_ms(lambda: torch.autograd.grad(call(*tensors), tensors, dy))


def floors_ms(tensors: list[Tensor], keys_seen: float, rates: tuple[float, float]) -> tuple[float, float]:
    """Least time of the forward pass, and of both: each tensor once, 2 and then 5 more products for each key seen."""
    q, k, v = tensors
    sizes = 2 * q.numel() + k.numel() + v.numel()
    product = 2 * q.numel() * keys_seen
    first = max(2 * sizes / rates[0], 2 * product / rates[1])
    both = max(2 * (2 * sizes + q.numel() + k.numel() + v.numel()) / rates[0], 7 * product / rates[1])
    return first * 1e3, both * 1e3


def window_row(shape: tuple[int, ...], rates: tuple[float, float]) -> dict:
    """A causal window beside FlexAttention."""
    *sizes, length, width, window = shape
    tensors = qkv(*sizes, length, width)
    ours = timed(lambda q, k, v: indexed_attention(q, k, v, None, None, "band", [window, 0, 0, 0])[0], tensors)

    def visible(b, h, query, key):
        return (query >= key) & (query - key < window)

    torch.compiler.reset()
    compiled = torch.compile(flex_attention)
    mask = create_block_mask(visible, None, None, length, length, device="cuda")
    flex = timed(lambda q, k, v: compiled(q, k, v, block_mask=mask, enable_gqa=sizes[1] != sizes[2]), tensors)
    return record("window", shape, ours, floors_ms(tensors, min(window, length), rates), "flex", flex)


def choice_row(shape: tuple[int, ...], rates: tuple[float, float]) -> dict:
    """Blocks that random queries choose among random keys, with and without the choice, beside causal attention to all keys."""
    length, block, n_chosen = shape[3], *shape[5:]
    tensors = qkv(*shape[:5])
    token = torch.arange(length, device="cuda")

    def choose(q: Tensor, k: Tensor) -> Tensor:
        mean = k.detach().unflatten(2, (-1, block)).mean(3)
        return choose_blocks(q, mean, token, block=block, top_k=n_chosen - 1)

    chosen = choose(*tensors[:2])
    ours = timed(lambda q, k, v: block_attention(q, k, v, chosen, block=block, most=n_chosen), tensors)
    whole = timed(lambda q, k, v: block_attention(q, k, v, choose(q, k), block=block, most=n_chosen), tensors)
    dense = timed(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True), tensors)
    seen = float((token // block).clamp_max(n_chosen - 1).double().mean() * block + (block + 1) / 2)
    row = record("chosen blocks", shape, ours, floors_ms(tensors, seen, rates), "dense", dense)
    return row | {"with_choice_forward_ms": whole[0], "with_choice_both_ms": whole[1]}


def cache_row(shape: tuple[int, ...], rates: tuple[float, float]) -> dict:
    """One token and a full cache, beside torch's fused attention."""
    q, k, v = (x.detach() for x in qkv(*shape))
    seen = torch.ones(shape[0], 1, shape[3], dtype=torch.bool, device="cuda")
    with torch.no_grad():
        ours = graph_ms(lambda: decode_attention(q[:, :, -1], k, v, seen))
        peer = graph_ms(lambda: F.scaled_dot_product_attention(q[:, :, -1:], k, v, enable_gqa=shape[1] != shape[2]))
    floor = 2 * (k.numel() + v.numel()) / rates[0] * 1e3
    return {"case": "one token", "shape": shape, "forward_ms": ours, "forward_x": ours / floor, "sdpa_forward_ms": peer}


def record(
    case: str,
    shape: tuple[int, ...],
    ours: tuple[float, float],
    floors: tuple[float, float],
    peer: str,
    theirs: tuple[float, float],
) -> dict:
    """One row of the table."""
    row = {"case": case, "shape": shape, "forward_ms": ours[0], "both_ms": ours[1]}
    row |= {"forward_x": ours[0] / floors[0], "both_x": ours[1] / floors[1]}
    return row | {f"{peer}_forward_ms": theirs[0], f"{peer}_both_ms": theirs[1]}


def shipped(rates: tuple[float, float]) -> list[dict]:
    """Every case with the shipped configurations."""
    rows = []
    with use_backend("triton"):
        for make, shapes in ((window_row, WINDOWS), (choice_row, CHOICES), (cache_row, CACHES)):
            for shape in shapes:
                try:
                    rows.append(make(shape, rates))
                except torch.OutOfMemoryError as error:
                    rows.append({"shape": shape, "error": str(error)[:200]})
                print(json.dumps(rows[-1]), flush=True)
    return rows


Candidate = tuple[str, indexed_launch.Config, int]


def candidates() -> list[Candidate]:
    """Kernel, its configuration and head dim."""
    tiles = {
        "forward": (
            (64, 64, 4, 2),
            (64, 64, 4, 2, 168),
            (64, 64, 4, 1, 168),
            (64, 32, 4, 3, 128),
            (128, 64, 8, 1, 128),
            (128, 64, 8, 2, 128),
        ),
        "query": ((64, 64, 4, 2), (64, 64, 4, 2, 168), (64, 64, 4, 1, 168), (64, 32, 4, 3, 168), (128, 64, 8, 2, 128)),
        "key": ((32, 64, 4, 2), (32, 64, 4, 2, 168), (32, 64, 8, 2, 128), (64, 64, 4, 2), (64, 64, 8, 2, 128), (32, 32, 4, 2)),
    }
    return [(name, indexed_launch.Config(*tile), width) for width in (128, 64) for name in tiles for tile in tiles[name]]


def try_one(candidate: Candidate, batch: int, length: int) -> dict:
    """Times one configuration, or says that it does not fit the chip."""
    name, config, width = candidate
    before = indexed_launch.BAND_16[width]
    indexed_launch.BAND_16[width] = before._replace(**{name: config})
    row = {"kernel": name, "config": config, "width": width}
    try:
        tensors = qkv(batch, 16, 16, length, width)
        times = timed(lambda q, k, v: indexed_attention(q, k, v, None, None, "band", [128, 0, 0, 0])[0], tensors)
        return row | {"forward_ms": times[0], "both_ms": times[1]}
    except (triton.runtime.errors.OutOfResources, RuntimeError) as error:
        return row | {"error": str(error)[:200]}
    finally:
        indexed_launch.BAND_16[width] = before


def compile_one(candidate: Candidate) -> None:
    """Leaves the compiled kernels in Triton's cache on disk."""
    try_one(candidate, 1, 128)


def sweep() -> list[dict]:
    """The window of 128 keys with every candidate."""
    return swept(candidates(), compile_one, lambda candidate: try_one(candidate, 8, 2048))


def main() -> None:
    """Writes the rows with the versions and the ceilings they were measured beside."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--sweep", action="store_true")
    arguments = parser.parse_args()
    rates = ceilings()
    result = {
        **facts("python -m tests.benchmarks.indexed_attention", seed=0),
        "copy_bytes_per_s": rates[0],
        "product_flop_per_s": rates[1],
        "rows": sweep() if arguments.sweep else shipped(rates),
    }
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
