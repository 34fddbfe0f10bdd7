"""What the tests of Triton kernels share: outputs that start as NaN, and errors relative to an oracle's size."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

SIXTEEN_BIT = 5e-3
SINGLE = 1e-5
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDEST_SINGLE = 128
"""The last size of a shape up to which fp32 takes a kernel of its own."""


def in_dtypes(shapes: Iterable[tuple[int, ...]]) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Cases of a decoding kernel: each shape in each dtype that it ships for."""
    return [(shape, dtype) for shape in shapes for dtype in DTYPES if dtype != torch.float32 or shape[-1] <= WIDEST_SINGLE]


@contextmanager
def poisoned() -> Iterator[None]:
    """Fresh tensors hold NaN or a huge number, so that an element that a kernel forgets to write is seen."""
    real = {(owner, name): getattr(owner, name) for owner, name in FRESH}

    def poison(make):
        def filled(*args, **kwargs) -> Tensor:
            fresh = make(*args, **kwargs)
            if fresh.is_floating_point():
                return fresh.fill_(float("nan"))
            return fresh.fill_(1 if fresh.dtype == torch.bool else min(1 << 14, torch.iinfo(fresh.dtype).max))

        return filled

    try:
        for (owner, name), make in real.items():
            setattr(owner, name, poison(make))
        yield
    finally:
        for (owner, name), make in real.items():
            setattr(owner, name, make)


FRESH = ((torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (Tensor, "new_empty"))


def rms_error(got: Tensor, true: Tensor) -> float:
    """Root mean square of the difference, relative to that of the oracle; absolute where the oracle is zero."""
    assert got.shape == true.shape
    if got.numel() == 0:
        return 0.0
    difference = (got.detach().double().cpu() - true.detach().double().cpu()).square().mean().sqrt()
    size = true.detach().double().square().mean().sqrt().cpu()
    return float(difference / size) if size > 1e-6 else float(difference)


def require_close(got: dict[str, Tensor], true: dict[str, Tensor], tolerance: float | dict[str, float]) -> None:
    """Every named tensor within its tolerance; NaN is never within."""
    assert got.keys() == true.keys()
    for name, tensor in got.items():
        allowed = tolerance.get(name, tolerance["other"]) if isinstance(tolerance, dict) else tolerance
        error = rms_error(tensor, true[name])
        assert error <= allowed, f"{name}: relative error {error:.1e} > {allowed:.0e}"
