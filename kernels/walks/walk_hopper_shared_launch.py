"""Launches the gradients of heads that share keys on Hopper.

Shape legend: B batch, T time, H heads of v, G heads of q and k, N chunks of C tokens, K key, V value width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kernels.delta_rule.delta_hopper_launch import _described
from kernels.operands import _gate_kind, _triton_dtype
from kernels.walks.walk_crossings import Chunks
from kernels.walks.walk_decays import RowSums, gate_every, gate_of
from kernels.walks.walk_grouped import RUN, n_splits
from kernels.walks.walk_hopper_plan import CHUNK, GROUPED, shared_parts, width_on_chip
from kernels.walks.walk_hopper_rows import aligned, line_rows
from kernels.walks.walk_hopper_states_launch import states

if TYPE_CHECKING:
    from kernels.walks.walk import Inputs

PARTS = 6
"""Of what sums to the gradient of the decays: what queries read, what keys give, and four of what queries get in their chunk."""


def backward(
    rows: tuple[Tensor, ...],
    inputs: Inputs,
    kept: Tensor,
    dlast: Tensor | None,
    dv: Tensor,
    dfirst: Tensor,
    *,
    gate_grad: bool,
) -> tuple[Tensor, Tensor, RowSums]:
    """See `kernels.walks.walk_grouped.backward`; `rows` are q, k, v and do."""
    from kernels.walks import walk_hopper_shared

    q, k, v, do = (aligned(x) for x in rows)
    (batch, length, heads, _), groups, k_dim = v.shape, k.shape[2], k.shape[3]
    wide_k, wide_v, splits = width_on_chip(k), width_on_chip(v), n_splits(v, k.shape[2])
    entering, lines = shared_parts(kept, inputs)
    chunks = entering.shape[1]
    # Made before the walk of states, whose own room is given back while it runs: queries are written beside it.
    dq, dk = (v.new_empty(batch, length, groups * splits, k_dim) for _ in range(2))
    parts = (batch, heads, PARTS, chunks * CHUNK)
    rowsums = v.new_empty(parts if gate_grad else (0, 0, 0, 0), dtype=torch.float32).permute(2, 0, 1, 3)[..., :length]
    leaving = states(q, do, lines, inputs, dlast, None if inputs.state is None else dfirst, reverse=True)
    wide = (wide_k, wide_k, wide_v, wide_v, wide_k, wide_k, wide_v)
    described = [_described(x, [1, CHUNK, 1, w]) for x, w in zip((q, k, v, do, dq, dk, dv), wide, strict=True)]
    of_entering, of_leaving = (_described(x.flatten(0, 2), [1, wide_k, wide_v]) for x in (entering, leaving))
    decays = line_rows(lines, batch * heads, described[0]), lines, gate_of(inputs.log_decay, v), rowsums
    counts = length, heads, heads // groups, gate_every(inputs.log_decay, batch), splits
    constants = {
        "BK": wide_k, "BV": wide_v, "C": CHUNK, "STAGES": GROUPED, "GATE": _gate_kind(inputs.log_decay), "GATE_GRAD": gate_grad,
        "PARTS": PARTS, "DOT": _triton_dtype(v.dtype), "num_warps": 4,
    }  # fmt: skip
    grid = (batch * chunks * groups * splits,)
    walk_hopper_shared.queries_kernel[grid](
        *described[:4], of_entering, described[4], *decays, *counts, **constants, launch_pdl=True
    )
    walk_hopper_shared.keys_kernel[grid](*described[:4], of_leaving, *described[5:], *decays, *counts, **constants)
    between = Chunks(entering, leaving, RUN, RUN * CHUNK) if chunks > 2 * RUN else None
    return dq, dk, RowSums(rowsums, 1, CHUNK, between)
