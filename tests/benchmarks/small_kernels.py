"""Times the small fused kernels on a CUDA device: python -m tests.benchmarks.small_kernels OUT.json [--sweep] [--kernel NAME ...].

A row is the median over replays of a CUDA graph with a flushed L2 cache: forward, and forward with backward, of the Triton
form and of the torch form, beside the time that the bytes of the definition take at the copy rate measured in the same
run. Shapes are those of fleets (members, sequences, tokens, channels) and one long one. --sweep times other tiles as well.
Run the GPU tests first: a figure of a wrong kernel means nothing.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor

from kernels import _replay
from kernels.attention import attention, attention_reference, band_mask, banded_attention
from kernels.between import cross_entropy_triton
from kernels.conv import gated_long_conv, long_conv, short_conv
from kernels.convolutions import conv_triton, long_conv_triton
from kernels.cross_entropy import labelled_cross_entropy
from kernels.dispatch import use_backend
from kernels.scan import scan, selective_scan
from kernels.scans import scan_operator, scan_triton, selective_scan_launch
from tests.benchmarks.facts import facts
from tests.benchmarks.linear_recurrence import graph_ms


class Case(NamedTuple):
    """A function of leaves, the least bytes of its two passes, and another form of it if the dispatcher has none."""

    function: Callable[..., Tensor]
    leaves: list[Tensor]
    forward_bytes: int
    backward_bytes: int
    definition: Callable[..., Tensor] | None = None


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """A leaf."""
    return torch.randn(*shape, device="cuda", dtype=dtype).requires_grad_()


def cross_entropy_case(members: int, rows: int, classes: int) -> Case:
    """The head of MQAR: rows are labelled positions of a batch."""
    labels = torch.randint(classes, (members, rows), device="cuda")
    logits = normal(members, rows, classes)
    size = 2 * logits.numel()
    return Case(lambda x: torch.vmap(labelled_cross_entropy)(x, labels)[0], [logits], size, 2 * size)


def selective_scan_case(members: int, batch: int, length: int, width: int, n_states: int) -> Case:
    """Mamba: x, b and c in bf16, dt in fp32."""
    x = normal(members, batch, length, width)
    b, c = normal(members, batch, length, n_states), normal(members, batch, length, n_states)
    dt = torch.rand(members, batch, length, width, device="cuda").mul_(0.1).requires_grad_()
    rate = torch.rand(members, width, n_states, device="cuda").add_(0.5).requires_grad_()
    forward = 8 * x.numel() + 4 * b.numel()
    backward = 14 * x.numel() + 8 * b.numel()  # reads x, dt, dy, b, c; writes dx, ddt, db, dc
    return Case(torch.vmap(lambda *own: selective_scan(*own)[0]), [x, dt, rate, b, c], forward, backward)


def short_conv_case(members: int, batch: int, length: int, width: int, taps: int) -> Case:
    """Depthwise with bias and SiLU."""
    x = normal(members, batch, length, width)
    weight, bias = normal(members, width, taps, dtype=torch.float32), normal(members, width, dtype=torch.float32)
    size = 2 * x.numel()
    return Case(torch.vmap(lambda *own: short_conv(*own, silu=True)[0]), [x, weight, bias], 2 * size, 3 * size)


def gated_long_conv_case(members: int, batch: int, length: int, width: int, taps: int) -> Case:
    """H3 with heads of two channels, channel by channel; the torch form is an FFT of the products."""
    qkv = normal(members, 3 * width, batch, length)
    shapes = ((3 * width,), (width // 2, length), (width, taps))
    parameters = [normal(members, *shape, dtype=torch.float32) for shape in shapes]
    size = 2 * qkv.numel() // 3
    return Case(torch.vmap(gated_long_conv), [qkv, *parameters], 4 * size, 7 * size)


def long_conv_case(members: int, batch: int, length: int, width: int) -> Case:
    """Hyena: a filter as long as the sequence, in fp32; the torch form is an FFT."""
    x, taps = normal(members, batch, length, width), normal(members, width, length, dtype=torch.float32)
    size = 2 * x.numel()
    return Case(torch.vmap(long_conv), [x, taps], 2 * size, 3 * size)


def scan_case(members: int, batch: int, length: int, width: int) -> Case:
    """HGRN and RG-LRU: everything in bf16."""
    a = torch.rand(members, batch, length, width, device="cuda").bfloat16().requires_grad_()
    size = 2 * a.numel()
    return Case(torch.vmap(scan), [a, normal(*a.shape)], 3 * size, 5 * size)


def attention_case(members: int, batch: int, length: int, width: int) -> Case:
    """One causal head; the torch form of this row is the quadratic definition."""
    qkv = [normal(members, batch, 1, length, width) for _ in range(3)]
    mask = band_mask(length, length, device="cuda")
    size = 2 * qkv[0].numel()
    fused = torch.vmap(lambda q, k, v: attention(q, k, v, causal=True))
    return Case(fused, qkv, 4 * size, 8 * size, definition=lambda q, k, v: attention_reference(q, k, v, mask))


def banded_case(members: int, batch: int, length: int, width: int, window: int) -> Case:
    """One head under a sliding window; the torch form of this row is dense attention under a mask."""
    qkv = [normal(members, batch, 1, length, width) for _ in range(3)]
    mask = band_mask(length, length, window=window, device="cuda")
    size = 2 * qkv[0].numel()
    banded = torch.vmap(lambda q, k, v: banded_attention(q, k, v, window=window))
    masked = torch.vmap(lambda q, k, v: attention(q, k, v, mask_TS=mask))
    return Case(banded, qkv, 4 * size, 8 * size, definition=masked)


CASES: dict[str, tuple[Callable[..., Case], tuple[tuple[int, ...], ...]]] = {
    "attention": (attention_case, ((4, 256, 64, 128), (12, 256, 256, 64), (12, 256, 256, 128), (1, 256, 256, 128))),
    "banded_attention": (banded_case, ((4, 256, 256, 128, 64), (12, 256, 256, 64, 16), (1, 64, 2048, 64, 64))),
    "cross_entropy": (
        cross_entropy_case,
        ((4, 1024, 8192), (12, 1024, 8192), (12, 9472, 8192), (1, 9472, 8192), (1, 4096, 128_256), (4, 8192, 64)),
    ),
    "selective_scan": (selective_scan_case, ((4, 256, 64, 256, 16), (4, 256, 256, 256, 16), (1, 8, 2048, 4096, 16))),
    "short_conv": (short_conv_case, ((4, 256, 64, 256, 4), (12, 256, 256, 128, 3), (1, 8, 2048, 4096, 4))),
    "gated_long_conv": (gated_long_conv_case, ((4, 256, 64, 128, 32), (4, 256, 256, 128, 32), (1, 256, 256, 128, 32))),
    "long_conv": (
        long_conv_case,
        ((1, 64, 64, 128), (1, 64, 256, 128), (4, 64, 256, 128), (1, 32, 512, 256), (1, 16, 1024, 512), (1, 8, 2048, 1024)),
    ),
    "scan": (scan_case, ((4, 256, 256, 256), (1, 8, 2048, 4096))),
}

SWEEPS: dict[str, list[tuple[tuple[ModuleType, ...], dict[str, Any]]]] = {
    "cross_entropy": [((cross_entropy_triton,), {"LARGEST_BLOCK": block}) for block in (1024, 2048, 4096, 16_384)],
    "short_conv": [
        ((conv_triton,), {"FORWARD": (16, forward), "BACKWARD": (8, backward)})
        for forward, backward in ((1, 4), (4, 8), (8, 16), (2, 2))
    ],
    "long_conv": [
        ((long_conv_triton,), {"COLUMNS": columns, "WARPS": warps, "GRADIENT_COLUMNS": turned})
        for columns, warps, turned in ((64, 4, 64), (128, 4, 64), (128, 8, 64), (256, 8, 128))
    ],
    "selective_scan": [((selective_scan_launch, scan_operator), {"TILE": tile}) for tile in (8, 32)],
    "scan": [((scan_triton,), {"FORWARD_TILE": tile, "BACKWARD_TILE": tile}) for tile in (8, 16, 32)],
}


def copy_rate() -> float:
    """Bytes a second of a device copy of 1 GiB, read and written."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * 2**30 / graph_ms(lambda: target.copy_(source)) * 1e3


def times(function: Callable[..., Tensor], leaves: list[Tensor], backend: str) -> dict[str, float]:
    """Milliseconds forward, and forward with backward; an out-of-memory form has none."""
    with use_backend(backend):
        out = torch.randn_like(function(*leaves))

        def forward() -> None:
            with torch.no_grad():
                function(*leaves)

        return {"forward_ms": graph_ms(forward), "both_ms": graph_ms(lambda: torch.autograd.grad(function(*leaves), leaves, out))}


def row(kernel: str, shape: tuple[int, ...], rate: float, *, torch_form: bool) -> dict[str, object]:
    """One shape of one kernel."""
    case = CASES[kernel][0](*shape)
    start = time.perf_counter()
    found = times(case.function, case.leaves, "triton")
    seconds = time.perf_counter() - start
    floors = {"forward": case.forward_bytes / rate * 1e3, "both": (case.forward_bytes + case.backward_bytes) / rate * 1e3}
    ratios = {f"{part}_x": found[f"{part}_ms"] / floor for part, floor in floors.items()}
    record: dict[str, object] = {"kernel": kernel, "shape": shape, **found, **ratios, "compiled_and_timed_s": seconds}
    if torch_form:
        try:
            record["torch_form"] = times(case.definition or case.function, case.leaves, "chunked")
        except torch.cuda.OutOfMemoryError as error:
            record["torch_form"] = {"error": str(error).split("\n", maxsplit=1)[0]}
    return record


@contextmanager
def patched(modules: tuple[ModuleType, ...], values: dict[str, Any]) -> Iterator[None]:
    """Constants of a kernel's modules replaced."""
    with ExitStack() as stack:
        for module, (name, value) in itertools.product(modules, values.items()):
            stack.enter_context(mock.patch.object(module, name, value))
        stack.enter_context(_replay.forgetful())
        yield


def main() -> None:
    """Writes the rows with the versions and the rate that they were measured beside."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--kernel", nargs="*", choices=list(CASES), default=list(CASES))
    arguments = parser.parse_args()
    rate = copy_rate()
    rows = []
    for kernel, (_, shapes) in ((name, CASES[name]) for name in arguments.kernel):
        rows += [row(kernel, shape, rate, torch_form=not arguments.sweep) for shape in shapes]
        for (modules, values), shape in itertools.product(SWEEPS[kernel] if arguments.sweep and kernel in SWEEPS else [], shapes):
            with patched(modules, values):
                rows.append(row(kernel, shape, rate, torch_form=False) | {"changed": values})
    print("\n".join(json.dumps(found) for found in rows))
    versions = {
        **facts("python -m tests.benchmarks.small_kernels " + " ".join(arguments.kernel)),
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
    }
    arguments.out.write_text(json.dumps({**versions, "copy_bytes_per_s": rate, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
