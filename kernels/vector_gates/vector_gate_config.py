"""How the vector-gate kernels are compiled, by width and dtype.

Shape legend: C tokens of a chunk, K key, V value width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from kernels.operands import padded


class Tile(NamedTuple):
    """How one kernel is compiled.

    Args:
        width: channels or values that a program takes at once.
        warps: warps of a program.
        stages: depth of its software pipeline.
        registers: most registers of a thread, or None for the compiler's choice.
    """

    width: int
    warps: int
    stages: int
    registers: int | None = None

    def options(self) -> dict[str, int | None]:
        """Launch options."""
        return {"num_warps": self.warps, "num_stages": self.stages, "maxnreg": self.registers}


class Config(NamedTuple):
    """How the kernels are compiled.

    Args:
        chunk: tokens of a chunk.
        prepare: of the preparation.
        walk: of the forward walk; the width is that of the state's columns.
        reverse: of the walk back, likewise.
        gradient: of the gradients of queries and keys.
        rough: of both preparation and gradients of rough chunks.
    """

    chunk: int
    prepare: Tile
    walk: Tile
    reverse: Tile
    gradient: Tile
    rough: Tile


# Without and with the delta rule, by the widest of K and V (the first at least as large counts), for 16-bit and for fp32 operands.
ROUGH = Tile(64, 4, 1)
SIXTEEN_BIT = (
    {
        64: Config(64, Tile(64, 4, 1), Tile(64, 4, 2), Tile(64, 4, 2), Tile(64, 4, 1), ROUGH),
        128: Config(64, Tile(64, 4, 1, 168), Tile(64, 4, 2), Tile(64, 4, 2), Tile(64, 4, 1, 168), ROUGH),
        256: Config(64, Tile(64, 4, 1), Tile(64, 8, 1), Tile(64, 8, 1), Tile(64, 4, 1), ROUGH),
    },
    {
        64: Config(64, Tile(64, 4, 1), Tile(64, 4, 2), Tile(64, 4, 2), Tile(64, 4, 1), ROUGH),
        128: Config(64, Tile(128, 4, 1), Tile(64, 4, 2), Tile(64, 4, 2), Tile(64, 4, 2), ROUGH),
        256: Config(64, Tile(64, 4, 1), Tile(64, 8, 1), Tile(64, 8, 1), Tile(64, 4, 1), ROUGH),
    },
)
FP32 = (
    {
        64: Config(16, Tile(32, 4, 1), Tile(32, 4, 1), Tile(32, 4, 1), Tile(32, 4, 1), Tile(32, 4, 1)),
        128: Config(16, Tile(32, 4, 1), Tile(16, 4, 1), Tile(16, 4, 1), Tile(32, 4, 1), Tile(32, 4, 1)),
        256: Config(16, Tile(32, 4, 1), Tile(16, 8, 1), Tile(16, 8, 1), Tile(32, 4, 1), Tile(32, 4, 1)),
    },
) * 2

# A walk without the delta rule is split into segments of at least so many chunks, as long as that makes no more programs.
SEGMENT, PROGRAMS = 8, 256


def config(k_dim: int, v_dim: int, dtype: torch.dtype, *, delta: bool) -> Config:
    """The shipped configuration."""
    table = (FP32 if dtype == torch.float32 else SIXTEEN_BIT)[delta]
    return next(found for limit, found in table.items() if max(k_dim, v_dim) <= limit)


def tile_width(width: int, dtype: torch.dtype) -> int:
    """The width that tiles have on chip: a power of two, in 16 bit at least 64.

    Narrower tiles ended in illegal memory accesses with ptxas 12.8, which Triton 3.6 ships (its issues 10486 and 11366).
    """
    return max(padded(width), 16 if dtype == torch.float32 else 64)


def gentle_limit(dtype: torch.dtype) -> float:
    """Exponent of 2 up to which half of what a gentle chunk decays by may go.

    Factors of twice that are multiplied where a later key meets an earlier query, which is masked: with bf16 operands such a
    product may be infinite, with fp32 ones, which are multiplied in parts, it is kept finite. Factors in fp16 would overflow early.
    """
    return {torch.float16: 0.0, torch.bfloat16: 96.0, torch.float32: 60.0}[dtype]


def gate_terms(dtype: torch.dtype, gate_dtype: torch.dtype) -> int:
    """How many bf16 terms stand for a log decay in its sums: 2^-17 of it is lost with two; 0 for sums in fp32."""
    if dtype == torch.float32:
        return 0
    return 1 if gate_dtype == torch.bfloat16 else 2
