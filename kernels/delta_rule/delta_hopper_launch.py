"""Launches the Hopper kernels of the delta rule, where they fit: descriptors, segments of long sequences."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from kernels._descriptors import give_context
from kernels.operands import _triton_dtype, padded

if TYPE_CHECKING:
    from kernels.delta_rule.delta import Config, Kept

CHUNK = 64
"""Tokens of a chunk, which are the rows of one product of a warp group."""
WIDTH = 128
"""The widest heads that fit on chip."""
SHORTEST = 8
"""Chunks of a segment that are worth a walk of its own."""
WIDE_SEGMENTS = (8, 4)
"""Segments of a sequence of wide heads, without decays and with them, that are worth carrying states between them forward.

A walk that is not cut takes half of the columns instead.
"""
CARRY_STAGES = (4, 3)
"""Chunks that are on their way or read in the walk that carries states, and in that of their gradients."""
COUPLING_PROGRAMS, COUPLING_REGISTERS = 5, 96
"""Programs of the coupling kernel that share a multiprocessor, and registers of a thread, at most, with which they fit."""
ALIGNED = 8
"""16-bit elements in the 16 bytes on which the tensor memory accelerator wants rows to start."""


def fit(k_dim: int, *rows: Tensor) -> bool:
    """Whether the Hopper walks take these rows of queries, keys and values (or gradients of outputs)."""
    first = rows[0]
    if not first.is_cuda or torch.cuda.get_device_capability(first.device)[0] != 9:
        return False
    if first.dtype not in (torch.float16, torch.bfloat16) or any(x.dtype != first.dtype for x in rows):
        return False
    aligned = all(
        x.data_ptr() % 16 == 0 and x.stride(3) == 1 and all(s > 0 and s % ALIGNED == 0 for s in x.stride()[:3]) for x in rows
    )
    return aligned and all(width <= WIDTH and width % ALIGNED == 0 for width in (k_dim, rows[-1].shape[3]))


@cache
def _layout(width: int, rank: int) -> Any:
    from kernels.delta_rule.delta_hopper import shared_layout

    return shared_layout(width, rank)


def _described(x: Tensor, block: list[int]) -> Any:
    """What the tensor memory accelerator has to know of a tensor that it moves in blocks."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    give_context(x.device)
    return TensorDescriptor(x, list(x.shape), list(x.stride()), block, _layout(block[-1], len(block)))


@cache
def multiprocessors(device: torch.device) -> int:
    """How many there are."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def segments_of(walks: int, chunks: int, device: torch.device) -> int:
    """Segments of each sequence that fill the multiprocessors, unless they would be short."""
    return max(1, min(multiprocessors(device) // walks, chunks // SHORTEST))


class Plan(NamedTuple):
    """How the forward walk runs.

    Args:
        segments: of each sequence.
        walks: warp groups of a program that walk, with 64 columns of the values each.
        solvers: those that make couplings; without any these are made before.
        stages: chunks whose queries and keys are on their way or read; a multiple of solvers.
        depth: chunks whose values, and couplings made before, are.
    """

    segments: int
    walks: int
    solvers: int
    stages: int
    depth: int


def plan_of(k: Tensor, v: Tensor, *, gated: bool, keep: bool) -> Plan:
    """A plan that leaves few multiprocessors idle, as measured on an H200.

    Carrying states between segments costs about as much as the walk, unless decays let segments forget what was before them.
    What is kept for training takes the place of a third chunk's values.
    """
    (batch, length, heads, v_dim), k_dim = v.shape, k.shape[3]
    wide, tiles = max(k_dim, v_dim) > CHUNK, -(-v_dim // CHUNK)
    segments = segments_of(batch * heads, -(-length // CHUNK), v.device)
    if segments >= (WIDE_SEGMENTS[gated] if wide else 2):
        return Plan(segments, tiles, 0, *((3, 2) if wide else (4, 4)))
    if wide and multiprocessors(v.device) // (batch * heads) >= 2:
        return Plan(1, 1, 0, 3, 4)
    if tiles == 1:
        return Plan(1, 1, 2, 4, 2 if wide else 3)
    return Plan(1, tiles, 0, 3, 2 if keep else 3) if gated else Plan(1, tiles, 1, 3, 2)


def _split(chunks: int, segments: int) -> tuple[int, int]:
    """Segments of a sequence, none of them empty, and the chunks of each but the last."""
    span = -(-chunks // segments)
    return -(-chunks // span), span


def _carried(
    rows: list[Any], beta: Tensor, kept: Kept, given: Tensor | None, like: Tensor, counts: tuple[int, ...], constants: dict
) -> Tensor:
    """The states (or their gradients) with which each segment starts [B, H, segments, K, V], in the order of the walk."""
    from kernels.delta_rule.delta_combine_triton import combine_kernel
    from kernels.delta_rule.delta_hopper_carry import carry_kernel

    (batch, _, heads, v_dim), segments, k_dim = like.shape, counts[3], constants["K"]
    tiles = -(-v_dim // CHUNK) + -(-k_dim // CHUNK)
    ends = like.new_empty(batch * heads, segments - 1, k_dim, tiles * CHUNK, dtype=torch.float32)
    states = like.new_empty(batch, heads, segments, k_dim, v_dim, dtype=torch.float32)
    start = ends if given is None else given
    carry_kernel[(batch * heads * (segments - 1) * -(-tiles // 2),)](
        *rows, beta, kept.decays, start, ends, *counts, **constants, GIVEN=given is not None, num_warps=4,
        launch_pdl=not constants["REVERSE"],
    )  # fmt: skip
    combine_kernel[(batch * heads * -(-v_dim // 16),)](
        ends, start, states, segments, K=k_dim, V=v_dim, BK=padded(k_dim), BV=CHUNK, TILE=16, FIRST=given is not None,
        BETWEEN=True, num_warps=8, launch_pdl=True,
    )  # fmt: skip
    return states


class Gate(NamedTuple):
    """Log decays, or any tensor where there are none, as `kernels.operands._gate` describes them."""

    log_decay: Tensor
    strides: tuple[int, int]
    every: int


def _couple(
    keys: Any, couplings: Any, beta: Tensor, gate: Gate, kept: Kept, counts: tuple[int, ...], constants: dict[str, Any]
) -> None:
    """The couplings and cumulated decays of every chunk; each program has some of one head's."""
    from kernels.delta_rule.delta_hopper_couple import couple_kernel

    batch, heads, chunks = kept.couplings.shape[:3]
    walks = batch * heads
    programs = max(1, min(chunks, COUPLING_PROGRAMS * multiprocessors(beta.device) // walks))
    shared = {name: constants[name] for name in ("BK", "C", "GATED", "DOT")}
    couple_kernel[(programs * walks,)](
        keys, couplings, beta, gate.log_decay, kept.decays, *gate.strides, gate.every, *counts, walks,
        **shared, MERGE=_triton_dtype(torch.float16), num_warps=4, maxnreg=COUPLING_REGISTERS,
    )  # fmt: skip


def forward(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, gate: Gate, kept: Kept, first: Tensor | None, o: Tensor, last: Tensor,
    plan: Plan, *, gated: bool, return_state: bool, keep: bool,
) -> None:  # fmt: skip
    """The forward walk, before it couplings unless there are solvers; writes o, last, decays, and what is kept."""
    from kernels.delta_rule import delta_hopper_transposed

    (batch, length, heads, v_dim), k_dim, wide = v.shape, k.shape[3], max(padded(k.shape[3]), CHUNK)
    of_keys, of_values, chunks = [1, CHUNK, 1, wide], [1, CHUNK, 1, CHUNK], kept.couplings.shape[2]
    rows = [_described(q, of_keys), _described(k, of_keys), _described(v, of_values)]
    rows += [_described(kept.couplings.flatten(0, 2), [1, CHUNK, CHUNK]), _described(o, of_values)]
    kept_rows = [rows[4], rows[4]]
    if keep:
        kept_rows = [_described(kept.errors, of_values), _described(kept.states.flatten(0, 2), [1, wide, CHUNK])]
    segments, span = _split(chunks, plan.segments)
    counts = (length, heads, heads // k.shape[2], segments, span)
    constants = {"K": k_dim, "V": v_dim, "BK": wide, "C": CHUNK, "GATED": gated, "DOT": _triton_dtype(v.dtype)}
    if not plan.solvers:
        _couple(rows[1], rows[3], beta, gate, kept, counts[:3], constants)
    if segments > 1:
        more = constants | {"STAGES": CARRY_STAGES[0], "REVERSE": False}
        first = _carried([rows[1], rows[3], rows[2], rows[1]], beta, kept, first, v, counts, more)
    delta_hopper_transposed.forward_kernel[(batch * heads * segments * -(-v_dim // (CHUNK * plan.walks)),)](
        *rows, *kept_rows, beta, gate.log_decay, kept.decays, v if first is None else first, last,
        *gate.strides, gate.every, *counts,
        **constants, STAGES=plan.stages, DEPTH=plan.depth, WALKS=plan.walks, SOLVERS=plan.solvers,
        LAST=return_state, KEEP=keep, MERGE=_triton_dtype(torch.float16), FIRST=first is not None, num_warps=4,
        launch_pdl=not plan.solvers,
    )  # fmt: skip


def backward(
    q: Tensor, k: Tensor, do: Tensor, beta: Tensor, kept: Kept, dlast: Tensor | None, grads: tuple[Tensor, ...],
    dfirst: Tensor | None, _: Config, *, gated: bool,
) -> None:  # fmt: skip
    """All gradients on Hopper in one walk; writes `grads` (dq, dk, dv, dbeta, dgates) and dfirst."""
    from kernels.delta_rule import delta_hopper_backward

    batch, length, heads, v_dim = do.shape
    k_dim = k.shape[3]
    width = max(padded(k_dim), padded(v_dim), CHUNK)
    of_rows = [1, CHUNK, 1, width]
    dq, dk, dv, dbeta, dgates = grads
    couplings = _described(kept.couplings.flatten(0, 2), [1, CHUNK, CHUNK])
    chunks = kept.couplings.shape[2]
    segments, span = _split(chunks, segments_of(batch * heads, chunks, do.device))
    counts = (length, heads, heads // k.shape[2], segments, span)
    constants = {"K": k_dim, "V": v_dim, "C": CHUNK, "GATED": gated, "DOT": _triton_dtype(do.dtype)}
    if segments > 1:
        of_keys = [1, CHUNK, 1, max(padded(k_dim), CHUNK)]
        rows = [_described(k, of_keys), couplings, _described(do, [1, CHUNK, 1, CHUNK]), _described(q, of_keys)]
        more = {"BK": of_keys[3], "STAGES": CARRY_STAGES[1], "REVERSE": True}
        dlast = _carried(rows, beta, kept, dlast, do, counts, constants | more)
    delta_hopper_backward.backward_kernel[(batch * heads * segments,)](
        *(_described(x, of_rows) for x in (q, k, do, kept.errors)), _described(kept.states.flatten(0, 2), [1, width, width]),
        couplings, *(_described(x, of_rows) for x in (dq, dk, dv)),
        beta, kept.decays, do if dlast is None else dlast, dbeta, dgates, do if dfirst is None else dfirst, *counts,
        **constants, D=width, GATE_GRAD=dgates.numel() > 0, FIRST=dfirst is not None, DLAST=dlast is not None, num_warps=8,
    )  # fmt: skip
