"""Rows and lines of decays as the walks for Hopper take them.

Shape legend: B batch, T time, H heads, N chunks of C tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.delta_rule.delta_hopper_launch import ALIGNED
from kernels.walks.walk_hopper_plan import CHUNK

LINE_HEADS = 16
"""Heads of a program that makes lines of decays."""


def aligned(x: Tensor) -> Tensor:
    """Rows as the tensor memory accelerator takes them."""
    fits = x.data_ptr() % 16 == 0 and x.stride(3) == 1 and all(s > 0 and s % ALIGNED == 0 for s in x.stride()[:3])
    return x if fits else x.clone(memory_format=torch.contiguous_format)


def make_lines(lines: Tensor, gate_BTH: Tensor) -> None:
    """Writes scalar log decays as the walks read them."""
    from kernels.walks.walk_lines_triton import lines_kernel

    batch, length, heads = gate_BTH.shape
    chunks = -(-length // CHUNK)
    lines_kernel[(batch * chunks * -(-heads // LINE_HEADS),)](
        gate_BTH.contiguous(), lines, length, heads, chunks, C=CHUNK, HEADS=LINE_HEADS, LET=lines.is_cuda, num_warps=4
    )


def line_rows(lines: Tensor, rows: int, spare: Any) -> Any:
    """Describes lines of decays in blocks of a chunk, or anything."""
    if not lines.numel():
        return spare
    from triton.experimental.gluon.language import NVMMASharedLayout
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    lines = lines.view(rows, -1)
    return TensorDescriptor(lines, list(lines.shape), list(lines.stride()), [1, CHUNK], NVMMASharedLayout(0, 32, rank=2))
