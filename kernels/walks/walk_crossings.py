"""Launches what follows the states between segments for the gradient of the log decays.

Shape legend: B batch, P segments, H heads, K key, V value width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.operands import _triton_dtype

BLOCK, STAGES = 1024, 3
"""Numbers of a state that a program has, and segments that are on their way or read."""


class Between(NamedTuple):
    """States between segments, of which the first does not count, and what segments add to their gradients, all in fp32.

    Args:
        entering: the state that enters each segment [B, P, H, K, V].
        sums: what each segment adds to the gradient of the state that enters it [B, P, H, K, V].
        decays: log2 decay of each segment [B, P, H].
        length: tokens of a segment.
    """

    entering: Tensor
    sums: Tensor
    decays: Tensor
    length: int


def entering_states(sums_BPHKV: Tensor, decays_BPH: Tensor, first_BHKV: Tensor | None) -> Tensor:
    """The state that enters each segment but the first, from what each adds to it and its log2 decay; fp32."""
    from kernels.walks.walk_crossings_triton import entering_kernel

    batch, pieces, heads, k_dim, v_dim = sums_BPHKV.shape
    entering = torch.empty_like(sums_BPHKV)
    entering_kernel[(batch * heads * -(-k_dim * v_dim // BLOCK),)](
        sums_BPHKV if first_BHKV is None else first_BHKV, sums_BPHKV, decays_BPH, entering, heads, pieces,
        SIZE=k_dim * v_dim, BLOCK=BLOCK, GIVEN=first_BHKV is not None, STAGES=STAGES, num_warps=4,
    )  # fmt: skip
    return entering


def crossing(between: Between, final_BHKV: Tensor | None, dfinal_BHKV: Tensor | None, dot: torch.dtype) -> Tensor:
    """The product of the state behind each segment and its gradient [B, P, H], the latter rounded as the walks read it."""
    from kernels.walks.walk_crossings_triton import crossing_kernel

    batch, pieces, heads, k_dim, v_dim = between.entering.shape
    tiles, ends = -(-k_dim * v_dim // BLOCK), dfinal_BHKV is not None
    products = between.sums.new_empty(batch, pieces, heads, tiles)
    crossing_kernel[(batch * heads * tiles,)](
        between.entering, final_BHKV if ends else products, dfinal_BHKV if ends else products, between.sums, between.decays,
        products, heads, pieces,
        SIZE=k_dim * v_dim, BLOCK=BLOCK, ENDS=ends, DOT=_triton_dtype(dot), STAGES=STAGES, num_warps=4,
    )  # fmt: skip
    return products.sum(-1)
