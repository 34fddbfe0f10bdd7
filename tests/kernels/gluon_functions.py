"""Gluon's functions that neither move data nor wait, as Python on torch tensors; see `tests.kernels.gluon_on_cpu`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

LAYOUTS = (
    "SliceLayout",
    "BlockedLayout",
    "DotOperandLayout",
    "DistributedLinearLayout",
    "SharedLinearLayout",
    "NVMMADistributedLayout",
    "NVMMASharedLayout",
    "SwizzledSharedLayout",
)


def functions(index: int, programs: int) -> dict[str, Any]:
    """What needs no more of a program than its number."""
    return {
        "float32": torch.float32,
        "int64": torch.int64,
        "int32": torch.int32,
        "bfloat16": torch.float64,
        "constexpr": None,
        "program_id": lambda _: torch.tensor(index),
        "num_programs": lambda _: torch.tensor(programs),
        "arange": lambda start, stop, _=None: torch.arange(start, stop),
        "zeros": lambda shape, dtype, _=None: torch.zeros(shape, dtype=torch.float64),
        "full": lambda shape, x, *_: torch.full(shape, x, dtype=torch.float64),
        "where": lambda condition, a, b: torch.where(torch.as_tensor(condition), a, b),
        "minimum": lambda a, b: torch.minimum(torch.as_tensor(a), torch.as_tensor(b)),
        "maximum": lambda a, b: torch.maximum(torch.as_tensor(a), torch.as_tensor(b)),
        "exp2": torch.exp2,
        "abs": torch.abs,
        "associative_scan": _sums_along,
        "log": torch.log,
        "log2": torch.log2,
        "cdiv": lambda a, b: -(-a // b),
        "barrier": lambda: None,
        "sum": lambda x, axis: x.sum(axis),
        "fma": lambda a, b, c: a * b + c,
        "join": lambda a, b: torch.stack((a, b), -1),
        "split": lambda x: (x[..., 0], x[..., 1]),
        "convert_layout": lambda x, *_, **__: x,
        "static_range": range,
        "static_assert": _assert,
        **dict.fromkeys(LAYOUTS, lambda *_, **__: None),
    }


def _assert(condition: bool) -> None:
    assert condition


def _sums_along(x: Tensor, axis: int, _: Any, *, reverse: bool = False) -> Tensor:
    return x.flip(axis).cumsum(axis).flip(axis) if reverse else x.cumsum(axis)
