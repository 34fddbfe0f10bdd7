"""How the walks of `kernels.walks.walk_triton` are compiled: the shipped configurations, by width and dtype."""

from __future__ import annotations

from typing import NamedTuple

import torch

from kernels.operands import product_width


class Config(NamedTuple):
    """How a kernel is compiled.

    Args:
        chunk: tokens of a chunk.
        tile: columns of the output that one program computes.
        warps: warps of a program.
        stages: depth of the software pipeline that loads the chunks.
        turned: whether outputs are transposed, see `kernels.walks.walk_turned_triton`.
    """

    chunk: int
    tile: int
    warps: int
    stages: int
    turned: bool = False


class Backward(NamedTuple):
    """How the gradients are walked.

    Args:
        queries: the walk of queries.
        keys: the joint walk of keys and values in a launch of its own, or None: in that of the queries, or apart.
        together: whether keys and values walk together, all columns in one program, or apart.
    """

    queries: Config
    keys: Config | None = None
    together: bool = False


FORWARD_16 = {64: Config(64, 64, 4, 3), 128: Config(64, 64, 4, 2, turned=True), 256: Config(64, 32, 8, 1)}
"""By K, the first at least as large, for 16-bit operands."""
UNGATED_128 = Config(64, 128, 8, 3, turned=True)
"""Forward and queries of heads 128 wide without a decay: all columns in one program."""
BACKWARD_16 = {
    (64, 64): Backward(Config(64, 64, 4, 3), together=True),
    (128, 64): Backward(Config(64, 64, 4, 2), Config(64, 128, 4, 1), together=True),
    (128, 128): Backward(Config(64, 64, 4, 2, turned=True), Config(64, 128, 8, 2, turned=True), together=True),
    (256, 256): Backward(Config(64, 16, 8, 1)),
}
"""By the larger and the smaller of K and V."""
SEGMENT_16 = {64: Config(64, 64, 4, 3), 128: Config(64, 64, 4, 3), 256: Config(64, 32, 8, 1)}
"""By K, as for fp32 operands."""
FP32 = {64: Config(32, 32, 4, 1), 128: Config(16, 16, 4, 1), 256: Config(16, 32, 8, 1)}
BACKWARD_32 = {(width, width): Backward(config) for width, config in FP32.items()}


def forward_config(k_dim: int, v_dim: int, dtype: torch.dtype, *, gated: bool) -> Config:
    """The shipped configuration of the forward walk."""
    if dtype == torch.float32:
        return _by_width(FP32, k_dim)
    if not gated and min(k_dim, v_dim) > 64 and max(k_dim, v_dim) <= 128:
        return UNGATED_128
    return _by_width(FORWARD_16, k_dim)


def backward_config(k_dim: int, v_dim: int, dtype: torch.dtype, *, gated: bool) -> Backward:
    """The shipped configuration of the three backward walks, whose inner dimensions are V, V and K."""
    wide, narrow = max(k_dim, v_dim), min(k_dim, v_dim)
    table = BACKWARD_32 if dtype == torch.float32 else BACKWARD_16
    found = next(config for (most, least), config in table.items() if wide <= most and narrow <= least)
    if not gated and found is BACKWARD_16.get((128, 128)):
        return found._replace(queries=UNGATED_128)
    return found


def segment_config(k_dim: int, dtype: torch.dtype) -> Config:
    """The shipped configuration of the sums over segments, but for their chunk, which is that of the walk."""
    return _by_width(FP32 if dtype == torch.float32 else SEGMENT_16, k_dim)


def tile_of(config: Config, width: int, dtype: torch.dtype) -> int:
    """Columns of the output of one program."""
    return min(config.tile, product_width(width, dtype))


def _by_width(table: dict[int, Config], width: int) -> Config:
    return next(config for limit, config in table.items() if width <= limit)
