"""Launches the walks for Hopper where they fit."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.delta_hopper_launch import _described
from kernels.operands import _gate_kind, _triton_dtype, padded

CHUNK = 64
"""Tokens of a chunk, which are the rows of one product of a warp group."""
WIDTH = 128
"""The widest heads that fit on chip."""
STAGES = {64: 4, 128: 3}
"""Chunks that are on their way or read, by width."""


class Operands(NamedTuple):
    """What one walk reads.

    Args:
        a: rows that read [B, T, heads, D].
        b: rows that are read [B, T, heads, D].
        c: what they give [B, T, heads, E].
        probe: rows like those of the output, or None.
    """

    a: Tensor
    b: Tensor
    c: Tensor
    probe: Tensor | None = None


def walk(
    rows: Operands, out: Tensor, log_decay: Tensor | None, gate: Tensor, gate_every: int, *, reverse: bool, turned: bool = False,
    given: Tensor | None = None, last: Tensor | None = None, kept: Tensor | None = None, rowsum: Tensor | None = None,
    segments: tuple[int, int] = (1, 0), sums: tuple[Tensor, Tensor] | None = None, probe: int = 0,
    groups: int | None = None, stages: int | None = None, tile: int | None = None,
) -> None:  # fmt: skip
    """One walk; writes `out` [B, T, H, E], and what else is given."""
    from kernels import walk_hopper

    a, b, c, probed = rows
    batch, length, heads, e_dim = out.shape
    d_dim = a.shape[3]
    wide_d, wide_e = max(padded(d_dim), CHUNK), max(padded(e_dim), 32)
    wide_e = min(wide_e, tile or wide_e)
    of_d, of_e = [1, CHUNK, 1, wide_d], [1, CHUNK, 1, wide_e]
    groups = groups or (2 if max(wide_d, wide_e) > 64 and wide_e >= 64 else 1)
    stages = stages or STAGES[max(64, wide_d, wide_e)]
    described = [_described(a, of_d), _described(b, of_d), _described(c, of_e)]
    described += [_described(c if probed is None else probed, of_e), _described(out, of_e)]
    described.append(described[-1] if kept is None else _described(kept.flatten(0, 2), [1, wide_d, wide_e]))
    number, span = segments
    summed, decays = (gate, gate) if sums is None else sums
    walk_hopper.walk_kernel[(batch * number * heads * -(-e_dim // wide_e),)](
        *described, gate, gate if given is None else given, gate if last is None else last, summed, decays,
        gate if rowsum is None else rowsum,
        length, batch, heads, heads // a.shape[2], heads // c.shape[2], gate_every, number, span or -(-length // CHUNK),
        D=d_dim, E=e_dim, BD=wide_d, BE=wide_e, GROUPS=groups, C=CHUNK, STAGES=stages, GATE=_gate_kind(log_decay), REVERSE=reverse,
        TURNED=turned, GIVEN=given is not None, LAST=last is not None, KEEP=kept is not None, PROBE=probe,
        DOT=_triton_dtype(c.dtype), num_warps=4 * groups,
    )  # fmt: skip
