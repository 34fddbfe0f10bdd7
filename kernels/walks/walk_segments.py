"""What segments of a long row add to its state, found by programs of their own before the walks.

Shape legend: B batch, P segments, H heads, K key, V value width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.operands import _nothing, _precision, _rows, _triton_dtype, padded
from kernels.walks.walk_config import segment_config, tile_of
from kernels.walks.walk_pieces import Pieces


def segments(
    b: Tensor, c: Tensor, gate: Tensor, gate_kind: int, pieces: Pieces, chunk: int, *, reverse: bool
) -> tuple[Tensor, Tensor]:
    """What each segment adds to the state [B, P, H, K, V] and its log2 decay [B, P, H]; empty without segments."""
    from kernels.walks import walk_forward_triton, walk_triton

    if pieces.kind != walk_triton.SEGMENTS.value:
        return _nothing(c), _nothing(c)
    batch, length, heads, v_dim = c.shape
    k_dim = b.shape[3]
    config = segment_config(k_dim, c.dtype)
    tile = tile_of(config, v_dim, c.dtype)
    sums = c.new_empty(batch, pieces.number, heads, k_dim, v_dim, dtype=torch.float32)
    decays = sums.new_empty(batch, pieces.number, heads)
    _, strides, unit = _rows(b, c)
    gate_every = batch // gate.shape[0] if gate_kind == walk_triton.CONSTANT_GATE.value else 1
    walk_forward_triton.segment_kernel[(batch * (pieces.number - 1) * heads * -(-v_dim // tile),)](
        b, c, gate, sums, decays,
        *strides, length, heads, heads // b.shape[2], gate_every, pieces.number, pieces.length,
        K=k_dim, V=v_dim, BK=padded(k_dim), BV=tile, UNIT=unit, C=chunk, GATE=gate_kind, REVERSE=reverse,
        DOT=_triton_dtype(c.dtype), PRECISION=_precision(c.dtype), STAGES=config.stages, num_warps=config.warps,
    )  # fmt: skip
    return sums, decays
