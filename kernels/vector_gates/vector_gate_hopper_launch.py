"""Launches the Hopper walks of the recurrence with a decay per key channel, where they fit.

Shape legend: B batch, T time, H heads, N chunks, C tokens of a chunk, K key, V value width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from kernels.delta_rule import delta_hopper_launch
from kernels.operands import _nothing, _triton_dtype

if TYPE_CHECKING:
    from kernels.vector_gates.vector_gate import Call

CHUNK, GROUP = delta_hopper_launch.CHUNK, 64
"""Tokens of a chunk, and the most columns of the state that a warp group takes; they are what one product of it covers."""
FEW, FEW_WIDE = 2, 8
"""Segments from which on carrying states between them costs less than they save, of narrow heads and of wide ones, whose programs
take fewer columns before that."""


class Plan(NamedTuple):
    """Segments of each head, chunks of a segment but the last, and columns of the state that a program takes."""

    segments: int
    per: int
    tile: int


def fit(call: Call, x_BTHV: Tensor) -> bool:
    """Whether a Hopper walk takes values, or gradients of outputs, beside what the call keeps."""
    return call.config.chunk == CHUNK and delta_hopper_launch.fit(call.wide_k, x_BTHV)


def plan(call: Call) -> Plan:
    """What fills the multiprocessors."""
    walks, device = call.batch * call.heads, call.v.device
    chunks, free = call.blocks // walks, delta_hopper_launch.multiprocessors(device) // walks
    segments = delta_hopper_launch.segments_of(walks, chunks, device)
    if call.delta and segments >= (FEW if call.wide_v <= GROUP else FEW_WIDE):
        per = -(-chunks // segments)
        return Plan(-(-chunks // per), per, call.wide_v)
    tile = 32 if free >= 4 else 64 if free >= 2 else 128
    return Plan(1, chunks, tile if call.wide_v > GROUP else call.wide_v)


def stages(delta: bool) -> int:
    """Chunks that are on their way or read: what fits on chip beside a wide state."""
    return 2 if delta else 3


def _described(call: Call, rows_BTHV: Tensor, tile: int) -> list[Any]:
    """What both walks read in blocks: Q', W, K', P, H, and values or gradients of outputs."""
    kept, described = call.kept, delta_hopper_launch._described
    erases, couplings = (kept.erases, kept.couplings) if call.delta else (kept.reads, kept.scores)
    by_key = [described(x.flatten(0, 2), [1, CHUNK, call.wide_k]) for x in (kept.reads, kept.writes, erases)]
    by_pair = [described(x.flatten(0, 2), [1, CHUNK, CHUNK]) for x in (kept.scores, couplings)]
    return [*by_key, *by_pair, described(rows_BTHV, [1, CHUNK, 1, tile])]


def _constants(call: Call, tile: int) -> dict[str, Any]:
    groups = max(1, tile // GROUP)
    return {
        "K": call.k_dim, "V": call.v_dim, "KP": call.wide_k, "BV": tile, "GROUPS": groups, "C": CHUNK,
        "STAGES": stages(call.delta), "DELTA": call.delta, "DOT": _triton_dtype(call.dtype), "num_warps": 4 * groups,
    }  # fmt: skip


def _carried(call: Call, launch: Any, given: Tensor | None, plan: Plan) -> Tensor:
    """The states (or their gradients) with which each segment starts [B, H, segments, K, V], in the order of the walk."""
    from kernels.delta_rule.delta_combine_triton import combine_kernel

    walks = call.batch * call.heads
    tiles = -(-call.v_dim // plan.tile) + -(-call.k_dim // plan.tile)
    ends = call.v.new_empty(walks, plan.segments - 1, call.k_dim, tiles * plan.tile, dtype=torch.float32)
    states = call.v.new_empty(call.batch, call.heads, plan.segments, call.k_dim, call.v_dim, dtype=torch.float32)
    start = ends if given is None else given
    launch(walks * (plan.segments - 1) * tiles, start, ends, given is not None, OUT=False)
    combine_kernel[(walks * -(-call.v_dim // 16),)](
        ends, start, states, plan.segments,
        K=call.k_dim, V=call.v_dim, BK=call.wide_k, BV=plan.tile, TILE=16, FIRST=given is not None, BETWEEN=False,
        num_warps=8,
    )  # fmt: skip
    return states


def walk(call: Call, v: Tensor, o: Tensor, last: Tensor, *, return_state: bool, keep: bool) -> None:
    """The forward walk; writes o, last, and what is kept."""
    from kernels.vector_gates.vector_gate_hopper import walk_kernel

    kept, planned, described = call.kept, plan(call), delta_hopper_launch._described
    by_value = [1, CHUNK, 1, planned.tile]
    outputs = described(o, by_value)
    errors = described(kept.errors, by_value) if keep and call.delta else outputs
    states = described(kept.states.flatten(0, 2), [1, call.wide_k, planned.tile]) if keep else outputs
    operands = (*_described(call, v, planned.tile), outputs, errors, states, kept.factors, call.beta)

    def launch(programs: int, first: Tensor, last: Tensor, given: bool, **flags: bool) -> None:
        wanted = {"LAST": False, "KEEP": False} | flags
        walk_kernel[(programs,)](
            *operands, first, last, call.length, call.heads, planned.segments, planned.per,
            **_constants(call, planned.tile), FIRST=given, **wanted,
        )  # fmt: skip

    first, given = call.first, call.has_first
    if planned.segments > 1:
        first, given = _carried(call, launch, first if given else None, planned), True
    programs = call.batch * call.heads * planned.segments * -(-call.v_dim // planned.tile)
    launch(programs, first, last, given, LAST=return_state, KEEP=keep, OUT=True)


def reverse(call: Call, do: Tensor, dlast: Tensor | None, dv: Tensor, dfirst: Tensor, dstates: Tensor) -> Tensor:
    """The walk back; writes dv, dfirst and dstates, and returns the gradient of beta in tiles [tiles, B, T, H]."""
    from kernels.vector_gates.vector_gate_hopper_back import reverse_kernel

    planned, described = plan(call), delta_hopper_launch._described
    tiles = -(-call.v_dim // planned.tile)
    dbeta = do.new_empty((tiles, *do.shape[:3]), dtype=torch.float32) if call.delta else _nothing(do)
    operands = (
        *_described(call, do, planned.tile), described(dv, [1, CHUNK, 1, planned.tile]),
        described(dstates.flatten(0, 2), [1, call.wide_k, planned.tile]), call.kept.errors, call.kept.factors, call.beta,
    )  # fmt: skip

    def launch(programs: int, dlast: Tensor, dfirst: Tensor, given: bool, **flags: bool) -> None:
        reverse_kernel[(programs,)](
            *operands, dlast, dbeta, dfirst, call.length, call.batch, call.heads, planned.segments, planned.per,
            **_constants(call, planned.tile), FIRST=flags["OUT"] and call.has_first, DLAST=given, **flags,
        )  # fmt: skip

    behind, given = do if dlast is None else dlast, dlast is not None
    if planned.segments > 1:
        behind, given = _carried(call, launch, dlast, planned), True
    launch(call.batch * call.heads * planned.segments * tiles, behind, dfirst, given, OUT=True)
    return dbeta
