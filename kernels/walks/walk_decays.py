"""Log decays of the walks of `kernels.walks.walk_triton`, and their gradient from what the walks leave behind.

Shape legend: B batch, T time, H heads, M rows of a constant decay.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.operands import _gate_kind
from kernels.walks.walk_crossings import Chunks, Segments

DECAY_ROWS, DECAY_SEGMENTS = 2048, 16
"""Tokens of a tile of the decays' gradient, and programs that share a long row."""


def gate_of(log_decay: Tensor | None, spare: Tensor) -> Tensor:
    """The log decays as the walks read them, or anything."""
    return spare if log_decay is None else log_decay.contiguous()


def gate_every(log_decay: Tensor | None, batch: int) -> int:
    """How many batches share a row of a constant decay."""
    return 1 if log_decay is None or log_decay.ndim == 3 else batch // log_decay.shape[0]


class RowSums(NamedTuple):
    """What sums to the gradient of the cumulated decays.

    Args:
        parts: what a token adds, [parts, B, H, T].
        reads: so many of the parts are what queries read from chunks before their own, and the others all else; 0 where the
            parts are not apart.
        chunk: tokens of a chunk.
        between: states between pieces of long rows, or None: sums of whole rows and of packed sequences.
    """

    parts: Tensor
    reads: int
    chunk: int
    between: Segments | Chunks | None = None


def decay_gradient(
    sums: RowSums,
    log_decay: Tensor,
    starts: Tensor | None,
    final_BHKV: Tensor | None,
    dfinal_BHKV: Tensor | None,
    dot: torch.dtype,
) -> Tensor:
    """Gradient of the log decays: each is part of the cumulated decay of its own and all later tokens of its sequence.

    What the final state adds nearly cancels with what the last tokens wrote of it, so its gradient is rounded to the dtype of the
    products here as well. With states between segments each of these is summed by itself, from the state and the gradient there.
    """
    from kernels.walks.walk_decays_triton import decay_gradient_kernel
    from kernels.walks.walk_triton import SEGMENTS, SEQUENCES

    parts, batch, heads, length = sums.parts.shape
    tokens = max(DECAY_ROWS, -(-length // (DECAY_SEGMENTS * sums.chunk)) * sums.chunk)
    pieces = -(-length // tokens) if starts is None else starts.shape[0] - 1
    ends = None
    if sums.between is not None:
        ends = sums.between.crossing(final_BHKV, dfinal_BHKV, dot)
        tokens, pieces = sums.between.length, ends.shape[1]
    elif dfinal_BHKV is not None:
        assert final_BHKV is not None
        ends = (final_BHKV * dfinal_BHKV.to(dot)).sum((-2, -1))
    later_BTH = sums.parts.new_empty(batch, length, heads)
    decay_gradient_kernel[(batch * pieces * heads,)](
        sums.parts, gate_of(log_decay, later_BTH), later_BTH if starts is None else starts, later_BTH if ends is None else ends,
        later_BTH, sums.parts.stride(0), sums.parts.stride(2), length, heads, gate_every(log_decay, batch), pieces, tokens,
        PARTS=parts, READS=sums.reads, GATE=_gate_kind(log_decay), ENDS=ends is not None,
        APART=sums.between is not None or starts is not None,
        PIECES=(SEGMENTS if starts is None else SEQUENCES).value, ROWS=DECAY_ROWS, C=sums.chunk, num_warps=8,
    )  # fmt: skip
    if log_decay.ndim == 3:
        return later_BTH
    return later_BTH.sum(1).unflatten(0, (log_decay.shape[0], -1)).sum(1)
