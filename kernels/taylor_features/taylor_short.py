"""Launches the kernels of `kernels.taylor_features.taylor_short_triton`: where they are faster, and how they are compiled.

Shape legend: B batch, T time, H heads, K width of q and k, V width of v.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.operands import _dot_dtype, _narrow, _precision, _rows, _triton_dtype, padded, product_width


class Config(NamedTuple):
    """How a kernel is compiled.

    Args:
        tokens: of a tile.
        others: tokens that it meets at once.
        warps: warps of a program.
        stages: depth of the pipeline that loads other tokens.
        registers: most registers of a thread, None for as many as the compiler likes.
    """

    tokens: int
    others: int
    warps: int
    stages: int
    registers: int | None = None


WIDTHS, LONGEST = (16, 64), 256
"""The widest heads, and the most tokens of a row that is short."""
DTYPES = (torch.bfloat16, torch.float16)
"""Of the products."""
FORWARD = Config(64, 64, 4, 2, 128)
BACKWARD = Config(64, 64, 4, 1)


def suits(k_BTHK: Tensor, v_BTHV: Tensor, dot: torch.dtype) -> bool:
    """Whether rows without sums before or after them are short: narrow 16-bit ones."""
    fits = k_BTHK.shape[3] <= WIDTHS[0] and v_BTHV.shape[3] <= WIDTHS[1] and dot in DTYPES
    return fits and v_BTHV.shape[1] <= LONGEST


def _constants(k: Tensor, v: Tensor, unit: int, config: Config) -> dict[str, Any]:
    return {
        "K": k.shape[3], "V": v.shape[3], "BK": padded(k.shape[3]), "BV": product_width(v.shape[3], v.dtype), "UNIT": unit,
        "BM": config.tokens, "BN": config.others, "DOT": _triton_dtype(v.dtype), "PRECISION": _precision(v.dtype),
        "STAGES": config.stages, "num_warps": config.warps, "maxnreg": config.registers,
    }  # fmt: skip


def forward(q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, *, norm: bool, eps: float) -> tuple[Tensor, Tensor]:
    """Outputs, and 1 / (sum of weights + eps) [B, T, H] or an empty tensor without `norm`."""
    from kernels.taylor_features.taylor_short_triton import forward_kernel

    y = torch.empty_like(v_BTHV, memory_format=torch.contiguous_format)
    (q, k, v), strides, unit = _rows(*_narrow(_dot_dtype(q_BTHK, k_BTHK, v_BTHV), q_BTHK, k_BTHK, v_BTHV))
    batch, length, heads, _ = v.shape
    programs = batch * heads * -(-length // FORWARD.tokens)
    scale = v.new_empty((batch, length, heads) if norm else 0, dtype=torch.float32)
    forward_kernel[(programs,)](q, k, v, y, scale, *strides, length, heads, eps, **_constants(k, v, unit, FORWARD), NORM=norm)
    return y, scale


def backward(
    q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, y: Tensor, scale: Tensor, dy_BTHV: Tensor, *, norm: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    from kernels.taylor_features.taylor_short_triton import backward_kernel

    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q_BTHK, k_BTHK, v_BTHV))
    (q, k, v, dy), strides, unit = _rows(*_narrow(_dot_dtype(q_BTHK, k_BTHK, v_BTHV), q_BTHK, k_BTHK, v_BTHV, dy_BTHV))
    batch, length, heads, _ = v.shape
    programs = batch * heads * -(-length // BACKWARD.tokens)
    backward_kernel[(programs,)](
        q, k, v, y, scale, dy, dq, dk, dv, *strides, length, heads, **_constants(k, v, unit, BACKWARD), NORM=norm
    )
    return dq, dk, dv
