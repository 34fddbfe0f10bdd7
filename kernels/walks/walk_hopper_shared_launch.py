"""Launches the gradients of heads that share keys on Hopper.

Shape legend: B batch, T time, H heads, G groups, N chunks of C tokens, K key, V value width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kernels.delta_rule.delta_hopper_launch import _described
from kernels.operands import _gate_kind, _triton_dtype
from kernels.walks import walk_hopper_plan, walk_hopper_states_launch
from kernels.walks.walk_crossings import Chunks
from kernels.walks.walk_decays import RowSums, gate_every, gate_of
from kernels.walks.walk_hopper_plan import CHUNK, shared_sizes, width_on_chip
from kernels.walks.walk_hopper_rows import aligned, line_rows

if TYPE_CHECKING:
    from kernels.walks.walk import Inputs

PARTS = 6
"""Of what sums to the gradient of the decays: what queries read, what keys give, and four of what queries get in their chunk."""
STAGES = 2
"""Heads that are on their way or read."""


def backward(
    rows: tuple[Tensor, ...],
    inputs: Inputs,
    kept: Tensor,
    dlast: Tensor | None,
    dv: Tensor,
    dfirst: Tensor | None,
    *,
    splits: int,
    gate_grad: bool,
) -> tuple[Tensor, Tensor, RowSums]:
    """See `kernels.walks.walk_grouped.backward`; `rows` are q, k, v and do."""
    from kernels.walks import walk_hopper_shared

    q, k, v, do = (aligned(x) for x in rows)
    (batch, length, heads, v_dim), groups, k_dim = v.shape, k.shape[2], k.shape[3]
    chunks, wide_k, wide_v = -(-length // CHUNK), width_on_chip(k), width_on_chip(v)
    form = walk_hopper_plan.FORM
    states, lines = kept.split(shared_sizes(inputs))
    states, lines = states.view(batch, chunks, heads, k_dim, v_dim), lines.view(torch.float32)
    # Made before what the walk of states needs only for itself: that is still read while queries are written.
    dq, dk = (v.new_empty(batch, length, groups * splits, k_dim) for _ in range(2))
    parts = (batch, heads, PARTS, chunks * CHUNK)
    rowsums = v.new_empty(parts if gate_grad else (0, 0, 0, 0), dtype=torch.float32).permute(2, 0, 1, 3)[..., :length]
    dstates = walk_hopper_states_launch.states(q, do, lines, inputs, dlast, dfirst, reverse=True)
    of_rows = [_described(x, [1, CHUNK, 1, wide]) for x, wide in ((q, wide_k), (k, wide_k), (v, wide_v), (do, wide_v))]
    of_states = [_described(x.flatten(0, 2), [1, wide_k, wide_v]) for x in (states, dstates)]
    of_dq, of_dk, of_dv = (_described(x, [1, CHUNK, 1, wide]) for x, wide in ((dq, wide_k), (dk, wide_k), (dv, wide_v)))
    decays = line_rows(lines, batch * heads, of_rows[0]), lines, gate_of(inputs.log_decay, v), rowsums
    counts = length, heads, heads // groups, gate_every(inputs.log_decay, batch), splits
    constants = {
        "BK": wide_k, "BV": wide_v, "C": CHUNK, "STAGES": STAGES, "GATE": _gate_kind(inputs.log_decay), "GATE_GRAD": gate_grad,
        "PARTS": PARTS, "DOT": _triton_dtype(v.dtype), "num_warps": 4,
    }  # fmt: skip
    grid = (batch * chunks * groups * splits,)
    beside, after = form & 2 > 0, form & 4 > 0
    walk_hopper_shared.queries_kernel[grid](
        *of_rows, of_states[0], of_dq, *decays, *counts, **constants, BESIDE=beside, LET=after, **pdl(beside)
    )
    walk_hopper_shared.keys_kernel[grid](
        *of_rows, of_states[1], of_dk, of_dv, *decays, *counts, **constants, BESIDE=after, LET=after, **pdl(after)
    )
    between = Chunks(states, dstates, RUN, RUN * CHUNK) if chunks > 2 * RUN else None
    return dq, dk, RowSums(rowsums, 1, CHUNK, between)


RUN = 16


def pdl(given: bool) -> dict[str, bool]:
    """Launch option."""
    return {"launch_pdl": True} if given else {}
