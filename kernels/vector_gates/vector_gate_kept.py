"""What the recurrence with a decay per key channel keeps for its backward pass: where and how large.

Shape legend: B batch, T time, H heads, N chunks, C tokens of a chunk, K key, V value width; KP and VP are padded widths.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kernels._kept import Part, memory_for, parts_of
from kernels.operands import _dot_dtype
from kernels.vector_gates.vector_gate_config import config, tile_width


class Kept(NamedTuple):
    """What the backward pass reads again; errors and states are empty if it will not run, couplings without the delta rule.

    Args:
        levels: int32 [B, H, N], log2 of the tokens of the blocks of a chunk that are gentle, see `vector_gate_middle`.
        factors: of rows of the state [B, H, N, 2, KP], see `kernels.vector_gates.vector_gate_middle`.
        reads: Q' [B, H, N, C, KP], see `kernels.vector_gates.vector_gate_prepare`.
        writes: W [B, H, N, C, KP].
        erases: K' [B, H, N, C, KP].
        scores: P [B, H, N, C, C].
        couplings: H [B, H, N, C, C].
        states: S_m of each chunk [B, H, N, KP, VP].
        errors: E [B, T, H, V].
    """

    levels: Tensor
    factors: Tensor
    reads: Tensor
    writes: Tensor
    erases: Tensor
    scores: Tensor
    couplings: Tensor
    states: Tensor
    errors: Tensor


def kept_memory(q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, *, delta: bool, keep: bool) -> Tensor:
    """Unwritten memory for what `forward` keeps, see `kernels._kept`."""
    return memory_for(_kept_parts(q_BTHK, k_BTHK, v_BTHV, delta=delta, keep=keep), v_BTHV)


def kept_in(memory: Tensor, q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, *, delta: bool, keep: bool) -> Kept:
    """What lies in it."""
    return Kept(*parts_of(memory, _kept_parts(q_BTHK, k_BTHK, v_BTHV, delta=delta, keep=keep)))


def _kept_parts(q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, *, delta: bool, keep: bool) -> list[Part]:
    """Shapes and dtypes of `Kept`."""
    batch, length, heads, v_dim = v_BTHV.shape
    dtype = _dot_dtype(q_BTHK, k_BTHK, v_BTHV)
    chunk = config(k_BTHK.shape[3], v_dim, dtype, delta=delta).chunk
    wide_k, wide_v = (tile_width(width, dtype) for width in (k_BTHK.shape[3], v_dim))
    blocks, none = (batch, heads, -(-length // chunk)), (0,)
    return [
        (blocks, torch.int32),
        ((*blocks, 2, wide_k), torch.float32),
        ((*blocks, chunk, wide_k), dtype),
        ((*blocks, chunk, wide_k), dtype),
        ((*blocks, chunk, wide_k) if delta else none, dtype),
        ((*blocks, chunk, chunk), dtype),
        ((*blocks, chunk, chunk) if delta else none, dtype),
        ((*blocks, wide_k, wide_v) if keep else none, dtype),
        (v_BTHV.shape if keep and delta else none, dtype),
    ]
