"""Launches the Hopper walks of the recurrence with a decay per key channel, where they fit.

Shape legend: B batch, T time, H heads, N chunks, C tokens of a chunk, V value width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kernels import delta_hopper_launch
from kernels.operands import _nothing, _triton_dtype

if TYPE_CHECKING:
    from kernels.vector_gate import Call

CHUNK, TILE = delta_hopper_launch.CHUNK, 64
"""Tokens of a chunk, and columns of the state that a warp group takes; they are what one product of it covers."""


def fit(call: Call, x_BTHV: Tensor) -> bool:
    """Whether a Hopper walk takes values, or gradients of outputs, beside what the call keeps."""
    return call.config.chunk == CHUNK and delta_hopper_launch.fit(call.wide_k, x_BTHV)


def groups_of(call: Call) -> int:
    """Warp groups of a program: all columns of a head, unless heads leave half of the multiprocessors idle."""
    heads, processors = call.batch * call.heads, delta_hopper_launch.multiprocessors(call.v.device)
    return 1 if 2 * heads <= processors else call.wide_v // TILE


def _operands(call: Call, rows_BTHV: Tensor, tile: int) -> list[Any]:
    """What both walks read in blocks: Q', W, K', P, H, and values or gradients of outputs."""
    kept, described = call.kept, delta_hopper_launch._described
    erases, couplings = (kept.erases, kept.couplings) if call.delta else (kept.reads, kept.scores)
    by_key = [described(x.flatten(0, 2), [1, CHUNK, call.wide_k]) for x in (kept.reads, kept.writes, erases)]
    by_pair = [described(x.flatten(0, 2), [1, CHUNK, CHUNK]) for x in (kept.scores, couplings)]
    return [*by_key, *by_pair, described(rows_BTHV, [1, CHUNK, 1, tile])]


def _constants(call: Call, groups: int) -> dict[str, Any]:
    stages = 2 if call.delta else 3  # what fits on chip beside the state
    return {
        "K": call.k_dim, "V": call.v_dim, "KP": call.wide_k, "BV": groups * TILE, "GROUPS": groups, "C": CHUNK, "STAGES": stages,
        "DELTA": call.delta, "DOT": _triton_dtype(call.dtype), "num_warps": 4 * groups,
    }  # fmt: skip


def walk(call: Call, v: Tensor, o: Tensor, last: Tensor, *, return_state: bool, keep: bool) -> None:
    """The forward walk; writes o, last, and what is kept."""
    from kernels.vector_gate_hopper import walk_kernel

    groups, kept, described = groups_of(call), call.kept, delta_hopper_launch._described
    tile = groups * TILE
    by_value = [1, CHUNK, 1, tile]
    outputs = described(o, by_value)
    errors = described(kept.errors, by_value) if keep and call.delta else outputs
    states = described(kept.states.flatten(0, 2), [1, call.wide_k, tile]) if keep else outputs
    walk_kernel[(call.batch * call.heads * -(-call.v_dim // tile),)](
        *_operands(call, v, tile), outputs, errors, states, kept.factors, call.beta, call.first, last, call.length, call.heads,
        **_constants(call, groups), FIRST=call.has_first, LAST=return_state, KEEP=keep,
    )  # fmt: skip


def reverse(call: Call, do: Tensor, dlast: Tensor | None, dv: Tensor, dfirst: Tensor, dstates: Tensor) -> Tensor:
    """The walk back; writes dv, dfirst and dstates, and returns the gradient of beta in tiles [tiles, B, T, H]."""
    from kernels.vector_gate_hopper import reverse_kernel

    groups, described = groups_of(call), delta_hopper_launch._described
    tile = groups * TILE
    tiles = -(-call.v_dim // tile)
    dbeta = do.new_empty((tiles, *do.shape[:3]), dtype=torch.float32) if call.delta else _nothing(do)
    by_value = [1, CHUNK, 1, tile]
    reverse_kernel[(call.batch * call.heads * tiles,)](
        *_operands(call, do, tile), described(dv, by_value), described(dstates.flatten(0, 2), [1, call.wide_k, tile]),
        call.kept.errors, call.kept.factors, call.beta, do if dlast is None else dlast, dbeta, dfirst,
        call.length, call.batch, call.heads, **_constants(call, groups), FIRST=call.has_first, DLAST=dlast is not None,
    )  # fmt: skip
    return dbeta
