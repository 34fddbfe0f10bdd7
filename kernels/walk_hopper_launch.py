"""Launches the walks for Hopper where they are faster: whole rows of heads with keys of their own.

Shape legend: B batch, T time, H heads, N chunks, K key, V value width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from kernels.delta_hopper_launch import ALIGNED, _described
from kernels.operands import _gate_kind, _nothing, _state_like, _triton_dtype, padded
from kernels.walk_decays import gate_every, gate_of
from kernels.walk_pieces import Pieces
from kernels.walk_segments import segments

if TYPE_CHECKING:
    from kernels.walk import Inputs

CHUNK = 64
"""Tokens of a chunk, which are the rows of one product of a warp group."""
WIDTH, NARROW = 128, 64
"""The widest heads that fit on chip, and the widest of which short rows are no faster."""
LONG = 512
"""Tokens of a row that is not short."""
LINE_HEADS = 16
"""Heads of a program that makes lines of decays."""


class Config(NamedTuple):
    """How a walk is compiled.

    Args:
        groups: groups of four warps.
        stages: chunks that are on their way or read.
        slots: the same of what the decays' gradient reads besides.
    """

    groups: int
    stages: int
    slots: int = 0


FORWARD = {NARROW: Config(1, 4), WIDTH: Config(2, 3)}
BACKWARD = {NARROW: Config(1, 3, 2), WIDTH: Config(2, 3, 1)}
"""By the width of keys and values on chip."""
SHARED = Config(2, 3)
PAIR = 2
KEEP, SUITS_SHARED = True, True
TRIAL = {"FACTORS": False, "CHECK": 0}


LEAST_SEGMENT, PROGRAMS = 512, 128
"""Tokens below which the states between segments would cost more than they gain, and walks for which long rows are cut."""


def _can(inputs: Inputs) -> bool:
    q, k, v, _, _, starts = inputs
    if starts is not None or not v.is_cuda or torch.cuda.get_device_capability(v.device)[0] != 9:
        return False
    return all(x.dtype == torch.bfloat16 and x.shape[3] % ALIGNED == 0 and x.shape[3] <= WIDTH for x in (q, k, v))


def suits_shared(inputs: Inputs) -> bool:
    """Whether the forward walk takes heads that share keys, beside `kernels.walk_grouped`."""
    return _can(inputs) and SUITS_SHARED


def suits(inputs: Inputs) -> bool:
    """Whether the Hopper walks take these inputs: what is known of fake tensors too."""
    k, v = inputs.k, inputs.v
    if not _can(inputs) or k.shape[2] != v.shape[2]:
        return False
    least, most = sorted((k.shape[3], v.shape[3]))
    return (least > NARROW and most <= WIDTH) or (most <= NARROW and v.shape[1] >= LONG)


def share_out(v: Tensor) -> Pieces:
    """Whole rows, or segments of whole chunks of long rows of few heads."""
    from kernels.walk_triton import SEGMENTS, WHOLE

    batch, length, heads, _ = v.shape
    number = max(1, min(PROGRAMS // (batch * heads), length // LEAST_SEGMENT))
    span = -(-length // (number * CHUNK)) * CHUNK
    number = -(-length // span)
    return Pieces((WHOLE if number == 1 else SEGMENTS).value, number, span, None)


def entering_like(inputs: Inputs) -> Tensor:
    """Room for what `forward` keeps for `backward`, in fp32.

    States that enter the segments [B, P, H, K, V], behind the lines of scalar decays [B * H, N * C], as one row of numbers.
    """
    return inputs.v.new_empty(sum(_sizes(inputs)), dtype=torch.float32)


def _sizes(inputs: Inputs) -> tuple[int, int]:
    """Numbers of the lines and of the states that are kept."""
    (batch, length, heads, v_dim), gate = inputs.v.shape, inputs.log_decay
    pieces = share_out(inputs.v)
    lines = batch * heads * -(-length // CHUNK) * CHUNK if gate is not None and gate.ndim == 3 else 0
    return lines, batch * pieces.number * heads * inputs.k.shape[3] * v_dim if pieces.number > 1 else 0


def _aligned(x: Tensor) -> Tensor:
    """Rows as the tensor memory accelerator takes them."""
    fits = x.data_ptr() % 16 == 0 and x.stride(3) == 1 and all(s > 0 and s % ALIGNED == 0 for s in x.stride()[:3])
    return x if fits else x.clone(memory_format=torch.contiguous_format)


def _make_lines(inputs: Inputs, lines: Tensor) -> None:
    """Writes the log decays as the walks read them."""
    from kernels.walk_lines_triton import lines_kernel

    gate = inputs.log_decay
    if gate is not None and gate.ndim == 3:
        batch, length, heads = gate.shape
        chunks = -(-length // CHUNK)
        lines_kernel[(batch * chunks * -(-heads // LINE_HEADS),)](
            gate.contiguous(), lines, length, heads, chunks, C=CHUNK, HEADS=LINE_HEADS, num_warps=4
        )


def _lines_described(lines: Tensor, rows: int, spare: Any) -> Any:
    """Lines of decays in blocks of a chunk, or anything."""
    if not lines.numel():
        return spare
    from triton.experimental.gluon.language import NVMMASharedLayout
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    lines = lines.view(rows, -1)
    return TensorDescriptor(lines, list(lines.shape), list(lines.stride()), [1, CHUNK], NVMMASharedLayout(0, 32, rank=2))


def _width(x: Tensor) -> int:
    """Of rows on chip."""
    return max(padded(x.shape[3]), NARROW)


def _constants(inputs: Inputs, config: Config, pieces: Pieces) -> dict[str, Any]:
    return {
        "K": inputs.k.shape[3], "V": inputs.v.shape[3], "C": CHUNK, "GATE": _gate_kind(inputs.log_decay), "DOT": _triton_dtype(inputs.v.dtype),
        "GROUPS": config.groups, "STAGES": config.stages, "num_warps": 4 * config.groups, "CUT": pieces.number > 1, **TRIAL,
    }  # fmt: skip


def forward(inputs: Inputs, o: Tensor, *, return_state: bool) -> tuple[Tensor, Tensor, Tensor]:
    """See `kernels.walk.forward`; `o` is written."""
    from kernels import walk_hopper

    q, k, v = (_aligned(x) for x in (inputs.q, inputs.k, inputs.v))
    (batch, length, heads, _), k_dim, state = v.shape, k.shape[3], inputs.state
    shared, wide_k, wide_v = heads // k.shape[2], _width(k), _width(v)
    pieces, gate = share_out(v), gate_of(inputs.log_decay, v)
    constants = _constants(inputs, SHARED if shared > 1 else FORWARD[max(wide_k, wide_v)], pieces)
    kept = v.new_empty(sum(_sizes(inputs)), dtype=torch.float32)
    lines, entered = kept.split(_sizes(inputs))
    keep = shared > 1 and KEEP
    states = v.new_empty(batch * -(-length // CHUNK) * heads, k_dim, v.shape[3]) if keep else o
    _make_lines(inputs, lines)
    sums, decays = segments(k, v, gate, constants["GATE"], pieces, CHUNK, reverse=False)
    last = _state_like(v, k_dim) if return_state else _nothing(v)
    described = [_described(x, [1, CHUNK, 1, width]) for x, width in ((q, wide_k), (k, wide_k), (v, wide_v), (o, wide_v))]
    described += [_described(states, [1, wide_k, wide_v]) if keep else described[3]]
    walk_hopper.forward_kernel[(batch * pieces.number * heads,)](
        *described, _lines_described(lines, batch * heads, described[0]), lines, gate,
        v if state is None else state.contiguous(), last, entered, sums, decays,
        length, batch, heads, shared, gate_every(inputs.log_decay, batch), pieces.number, pieces.length // CHUNK,
        **constants, BK=wide_k, BV=wide_v, START=int(state is not None), ENTER=pieces.number > 1 and shared == 1, KEEP=keep,
        LAST=return_state,
    )  # fmt: skip
    return o, last, states.view(batch, -1, heads, *states.shape[1:]) if keep else kept


def backward(
    narrow: tuple[Tensor, ...],
    inputs: Inputs,
    kept: Tensor,
    dlast: Tensor | None,
    dv: Tensor,
    dfirst: Tensor,
    *,
    gate_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries and keys [B, T, H, K], and what sums to that of the cumulated decays, [2, B, H, T].

    See `kernels.walk._walk_back`; `narrow` are q, k, v and do.
    """
    from kernels import walk_hopper
    from kernels.walk_hopper_parts import EACH_GIVEN

    q, k, v, do = (_aligned(x) for x in narrow)
    (batch, length, heads, _), k_dim, state = v.shape, k.shape[3], inputs.state
    pieces, gate = share_out(v), gate_of(inputs.log_decay, v)
    width = max(_width(k), _width(v))
    constants = _constants(inputs, BACKWARD[width], pieces)
    lines, entered = kept.split(_sizes(inputs))
    sums, decays = segments(q, do, gate, constants["GATE"], pieces, CHUNK, reverse=True)
    first = entered if pieces.number > 1 else v if state is None else state.contiguous()
    dq, dk = (v.new_empty(batch, length, heads, k_dim) for _ in range(2))
    parts = 3 if PAIR else 2
    rowsums = v.new_empty((parts, batch, heads, length) if gate_grad else (2, 0), dtype=torch.float32)
    described = [_described(x, [1, CHUNK, 1, width]) for x in (q, k, v, do, dq, dk, dv)]
    kernel, grid = (walk_hopper.pair_kernel, 2) if PAIR else (walk_hopper.backward_kernel, 3)
    if PAIR:
        constants["PAIR_STAGES"] = PAIR
    kernel[(batch * pieces.number * heads * grid,)](
        *described, _lines_described(lines, batch * heads, described[0]), lines, gate,
        first, v if dlast is None else dlast, dfirst, sums, decays, rowsums,
        length, batch, heads, gate_every(inputs.log_decay, batch), pieces.number, pieces.length // CHUNK,
        **constants, W=width, SLOTS=BACKWARD[width].slots, START=EACH_GIVEN.value if pieces.number > 1 else int(state is not None),
        DLAST=int(dlast is not None), LAST=state is not None, GATE_GRAD=gate_grad,
    )  # fmt: skip
    return dq, dk, rowsums
