"""What crosses the ends of segments, or of runs of chunks, for the gradient of the log decays: states there times their gradients.

Shape legend: B batch, P segments or runs, H heads, N chunks, K key, V value width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.operands import _triton_dtype

BLOCK, STAGES = 1024, 3
"""Numbers of a state that a program has at once, and segments that are on their way or read."""


class Segments(NamedTuple):
    """States that enter segments, of which the first does not count, and what segments add to their gradients, all in fp32.

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

    def crossing(self, final_BHKV: Tensor | None, dfinal_BHKV: Tensor | None, dot: torch.dtype) -> Tensor:
        """The product of the state behind each segment and its gradient [B, P, H], the latter rounded as the walks read it."""
        from kernels.walks.walk_crossings_triton import crossing_kernel

        batch, pieces, heads, k_dim, v_dim = self.entering.shape
        tiles, ends = -(-k_dim * v_dim // BLOCK), dfinal_BHKV is not None
        products = self.sums.new_empty(batch, pieces, heads, tiles)
        crossing_kernel[(batch * heads * tiles,)](
            self.entering, final_BHKV if ends else products, dfinal_BHKV if ends else products, self.sums, self.decays, products,
            heads, pieces,
            SIZE=k_dim * v_dim, BLOCK=BLOCK, ENDS=ends, DOT=_triton_dtype(dot), STAGES=STAGES, num_warps=4,
        )  # fmt: skip
        return products.sum(-1)


class Chunks(NamedTuple):
    """States between chunks, of which those behind every so many are read.

    Args:
        kept: the state before each chunk [B, N, H, K, V], in the dtype of the products.
        dkept: the gradient of the state behind each chunk, alike.
        every: chunks of a run.
        length: tokens of a run.
    """

    kept: Tensor
    dkept: Tensor
    every: int
    length: int

    def crossing(self, final_BHKV: Tensor | None, dfinal_BHKV: Tensor | None, dot: torch.dtype) -> Tensor:
        """See `Segments`; of runs."""
        from kernels.walks.walk_crossings_triton import kept_crossing_kernel

        batch, chunks, heads, k_dim, v_dim = self.kept.shape
        pieces, ends = -(-chunks // self.every), dfinal_BHKV is not None
        products = self.kept.new_empty(batch, pieces, heads, dtype=torch.float32)
        kept_crossing_kernel[(batch * pieces * heads,)](
            self.kept, self.dkept, final_BHKV if ends else products, dfinal_BHKV if ends else products, products,
            chunks, heads, pieces, self.every,
            SIZE=k_dim * v_dim, BLOCK=BLOCK, ENDS=ends, DOT=_triton_dtype(dot), num_warps=4,
        )  # fmt: skip
        return products


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
