"""Launches the walks for Hopper that make states without outputs.

Shape legend: B batch, T time, H heads, P segments, N chunks of C tokens, K key, V value width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from kernels.delta_rule.delta_hopper_launch import _described
from kernels.operands import _gate_kind, _triton_dtype
from kernels.walks.walk_decays import gate_every, gate_of
from kernels.walks.walk_hopper_plan import CHUNK, KEPT, SUMS, States, share_out, sums_like, width_on_chip
from kernels.walks.walk_hopper_rows import line_rows

if TYPE_CHECKING:
    from kernels.walks.walk import Inputs


def segment_sums(b: Tensor, c: Tensor, kept: Sequence[Tensor], inputs: Inputs, *, reverse: bool) -> None:
    """Writes what each segment adds to the state and its log2 decay, of aligned rows."""
    pieces, config = share_out(inputs), SUMS[max(width_on_chip(b), width_on_chip(c))]
    lines, *sums = kept
    if pieces.number > 1:
        _walk_states(b, c, c, lines, inputs, None, None, sums, pieces.number - 1, config, reverse=reverse, keep=False)


def states(
    b: Tensor, c: Tensor, lines: Tensor, inputs: Inputs, given: Tensor | None, last: Tensor | None, *, reverse: bool
) -> Tensor:
    """States before the chunks, or the gradients of those behind them, [B, N, H, K, V] in 16 bit, of aligned rows.

    `last` is written. The kernel that is launched next may start beside this one.
    """
    (batch, length, heads, v_dim), k_dim, pieces = c.shape, b.shape[3], share_out(inputs)
    sums = sums_like(inputs)
    segment_sums(b, c, (lines, *sums), inputs, reverse=reverse)
    kept = c.new_empty(batch, -(-length // CHUNK), heads, k_dim, v_dim)
    _walk_states(b, c, kept, lines, inputs, given, last, sums, pieces.number, KEPT, reverse=reverse, keep=True)
    return kept


def _walk_states(
    b: Tensor, c: Tensor, kept: Tensor, lines: Tensor, inputs: Inputs, given: Tensor | None, last: Tensor | None,
    sums: Sequence[Tensor], number: int, config: States, *, reverse: bool, keep: bool,
) -> None:  # fmt: skip
    """Walks states over so many segments of each head."""
    from kernels.walks import walk_hopper_states

    (batch, length, heads, v_dim), k_dim, pieces = c.shape, b.shape[3], share_out(inputs)
    wide_k, tile = width_on_chip(b), min(config.tile, width_on_chip(c))
    described = [_described(b, [1, CHUNK, 1, wide_k]), _described(c, [1, CHUNK, 1, tile])]
    described.append(_described(kept.flatten(0, 2), [1, wide_k, tile]) if keep else described[1])
    walk_hopper_states.states_kernel[(batch * number * heads * -(-v_dim // tile),)](
        *described, line_rows(lines, batch * heads, described[0]), lines, gate_of(inputs.log_decay, c),
        c if given is None else given, c if last is None else last, *sums,
        length, heads, heads // b.shape[2], gate_every(inputs.log_decay, batch), pieces.number, pieces.length // CHUNK,
        K=k_dim, V=v_dim, BK=wide_k, BV=tile, GROUPS=config.groups, C=CHUNK, STAGES=config.stages,
        GATE=_gate_kind(inputs.log_decay), GIVEN=given is not None, KEEP=keep, LAST=last is not None,
        REVERSE=reverse, DOT=_triton_dtype(c.dtype), num_warps=4 * config.groups,
    )  # fmt: skip
