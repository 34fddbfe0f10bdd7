"""A new batch size, length or head count compiles nothing, for every kernel that `bench throughput` times."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.throughput.draws import Draw
from bench.throughput.kernels import OPERATIONS
from bench.throughput.measure import timed_call
from bench.throughput.names import KERNELS
from kernels.walks.walk_grouped import LEAST_GROUP

pytestmark = pytest.mark.gpu

FIRST = (2, 256, 4)
LATER = ((3, 256, 4), (2, 333, 4), (2, 256, 5), (16, 64, 16), (1, 64, 1), (1, 4096, 2))
"""Batch, length and heads."""


ROWS = [(name, mode) for name, kernel in KERNELS.items() for mode in ("train", "decode") if mode in kernel.modes]


@pytest.mark.parametrize(("name", "mode"), ROWS)
def test_new_sizes_compile_nothing(name: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import triton

    draw = Draw(torch.device("cuda"), torch.bfloat16, torch.Generator("cuda").manual_seed(0))

    def call(sizes: tuple[int, int, int]) -> None:
        batch, length, heads = sizes
        if KERNELS[name].layout == "ssd":  # type: ignore[index]
            heads = max(heads, LEAST_GROUP)  # fewer take the kernels of heads that share nothing
        if name in ("selective_scan", "short_conv"):
            heads = 16  # channels, as widths elsewhere, are a constant of these kernels (docs/decisions.md)
        shape = KERNELS[name].shape(batch, length, heads, KERNELS[name].widths[0])  # type: ignore[index]
        timed_call(OPERATIONS[name].problem(shape, mode, draw), gradients=mode == "train")()  # type: ignore[index]

    compiled: list[str] = []

    def seen(*, fn: Any, **_: Any) -> None:
        compiled.append(fn.name)

    call(FIRST)
    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", seen)
    for sizes in LATER:
        call(sizes)
        assert compiled == [], f"{sizes} compiled"
