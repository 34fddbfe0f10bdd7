"""Launches the walks for Hopper where they fit: descriptors, configurations.

Shape legend: B batch, T time, H heads of v, G heads of q and k, P segments, N chunks, K key, V value width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from kernels.delta_hopper_launch import _described
from kernels.delta_hopper_launch import fit as fit_delta
from kernels.operands import _triton_dtype, padded
from kernels.walk_pieces import CHUNK, Pieces

WIDTH = 128
"""The widest heads that fit on chip."""


class Config(NamedTuple):
    """How a walk is compiled.

    Args:
        groups: groups of four warps.
        stages: chunks that are on their way or read.
        slots: the same of what the decays' gradient reads besides.
    """

    groups: int
    stages: int
    slots: int


FORWARD = {64: Config(1, 4, 0), 128: Config(2, 3, 0)}
BACKWARD = {64: Config(1, 3, 2), 128: Config(2, 3, 1)}
"""By the larger width."""


class Gate(NamedTuple):
    """Log decays as the walks read them, or anything; how many batches share a row; and their kind."""

    log_decay: Tensor
    every: int
    kind: int


class Cut(NamedTuple):
    """Segments of long rows: how many, and what each adds to the state and its log2 decay [B, P, H, K, V] and [B, P, H]."""

    pieces: Pieces
    sums: Tensor
    decays: Tensor

    def counts(self, length: int) -> tuple[int, int]:
        """Segments, and chunks of each."""
        return self.pieces.number, -(-min(self.pieces.length, length) // CHUNK)


def fit(*rows: Tensor) -> bool:
    """Whether the Hopper walks take these rows of queries, keys, values and what has their shapes."""
    return all(x.shape[3] <= WIDTH for x in rows) and fit_delta(rows[0].shape[3], *rows)


def forward(
    rows: tuple[Tensor, Tensor, Tensor], o: Tensor, gate: Gate, cut: Cut, state: Tensor | None,
    *, last: Tensor | None = None, entering: Tensor | None = None, kept: Tensor | None = None,
) -> None:  # fmt: skip
    """Writes the outputs and what else is given.

    Args:
        rows: q and k [B, T, G, K], v [B, T, H, V].
        o: outputs [B, T, H, V].
        gate: see `Gate`.
        cut: see `Cut`.
        state: before the first token [B, H, K, V] in fp32, or None for zero.
        last: behind the last token, likewise.
        entering: of each segment [B, P, H, K, V] in fp32.
        kept: before each chunk [B, N, H, K, V] in the dtype of the rows, scaled as `kernels.walk_grouped_triton` reads it.
    """
    from kernels import walk_hopper

    (q, k, v), (batch, length, heads, v_dim) = rows, o.shape
    constants, of_keys, of_values = _constants(k, v, FORWARD)
    states = o if kept is None else kept
    described = [_described(x, block) for x, block in ((q, of_keys), (k, of_keys), (v, of_values), (o, of_values))]
    described.append(described[-1] if kept is None else _described(kept.flatten(0, 2), [1, of_keys[-1], of_values[-1]]))
    number, span = cut.counts(length)
    walk_hopper.forward_kernel[(batch * number * heads,)](
        *described, gate.log_decay, *(states if x is None else x for x in (state, last, entering)), cut.sums, cut.decays,
        length, batch, heads, heads // k.shape[2], gate.every, number, span,
        **constants, GATE=gate.kind, START=int(state is not None), LAST=last is not None, ENTER=entering is not None,
        KEEP=kept is not None,
    )  # fmt: skip


def backward(
    rows: tuple[Tensor, ...], grads: tuple[Tensor, ...], gate: Gate, cut: Cut, ends: tuple[Tensor | None, ...],
    entering: Tensor, rowsums: Tensor,
) -> None:  # fmt: skip
    """Writes the gradients of queries and keys for each head [B, T, H, K], of values, and what sums to that of the decays.

    Args:
        rows: q, k, v and do.
        grads: dq, dk and dv, which are written.
        gate: see `Gate`.
        cut: see `Cut`, in reverse.
        ends: the state before the first token and the gradient of the last one, None for zero, and that of the first one, which
            is written unless it is None.
        entering: states that enter segments.
        rowsums: [2, B, H, T], written unless empty.
    """
    from kernels import walk_hopper

    (q, k, v, do), (dq, dk, dv), (state, dlast, dfirst) = rows, grads, ends
    batch, length, heads, _ = v.shape
    constants, of_keys, of_values = _constants(k, v, BACKWARD)
    keys, values = ([_described(x, block) for x in xs] for xs, block in (((q, k, dq, dk), of_keys), ((v, do, dv), of_values)))
    number, span = cut.counts(length)
    start = walk_hopper.EACH_GIVEN.value if number > 1 else int(state is not None)
    pointers = (v if x is None else x for x in (state, entering, dlast, dfirst))
    together = of_keys[-1] == of_values[-1]
    arguments = (
        *keys[:2], *values[:2], *keys[2:], values[2], gate.log_decay, *pointers, cut.sums, cut.decays, rowsums,
        length, batch, heads, heads // k.shape[2], gate.every, number, span,
    )  # fmt: skip
    for part in (walk_hopper.ALL,) if together else (walk_hopper.QUERIES, walk_hopper.KEYS, walk_hopper.VALUES):
        walk_hopper.backward_kernel[(batch * number * heads * (3 if together else 1),)](
            *arguments, **constants, PART=part.value, GATE=gate.kind, START=start, DLAST=int(dlast is not None),
            LAST=dfirst is not None, GATE_GRAD=rowsums.numel() > 0,
        )  # fmt: skip


def _constants(k: Tensor, v: Tensor, configs: dict[int, Config]) -> tuple[dict[str, Any], list[int], list[int]]:
    """Compile-time arguments, and the blocks of keys and of values."""
    widths = [max(padded(x.shape[3]), CHUNK) for x in (k, v)]
    config = configs[max(widths)]
    constants = {"K": k.shape[3], "V": v.shape[3], "BK": widths[0], "BV": widths[1], "C": CHUNK, "DOT": _triton_dtype(v.dtype)}
    constants |= {"GROUPS": config.groups, "STAGES": config.stages, "num_warps": 4 * config.groups}
    return constants | ({"SLOTS": config.slots} if config.slots else {}), [1, CHUNK, 1, widths[0]], [1, CHUNK, 1, widths[1]]
