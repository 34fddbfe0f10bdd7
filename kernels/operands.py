"""Operands of the kernels that walk over chunks: dtypes, strides and decays as the kernels take them.

Shape legend: B batch, T time, H heads of v, K key, V value width, M rows of a constant decay.
"""

from __future__ import annotations

import torch
from torch import Tensor


def padded(width: int) -> int:
    """The width that a tile has on chip: a power of two that the tensor cores take."""
    return max(16, 1 << (width - 1).bit_length())


def product_width(width: int, dtype: torch.dtype) -> int:
    """The width of a tile that is the right side of a product: narrow ones of 16-bit operands are not safe, see `_narrow`."""
    return max(padded(width), 16 if dtype == torch.float32 else 32)


def _dot_dtype(*operands: Tensor) -> torch.dtype:
    """The dtype of the tensor cores' operands: the narrowest given, as autocast would have it; sums are in fp32."""
    dtypes = [x.dtype for x in operands]  # of a generator, torch 2.11 cannot trace the least by a key
    return min(dtypes, key=lambda dtype: dtype.itemsize)


def _narrow(dtype: torch.dtype, *operands: Tensor) -> tuple[Tensor, ...]:
    """Operands in the dtype of the products.

    A kernel that converted them itself would read the wide ones in each walk; and where it did, Triton 3.6 built descriptors
    of 16 columns that tensor cores followed out of shared memory (fp32 values beside 16-bit keys 8 and 16 wide).
    """
    return tuple(x.to(dtype) for x in operands)


def _triton_dtype(dtype: torch.dtype) -> object:
    import triton.language as tl

    return {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[dtype]


def _precision(dtype: torch.dtype) -> str | None:
    """Three TF32 products carry 22 bits; true fp32 has no tensor core, and its unrolled products do not fit the registers."""
    return "tf32x3" if dtype == torch.float32 else None


def _rows(*tensors: Tensor) -> tuple[list[Tensor], list[int], int]:
    """Tensors with unit stride in the last dimension, their other strides in units, and the unit, 8 if all allow it.

    A kernel that multiplies by the unit knows that rows start on 16 bytes, without a recompilation for each stride.
    """
    rows = [x if x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous() for x in tensors]
    strides = [stride for x in rows for stride in x.stride()[:3]]
    unit = 8 if all(stride % 8 == 0 for stride in strides) else 1
    return rows, [stride // unit for stride in strides], unit


def _gate(log_decay: Tensor | None, batch: int, spare: Tensor) -> tuple[Tensor, tuple[int, int], int]:
    """The log decays, their strides over rows and tokens, and how many batches share a row."""
    if log_decay is None:
        return spare, (0, 0), 1
    gate = log_decay.contiguous()
    if gate.ndim == 2:
        return gate, (gate.shape[1], 0), batch // gate.shape[0]
    return gate, (gate.shape[1] * gate.shape[2], gate.shape[2]), 1


def _gate_kind(log_decay: Tensor | None) -> int:
    from kernels.walks import walk_triton

    if log_decay is None:
        return walk_triton.NO_GATE.value
    return (walk_triton.CONSTANT_GATE if log_decay.ndim == 2 else walk_triton.SCALAR_GATE).value


def _state_like(v_BTHV: Tensor, k_dim: int, sequences: int | None = None) -> Tensor:
    """Room for an fp32 state of each batch, or of so many sequences."""
    batch, _, heads, v_dim = v_BTHV.shape
    return v_BTHV.new_empty(batch if sequences is None else sequences, heads, k_dim, v_dim, dtype=torch.float32)


def _nothing(like: Tensor) -> Tensor:
    return like.new_empty(0, dtype=torch.float32)
