"""Launches the kernels of `kernels.walk_grouped_triton`: heads that share queries and keys.

Shape legend: B batch, T time, H heads of v, G heads of q and k, N chunks, K key, V value width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from kernels.operands import _dot_dtype, _gate_kind, _nothing, _precision, _rows, _state_like, _triton_dtype, product_width
from kernels.walk_decays import cumulated, gate_every
from kernels.walk_pieces import Pieces, n_segments
from kernels.walk_segments import segments

if TYPE_CHECKING:
    from kernels.walk import Inputs

CHUNK = 64
STATES_TILE = 64
"""Columns of the values that a walk of states has."""
STATES, OUTPUTS, QUERIES, KEYS = ({"num_warps": 4, "STAGES": stages} for stages in (3, 2, 2, 2))
"""How the kernels are compiled."""
LEAST_GROUP, MAX_WIDTH = 4, 128
"""Heads that share keys below which walks of whole heads are faster, and widths above which states do not fit."""
MAX_GATED_WIDTH = 64
"""Width up to which heads with keys of their own and a decay for each token go back chunk by chunk."""
PROGRAMS = 256
"""Programs over which the heads of a group are split where chunks are fewer."""


def suits(q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None) -> bool:
    """Whether heads in groups are computed chunk by chunk: 16-bit ones of whole rows."""
    grouped = k.shape[2] * LEAST_GROUP <= v.shape[2] and max(k.shape[3], v.shape[3]) <= MAX_WIDTH
    return grouped and starts is None and _dot_dtype(q, k, v).itemsize == 2


def suits_backward(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, starts: Tensor | None) -> bool:
    """Whether gradients are computed chunk by chunk: also those of decays of each token, for which walks lack registers."""
    if suits(q, k, v, starts):
        return True
    narrow = max(k.shape[3], v.shape[3]) <= MAX_GATED_WIDTH and _dot_dtype(q, k, v).itemsize == 2
    return narrow and starts is None and log_decay is not None and log_decay.ndim == 3


def n_chunks(length: int) -> int:
    """Chunks of a row."""
    return -(-length // CHUNK)


class _Call(NamedTuple):
    """What the launches of one pass share: sizes, constants and the decays."""

    sizes: tuple[int, ...]
    constants: dict[str, Any]
    gate: Tensor
    gate_kind: int
    pieces: Pieces

    @classmethod
    def of(cls, k: Tensor, v: Tensor, log_decay: Tensor | None, unit: int) -> _Call:
        """Segments, if there are any, are whole chunks."""
        from kernels.walk_triton import SEGMENTS, WHOLE

        batch, length, heads, v_dim = v.shape
        k_dim, number = k.shape[3], n_segments(k, v)
        span = n_chunks(-(-length // number)) * CHUNK
        number = -(-length // span)
        pieces = Pieces((WHOLE if number == 1 else SEGMENTS).value, number, span, None)
        sizes = length, n_chunks(length), heads, heads // k.shape[2], gate_every(log_decay, batch)
        constants = {
            "K": k_dim, "V": v_dim, "BK": product_width(k_dim, v.dtype), "BV": product_width(v_dim, v.dtype),
            "UNIT": unit, "C": CHUNK,
            "GATE": _gate_kind(log_decay), "DOT": _triton_dtype(v.dtype), "PRECISION": _precision(v.dtype),
        }  # fmt: skip
        return cls(sizes, constants, cumulated(log_decay, v, pieces, CHUNK), _gate_kind(log_decay), pieces)

    def splits(self, batch: int) -> int:
        """Parts into which the heads of each group are split, a divisor of their number, so that programs fill a device."""
        _, chunks, heads, group, _ = self.sizes
        wanted = -(-PROGRAMS // (batch * chunks * (heads // group)))
        return next(n for n in range(min(wanted, group), group + 1) if group % n == 0)


def _states(
    call: _Call, b: Tensor, c: Tensor, strides: list[int], given: Tensor | None, last: Tensor | None, *, reverse: bool
) -> Tensor:
    """States before the chunks, or the gradients of those behind them, [B, N, H, K, V] in the dtype of the products."""
    from kernels.walk_grouped_triton import states_kernel

    batch, _, heads, v_dim = c.shape
    sums, decays = segments(b, c, call.gate, call.gate_kind, call.pieces, CHUNK, reverse=reverse)
    kept = c.new_empty(batch, call.sizes[1], heads, b.shape[3], v_dim)
    tile = min(STATES_TILE, product_width(v_dim, c.dtype))
    states_kernel[(batch * call.pieces.number * heads * -(-v_dim // tile),)](
        b, c, call.gate, c if given is None else given, c if last is None else last, kept, sums, decays,
        *strides, *call.sizes, call.pieces.number, call.pieces.length,
        **call.constants | {"BV": tile}, GIVEN=given is not None, LAST=last is not None, PIECES=call.pieces.kind, REVERSE=reverse,
        **STATES,
    )  # fmt: skip
    return kept


def forward(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor | None, o: Tensor, *, return_state: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """See `kernels.walk.forward`; q, k and v in the dtype of the products, `o` is written."""
    from kernels.walk_grouped_triton import outputs_kernel

    (q, k, v), strides, unit = _rows(q, k, v)
    batch = v.shape[0]
    call = _Call.of(k, v, log_decay, unit)
    last = _state_like(v, k.shape[3]) if return_state else None
    given = None if state is None else state.contiguous()
    kept = _states(call, k, v, strides[3:], given, last, reverse=False)
    splits = call.splits(batch)
    outputs_kernel[(batch * call.sizes[1] * k.shape[2] * splits,)](
        q, k, v, call.gate, kept, o, *strides, *call.sizes, splits,
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries and keys, [B, T, G * splits, K], and what sums to that of the cumulated decays, [2, B, H, T].

    See `kernels.walk._walk_back`.
    """
    from kernels.walk_grouped_triton import keys_kernel, queries_kernel

    (q, k, v, do), strides, unit = _rows(*narrow)
    batch, length, heads, _ = v.shape
    call = _Call.of(k, v, inputs.log_decay, unit)
    given = None if inputs.state is None else inputs.state.contiguous()
    kept = entering
    if not suits(q, k, v, inputs.starts):
        kept = _states(call, k, v, strides[3:9], given, None, reverse=False)
    dfirst_or_none = None if given is None else dfirst
    dkept = _states(call, q, do, [*strides[:3], *strides[9:]], dlast, dfirst_or_none, reverse=True)
    splits = call.splits(batch)
    dq, dk = (x.new_empty(batch, length, k.shape[2] * splits, k.shape[3]) for x in (inputs.q, inputs.k))
    rowsums = v.new_empty((2, batch, heads, length) if gate_grad else (2, 0), dtype=torch.float32)
    grid = (batch * call.sizes[1] * k.shape[2] * splits,)
    queries_kernel[grid](
        q, k, v, do, call.gate, kept, dq, rowsums[0], *strides, *call.sizes, splits,
        **call.constants, GATE_GRAD=gate_grad, **QUERIES,
    )  # fmt: skip
    keys_kernel[grid](
        q, k, v, do, call.gate, dkept, dk, dv, rowsums[1], *strides, *call.sizes, splits,
        **call.constants, GATE_GRAD=gate_grad, **KEYS,
    )  # fmt: skip
    return dq, dk, rowsums
