"""Counts what Triton compiles."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any


def require_nothing_new(kernels: Sequence[Any], run: Callable[..., object], *sizes: tuple[int, ...]) -> None:
    """Runs with the first sizes, which may compile the kernels, and then with the others, which may compile nothing."""
    counts = []
    for given in sizes:
        run(*given)
        counts.append(sum(len(caches[0]) for kernel in kernels for caches in kernel.device_caches.values()))
    assert counts[0] > 0, "none of the kernels ran"
    assert len(set(counts)) == 1, dict(zip(sizes, counts, strict=True))
