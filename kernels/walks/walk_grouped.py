"""Launches the kernels of `kernels.walks.walk_grouped_triton`: heads that share queries and keys.

Shape legend: B batch, T time, H heads of v, G heads of q and k, N chunks, K key, V value width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from kernels.operands import _dot_dtype, _gate_kind, _nothing, _precision, _rows, _state_like, _triton_dtype, product_width
from kernels.walks.walk_crossings import Chunks
from kernels.walks.walk_decays import RowSums, gate_every, gate_of
from kernels.walks.walk_pieces import HEADS_AT_ONCE, Pieces, n_segments
from kernels.walks.walk_segments import segments

if TYPE_CHECKING:
    from kernels.walks.walk import Inputs

CHUNK = 64
STATES_TILE = 64
"""Columns of the values that a walk of states has."""
STATES, OUTPUTS, QUERIES, KEYS = ({"num_warps": 4, "STAGES": stages} for stages in (3, 2, 2, 2))
"""How the kernels are compiled."""
RUN = 16
"""Chunks that the decays' gradient is summed over at once, in rows of more than two such runs: longer sums lose too much."""
GATE_ROWS, GATE_HEADS = 128, 16
"""Tokens and heads of a tile of the decays that are summed over chunks."""
LEAST_GROUP, MAX_WIDTH = 4, 128
"""Heads that share keys below which walks of whole heads are faster, and widths above which states do not fit."""
PROGRAMS = 256
"""Programs over which the heads of a group are split where chunks are fewer."""


def suits(q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None) -> bool:
    """Whether heads in groups are computed chunk by chunk: 16-bit ones of whole rows."""
    grouped = k.shape[2] * LEAST_GROUP <= v.shape[2] and max(k.shape[3], v.shape[3]) <= MAX_WIDTH
    return grouped and starts is None and _dot_dtype(q, k, v).itemsize == 2


def n_chunks(length: int) -> int:
    """Chunks of a row."""
    return -(-length // CHUNK)


def n_splits(v_BTHV: Tensor, groups: int) -> int:
    """Parts into which the heads of each group are split, a divisor of their number, so that programs fill a device."""
    batch, length, heads, _ = v_BTHV.shape
    group, wanted = heads // groups, -(-PROGRAMS // (batch * n_chunks(length) * groups))
    return next(n for n in range(min(wanted, group), group + 1) if group % n == 0)


class _Call(NamedTuple):
    """What the launches of one pass share: sizes, constants, and the decays, as they are and summed over chunks."""

    sizes: tuple[int, ...]
    constants: dict[str, Any]
    gate: Tensor
    sums: Tensor
    pieces: Pieces

    @classmethod
    def of(cls, k: Tensor, v: Tensor, log_decay: Tensor | None, unit: int) -> _Call:
        """Segments are whole chunks; with enough heads there are none, as walks of states alone are short."""
        from kernels.walks.walk_triton import SEGMENTS, WHOLE

        batch, length, heads, v_dim = v.shape
        k_dim, number = k.shape[3], 1 if batch * heads >= HEADS_AT_ONCE else n_segments(k, v)
        span = n_chunks(-(-length // number)) * CHUNK
        number = -(-length // span)
        pieces = Pieces((WHOLE if number == 1 else SEGMENTS).value, number, span, None)
        sizes = length, n_chunks(length), heads, heads // k.shape[2], gate_every(log_decay, batch)
        constants = {
            "K": k_dim, "V": v_dim, "BK": product_width(k_dim, v.dtype), "BV": product_width(v_dim, v.dtype),
            "UNIT": unit, "C": CHUNK,
            "GATE": _gate_kind(log_decay), "DOT": _triton_dtype(v.dtype), "PRECISION": _precision(v.dtype),
        }  # fmt: skip
        return cls(sizes, constants, gate_of(log_decay, v), _sums(log_decay, v), pieces)


def _sums(log_decay: Tensor | None, spare: Tensor) -> Tensor:
    """Decays as these kernels read them: [M, H] as given, those of each token as log2 sums over each chunk, [B, H, T]."""
    from kernels.walks.walk_grouped_triton import cumulate_kernel

    gate = gate_of(log_decay, spare)
    if log_decay is None or gate.ndim == 2:
        return gate
    batch, length, heads = gate.shape
    sums, blocks = gate.new_empty(batch, heads, length), -(-length // GATE_ROWS)
    cumulate_kernel[(batch * -(-heads // GATE_HEADS) * blocks,)](
        gate, sums, length, heads, blocks, C=CHUNK, ROWS=GATE_ROWS, HEADS=GATE_HEADS, num_warps=4
    )
    return sums


def _states(
    call: _Call, b: Tensor, c: Tensor, strides: list[int], given: Tensor | None, last: Tensor | None, *, reverse: bool
) -> Tensor:
    """States before the chunks, or the gradients of those behind them, [B, N, H, K, V] in the dtype of the products."""
    from kernels.walks.walk_grouped_triton import states_kernel

    batch, _, heads, v_dim = c.shape
    sums, decays = segments(b, c, call.gate, call.constants["GATE"], call.pieces, CHUNK, reverse=reverse)
    kept = c.new_empty(batch, call.sizes[1], heads, b.shape[3], v_dim)
    tile = min(STATES_TILE, product_width(v_dim, c.dtype))
    states_kernel[(batch * call.pieces.number * heads * -(-v_dim // tile),)](
        b, c, call.sums, c if given is None else given, c if last is None else last, kept, sums, decays,
        *strides, *call.sizes, call.pieces.number, call.pieces.length,
        **call.constants | {"BV": tile}, GIVEN=given is not None, LAST=last is not None, PIECES=call.pieces.kind, REVERSE=reverse,
        **STATES,
    )  # fmt: skip
    return kept


def forward(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor | None, o: Tensor, *, return_state: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """See `kernels.walks.walk.forward`; q, k and v in the dtype of the products, `o` is written."""
    from kernels.walks.walk_grouped_triton import outputs_kernel

    (q, k, v), strides, unit = _rows(q, k, v)
    batch = v.shape[0]
    call = _Call.of(k, v, log_decay, unit)
    last = _state_like(v, k.shape[3]) if return_state else None
    given = None if state is None else state.contiguous()
    kept = _states(call, k, v, strides[3:], given, last, reverse=False)
    splits = n_splits(v, k.shape[2])
    outputs_kernel[(batch * call.sizes[1] * k.shape[2] * splits,)](
        q, k, v, call.sums, kept, o, *strides, *call.sizes, splits,
        **call.constants, **OUTPUTS,
    )  # fmt: skip
    return o, _nothing(v) if last is None else last, kept


def backward(
    narrow: tuple[Tensor, ...],
    inputs: Inputs,
    entering: Tensor,
    dlast: Tensor | None,
    dv: Tensor,
    dfirst: Tensor,
    *,
    gate_grad: bool,
) -> tuple[Tensor, Tensor, RowSums]:
    """Gradients of queries and keys, [B, T, G * splits, K], and what sums to that of the cumulated decays.

    See `kernels.walks.walk._walk_back`.
    """
    from kernels.walks.walk_grouped_triton import keys_kernel, queries_kernel

    (q, k, v, do), strides, unit = _rows(*narrow)
    batch, length, heads, _ = v.shape
    call = _Call.of(k, v, inputs.log_decay, unit)
    first = None if inputs.state is None else dfirst
    dkept = _states(call, q, do, [*strides[:3], *strides[9:]], dlast, first, reverse=True)
    splits = n_splits(v, k.shape[2])
    dq, dk = (x.new_empty(batch, length, k.shape[2] * splits, k.shape[3]) for x in (inputs.q, inputs.k))
    rowsums = v.new_empty((2, batch, heads, length) if gate_grad else (2, 0), dtype=torch.float32)
    grid = (batch * call.sizes[1] * k.shape[2] * splits,)
    queries_kernel[grid](
        q, k, v, do, call.sums, entering, dq, rowsums[0], *strides, *call.sizes, splits,
        **call.constants, GATE_GRAD=gate_grad, **QUERIES,
    )  # fmt: skip
    keys_kernel[grid](
        q, k, v, do, call.sums, dkept, dk, dv, rowsums[1], *strides, *call.sizes, splits,
        **call.constants, GATE_GRAD=gate_grad, **KEYS,
    )  # fmt: skip
    between = Chunks(entering, dkept, RUN, RUN * CHUNK) if call.sizes[1] > 2 * RUN else None
    return dq, dk, RowSums(rowsums, 1, CHUNK, between)
