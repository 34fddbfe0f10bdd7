"""Launches the walks for Hopper, forward and back.

Shape legend: B batch, T time, H heads, P segments, N chunks of C tokens, K key, V value width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kernels.delta_rule.delta_hopper_launch import _described
from kernels.operands import _gate_kind, _nothing, _state_like, _triton_dtype
from kernels.walks.walk_crossings import Segments, entering_states
from kernels.walks.walk_decays import RowSums, gate_every, gate_of
from kernels.walks.walk_hopper_plan import (
    BACKWARD,
    CHUNK,
    FORWARD,
    SHARED,
    entering_like,
    share_out,
    shared_like,
    shared_parts,
    sizes,
    sums_like,
    width_on_chip,
)
from kernels.walks.walk_hopper_rows import aligned, line_rows, make_lines
from kernels.walks.walk_hopper_states_launch import segment_sums

if TYPE_CHECKING:
    from kernels.walks.walk import Inputs


def _constants(inputs: Inputs, groups: int) -> dict[str, Any]:
    """Compile-time arguments of both kernels."""
    return {
        "K": inputs.k.shape[3], "V": inputs.v.shape[3], "C": CHUNK, "GATE": _gate_kind(inputs.log_decay),
        "DOT": _triton_dtype(inputs.v.dtype), "GROUPS": groups, "num_warps": 4 * groups,
    }  # fmt: skip


def forward(inputs: Inputs, o: Tensor, *, return_state: bool) -> tuple[Tensor, Tensor, Tensor]:
    """See `kernels.walks.walk.forward`; `o` is written."""
    from kernels.walks import walk_hopper

    q, k, v = (aligned(x) for x in (inputs.q, inputs.k, inputs.v))
    (batch, length, heads, _), k_dim, state = v.shape, k.shape[3], inputs.state
    group, wide_k, wide_v = heads // k.shape[2], width_on_chip(k), width_on_chip(v)
    pieces, gate, last = share_out(inputs), gate_of(inputs.log_decay, v), _state_like(v, k_dim) if return_state else _nothing(v)
    config = SHARED if group > 1 else FORWARD[max(wide_k, wide_v)]
    if group > 1:
        kept = shared_like(inputs)
        states, lines = shared_parts(kept, inputs)
        sums, decays = sums_like(inputs)
    else:
        kept = states = entering_like(inputs)
        lines, sums, decays = kept.flatten().split(sizes(inputs))
    if lines.numel():
        make_lines(lines, gate)
    segment_sums(k, v, (lines, sums, decays), inputs, reverse=False)
    described = [_described(x, [1, CHUNK, 1, wide]) for x, wide in ((q, wide_k), (k, wide_k), (v, wide_v), (o, wide_v))]
    of_states = _described(states.flatten(0, 2), [1, wide_k, wide_v]) if group > 1 else described[3]
    late = lines.numel() > 0 and pieces.number == 1  # behind sums of segments it is slower
    walk_hopper.forward_kernel[(batch * pieces.number * heads,)](
        *described, of_states, line_rows(lines, batch * heads, described[0]), lines, gate,
        v if state is None else state.contiguous(), last, sums, decays,
        length, heads, group, gate_every(inputs.log_decay, batch), pieces.number, pieces.length // CHUNK,
        **_constants(inputs, config.groups), BK=wide_k, BV=wide_v, STAGES=config.stages, FIRST=state is not None,
        KEEP=group > 1, LAST=return_state, LATE=late, launch_pdl=late,
    )  # fmt: skip
    return o, last, kept


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
    """Gradients of queries and keys [B, T, H, K], and what sums to that of the cumulated decays.

    See `kernels.walks.walk._walk_back`; `rows` are q, k, v and do.
    """
    from kernels.walks import walk_hopper_back

    q, k, v, do = (aligned(x) for x in rows)
    (batch, length, heads, v_dim), k_dim = v.shape, k.shape[3]
    state = None if inputs.state is None else inputs.state.contiguous()
    pieces, gate, width = share_out(inputs), gate_of(inputs.log_decay, v), max(width_on_chip(k), width_on_chip(v))
    config = BACKWARD[width]
    lines, *before = kept.flatten().split(sizes(inputs))
    behind = sums_like(inputs)
    segment_sums(q, do, (lines, *behind), inputs, reverse=True)
    dq, dk = (v.new_empty(batch, length, heads, k_dim) for _ in range(2))
    parts = (batch, heads, 2 * config.groups + 4, -(-length // CHUNK) * CHUNK)
    rowsums = v.new_empty(parts if gate_grad else (0, 0, 0, 0), dtype=torch.float32).permute(2, 0, 1, 3)[..., :length]
    described = [_described(x, [1, CHUNK, 1, width]) for x in (q, k, v, do, dq, dk, dv)]
    walk_hopper_back.backward_kernel[(batch * pieces.number * heads * 2,)](
        *described, line_rows(lines, batch * heads, described[0]), lines, gate,
        v if state is None else state, v if dlast is None else dlast, dfirst, *before, *behind, rowsums,
        length, heads, gate_every(inputs.log_decay, batch), pieces.number, pieces.length // CHUNK,
        **_constants(inputs, config.groups), W=width, STAGES=config.stages, BACK_STAGES=config.back, SLOTS=config.slots,
        FIRST=state is not None, DLAST=dlast is not None, GATE_GRAD=gate_grad,
    )  # fmt: skip
    between = None
    if gate_grad and pieces.number > 1:
        states = (batch, pieces.number, heads, k_dim, v_dim)
        entering = entering_states(before[0].view(states), before[1].view(states[:3]), state)
        between = Segments(entering, behind[0].view(states), behind[1].view(states[:3]), pieces.length)
    return dq, dk, RowSums(rowsums, config.groups, CHUNK, between)
