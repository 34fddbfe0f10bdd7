"""Launches the walks for Hopper where they fit."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from kernels.delta_hopper_launch import _described
from kernels.delta_hopper_launch import fit as fit_delta
from kernels.operands import _triton_dtype, padded
from kernels.walk_pieces import Pieces

CHUNK = 64
"""Tokens of a chunk, which are the rows of one product of a warp group."""
WIDTH = 128
"""The widest heads that fit on chip."""
SHORTEST = 1
"""Tokens of a sequence below which it is not worth it."""
STAGES, PROBED = {64: 4, 128: 3}, {64: 3, 128: 2}
"""Chunks that are on their way or read, by width."""


class Gate(NamedTuple):
    """Log decays as the walks read them, or anything; how many batches share a row; and their kind."""

    log_decay: Tensor
    every: int
    kind: int


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


class States(NamedTuple):
    """States [K, V] that a walk starts from and leaves, in fp32; None for what is not given or not wanted.

    Args:
        given: before the first token, or in reverse behind the last [B, H, K, V].
        last: the other end [B, H, K, V].
        segments: how many, the chunks of each, and their sums and decays or None with one.
        entering: of each segment [B, P, H, K, V]: written, or read in place of `given` and the sums.
        kept: before each chunk [B, N, H, K, V] in the dtype of the products, scaled as `kernels.walk_grouped_triton` reads it.
    """

    given: Tensor | None = None
    last: Tensor | None = None
    segments: tuple[int, int, Tensor, Tensor] | None = None
    entering: Tensor | None = None
    kept: Tensor | None = None


def fit(*rows: Tensor) -> bool:
    """Whether the Hopper walk takes these rows of queries, keys, values and gradients."""
    return min(x.shape[1] for x in rows) >= SHORTEST and all(x.shape[3] <= WIDTH for x in rows) and fit_delta(rows[1].shape[3], *rows)


def walk(
    rows: Operands, out: Tensor, gate: Gate, states: States, *, reverse: bool = False, turned: bool = False,
    rowsum: Tensor | None = None, probe: int = 0, groups: int | None = None, stages: int | None = None, read: bool = False,
) -> None:  # fmt: skip
    """One walk; writes `out` [B, T, H, E], and what else is given. `read`: entering states are read, not written."""
    from kernels import walk_hopper

    a, b, c, probed = rows
    batch, length, heads, e_dim = out.shape
    d_dim = a.shape[3]
    wide_d, wide_e = max(padded(d_dim), CHUNK), max(padded(e_dim), CHUNK)
    of_d, of_e = [1, CHUNK, 1, wide_d], [1, CHUNK, 1, wide_e]
    widest = max(wide_d, wide_e)
    groups = groups or (2 if widest > 64 else 1)
    stages = stages or (STAGES if probed is None else PROBED)[widest]
    described = [_described(a, of_d), _described(b, of_d), _described(c, of_e)]
    described += [_described(c if probed is None else probed, of_e), _described(out, of_e)]
    described.append(described[-1] if states.kept is None else _described(states.kept.flatten(0, 2), [1, wide_d, wide_e]))
    number, span, sums, decays = states.segments or (1, -(-length // CHUNK), gate.log_decay, gate.log_decay)
    given = states.entering if read else states.given
    pointers = (given, states.last, states.entering)
    start = walk_hopper.FROM_ZERO if given is None else walk_hopper.EACH_GIVEN if read else walk_hopper.GIVEN
    walk_hopper.walk_kernel[(batch * number * heads,)](
        *described, gate.log_decay, *(gate.log_decay if x is None else x for x in pointers), sums, decays,
        gate.log_decay if rowsum is None else rowsum,
        length, batch, heads, heads // a.shape[2], heads // c.shape[2], gate.every, number, span,
        D=d_dim, E=e_dim, BD=wide_d, BE=wide_e, GROUPS=groups, C=CHUNK, STAGES=stages, GATE=gate.kind, REVERSE=reverse,
        TURNED=turned, START=start.value, LAST=states.last is not None, ENTER=states.entering is not None and not read,
        KEEP=states.kept is not None, PROBE=probe, DOT=_triton_dtype(c.dtype), num_warps=4 * groups,
    )  # fmt: skip


def forward(
    rows: tuple[Tensor, ...], o: Tensor, gate: Gate, state: Tensor | None, last: Tensor | None, pieces: Pieces,
    sums: tuple[Tensor, Tensor], entering: Tensor,
) -> None:  # fmt: skip
    """Outputs, the last state if wanted, and the states that enter segments."""
    q, k, v = rows
    cut = None if pieces.number == 1 else (pieces.number, pieces.length // CHUNK, *sums)
    given = None if state is None else state.contiguous()
    walk(Operands(q, k, v), o, gate, States(given, last, cut, None if cut is None else entering))


def backward(
    rows: tuple[Tensor, ...], grads: tuple[Tensor, ...], gate: Gate, ends: tuple[Tensor | None, ...], pieces: Pieces,
    sums: tuple[Tensor, Tensor], entering: Tensor, rowsums: Tensor,
) -> None:  # fmt: skip
    """Gradients of queries and keys for each head, of values and of the first state, and what sums to that of the decays."""
    from kernels.walk_hopper import NO_PROBE, PAIRS_PROBE, STATE_PROBE

    (q, k, v, do), (dq, dk, dv), (state, dlast, dfirst) = rows, grads, ends
    cut = None if pieces.number == 1 else (pieces.number, pieces.length // CHUNK, *sums)
    given, wanted = None if state is None else state.contiguous(), rowsums.numel() > 0
    pairs, later = (PAIRS_PROBE, STATE_PROBE) if wanted else (NO_PROBE, NO_PROBE)
    walk(
        Operands(do, v, k, q if wanted else None), dq, gate, States(given, None, cut, None if cut is None else entering),
        turned=True, rowsum=rowsums[0] if wanted else None, probe=pairs.value, read=cut is not None,
    )  # fmt: skip
    walk(Operands(v, do, q), dk, gate, States(dlast, None, cut), reverse=True, turned=True)
    walk(
        Operands(k, q, do, v if wanted else None), dv, gate, States(dlast, dfirst, cut),
        reverse=True, rowsum=rowsums[1] if wanted else None, probe=later.value,
    )  # fmt: skip
