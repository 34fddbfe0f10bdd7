"""Launches the walks for Hopper where they are faster: bf16 heads up to 128 wide whose rows copies can take.

Shape legend: B batch, T time, H heads, P segments, N chunks of C tokens, K key, V value width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from kernels.delta_rule.delta_hopper_launch import ALIGNED, _described
from kernels.operands import _gate_kind, _nothing, _state_like, _triton_dtype, padded
from kernels.walks import walk_grouped
from kernels.walks.walk_decays import gate_every, gate_of
from kernels.walks.walk_pieces import Pieces, n_segments

if TYPE_CHECKING:
    from kernels.walks.walk import Inputs

CHUNK = 64
"""Tokens of a chunk, which are the rows of one product of a warp group."""
WIDTH, NARROW = 128, 64
"""The widest heads that fit on chip, and the widest of which short rows are no faster."""
LONG, LONGER = 512, 1024
"""Tokens of a row that is not short, under a scalar gate and otherwise."""
LEAST_SEGMENT = 512
"""Tokens below which the states between segments would cost more than they gain."""
PROGRAMS = {NARROW: 128, WIDTH: 128}
"""Heads of all batches for which rows are cut no more, by the width of keys and values on chip."""
LINE_HEADS = 16
"""Heads of a program that makes lines of decays."""


class Config(NamedTuple):
    """How a walk is compiled.

    Args:
        groups: groups of four warps.
        stages: chunks that are on their way or read.
    """

    groups: int
    stages: int


class Backward(NamedTuple):
    """How the gradients are compiled.

    Args:
        groups: groups of four warps.
        stages: chunks that are on their way or read in the walk of queries.
        back: the same in that of keys and values.
        slots: the same of the rows that the decays' gradient reads besides.
    """

    groups: int
    stages: int
    back: int
    slots: int


class States(NamedTuple):
    """How walks of states are compiled.

    Args:
        tile: columns of the values of a program.
        groups: groups of four warps.
        stages: chunks that are on their way or read.
    """

    tile: int
    groups: int
    stages: int


FORWARD = {NARROW: Config(1, 4), WIDTH: Config(2, 3)}
SHARED = Config(2, 3)
BACKWARD = {NARROW: Backward(1, 3, 2, 2), WIDTH: Backward(2, 3, 2, 1)}
"""By the width of keys and values on chip; heads that share keys apart."""
SUMS = {NARROW: States(64, 1, 4), WIDTH: States(128, 2, 3)}
"""Of the sums over segments, by the same width."""
LATE = False
SORTED = False
KEPT = States(64, 2, 3)
"""Of the states between chunks."""


def suits(inputs: Inputs) -> bool:
    """Whether both passes of these inputs are those of Hopper: what is known of fake tensors too.

    Narrow heads without a scalar gate only where the plain walks would cut their rows.
    """
    if not _fits(inputs) or inputs.k.shape[2] != inputs.v.shape[2]:
        return False
    least, most = sorted((inputs.k.shape[3], inputs.v.shape[3]))
    faster = (inputs.log_decay is not None and inputs.log_decay.ndim == 3) or n_segments(inputs.k, inputs.v) > 1
    return least > NARROW or (most <= NARROW and faster and inputs.v.shape[1] >= LONG)


def suits_forward(inputs: Inputs) -> bool:
    """Whether the forward pass is that of Hopper where the gradients are not: of narrow heads, and of those that share keys."""
    if not _fits(inputs):
        return False
    if inputs.k.shape[2] != inputs.v.shape[2]:
        return walk_grouped.suits(inputs.q, inputs.k, inputs.v, inputs.starts)
    narrow = max(inputs.k.shape[3], inputs.v.shape[3]) <= NARROW
    return narrow and inputs.v.shape[1] >= LONGER and n_segments(inputs.k, inputs.v) == 1


def _fits(inputs: Inputs) -> bool:
    """Whole rows of bf16 heads."""
    q, k, v, _, _, starts = inputs
    if starts is not None or not v.is_cuda or torch.cuda.get_device_capability(v.device)[0] != 9:
        return False
    return all(x.dtype == torch.bfloat16 and x.shape[3] % ALIGNED == 0 and x.shape[3] <= WIDTH for x in (q, k, v))


def share_out(inputs: Inputs) -> Pieces:
    """Whole rows, or segments of whole chunks of long rows of few heads."""
    from kernels.walks.walk_triton import SEGMENTS, WHOLE

    batch, length, heads, _ = inputs.v.shape
    programs = PROGRAMS[max(_width(inputs.k), _width(inputs.v))]
    number = max(1, min(programs // (batch * heads), length // LEAST_SEGMENT))
    span = -(-length // (number * CHUNK)) * CHUNK
    number = -(-length // span)
    return Pieces((WHOLE if number == 1 else SEGMENTS).value, number, span, None)


def entering_like(inputs: Inputs) -> Tensor:
    """Room for what `forward` keeps for `backward` of heads with keys of their own, in fp32.

    Lines of scalar decays [B * H, N * C], what segments add to the state [B, P, H, K, V] and their decays [B, P, H], as one row.
    """
    return inputs.v.new_empty(sum(_sizes(inputs)), dtype=torch.float32)


def _sizes(inputs: Inputs) -> tuple[int, int, int]:
    """How many numbers lines, sums and decays of segments are."""
    (batch, length, heads, v_dim), gate, pieces = inputs.v.shape, inputs.log_decay, share_out(inputs)
    lines = batch * heads * -(-length // CHUNK) * CHUNK if gate is not None and gate.ndim == 3 else 0
    decays = batch * pieces.number * heads if pieces.number > 1 else 0
    return lines, decays * inputs.k.shape[3] * v_dim, decays


def _aligned(x: Tensor) -> Tensor:
    """Rows as the tensor memory accelerator takes them."""
    fits = x.data_ptr() % 16 == 0 and x.stride(3) == 1 and all(s > 0 and s % ALIGNED == 0 for s in x.stride()[:3])
    return x if fits else x.clone(memory_format=torch.contiguous_format)


def _width(x: Tensor) -> int:
    """Of rows on chip."""
    return max(padded(x.shape[3]), NARROW)


def _make_lines(lines: Tensor, gate_BTH: Tensor) -> None:
    """Writes scalar log decays as the walks read them."""
    from kernels.walks.walk_lines_triton import lines_kernel

    batch, length, heads = gate_BTH.shape
    chunks = -(-length // CHUNK)
    lines_kernel[(batch * chunks * -(-heads // LINE_HEADS),)](
        gate_BTH.contiguous(), lines, length, heads, chunks, C=CHUNK, HEADS=LINE_HEADS, num_warps=4
    )


def _line_rows(lines: Tensor, rows: int, spare: Any) -> Any:
    """Describes lines of decays in blocks of a chunk, or anything."""
    if not lines.numel():
        return spare
    from triton.experimental.gluon.language import NVMMASharedLayout
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    lines = lines.view(rows, -1)
    return TensorDescriptor(lines, list(lines.shape), list(lines.stride()), [1, CHUNK], NVMMASharedLayout(0, 32, rank=2))


def _constants(inputs: Inputs, groups: int, pieces: Pieces) -> dict[str, Any]:
    """Compile-time arguments of both kernels."""
    return {
        "K": inputs.k.shape[3], "V": inputs.v.shape[3], "C": CHUNK, "GATE": _gate_kind(inputs.log_decay),
        "DOT": _triton_dtype(inputs.v.dtype), "GROUPS": groups, "num_warps": 4 * groups,
    }  # fmt: skip


def segment_sums(b: Tensor, c: Tensor, kept: tuple[Tensor, ...], inputs: Inputs, *, reverse: bool) -> None:
    """Writes what each segment adds to the state and its log2 decay, of aligned rows."""
    pieces, config = share_out(inputs), SUMS[max(_width(b), _width(c))]
    lines, *sums = kept
    if pieces.number > 1:
        _walk_states(b, c, c, lines, inputs, None, None, sums, pieces.number - 1, config, reverse=reverse, keep=False)


def states(b: Tensor, c: Tensor, inputs: Inputs, given: Tensor | None, last: Tensor | None, *, reverse: bool) -> Tensor:
    """States before the chunks, or the gradients of those behind them, [B, N, H, K, V] in 16 bit; `last` is written."""
    b, c = _aligned(b), _aligned(c)
    (batch, length, heads, v_dim), k_dim, pieces = c.shape, b.shape[3], share_out(inputs)
    lines, *sums = parts = entering_like(inputs).split(_sizes(inputs))
    if lines.numel():
        _make_lines(lines, gate_of(inputs.log_decay, c))
    segment_sums(b, c, parts, inputs, reverse=reverse)
    kept = c.new_empty(batch, -(-length // CHUNK), heads, k_dim, v_dim)
    _walk_states(b, c, kept, lines, inputs, given, last, sums, pieces.number, KEPT, reverse=reverse, keep=True)
    return kept


def _walk_states(
    b: Tensor, c: Tensor, kept: Tensor, lines: Tensor, inputs: Inputs, given: Tensor | None, last: Tensor | None,
    sums: list[Tensor], number: int, config: States, *, reverse: bool, keep: bool,
) -> None:  # fmt: skip
    """Walks states over so many segments of each head."""
    from kernels.walks import walk_hopper_states

    (batch, length, heads, v_dim), k_dim, pieces = c.shape, b.shape[3], share_out(inputs)
    wide_k, tile = _width(b), min(config.tile, _width(c))
    described = [_described(b, [1, CHUNK, 1, wide_k]), _described(c, [1, CHUNK, 1, tile])]
    described.append(_described(kept.flatten(0, 2), [1, wide_k, tile]) if keep else described[1])
    walk_hopper_states.states_kernel[(batch * number * heads * -(-v_dim // tile),)](
        *described, _line_rows(lines, batch * heads, described[0]), lines, gate_of(inputs.log_decay, c),
        c if given is None else given, c if last is None else last, *sums,
        length, heads, heads // b.shape[2], gate_every(inputs.log_decay, batch), pieces.number, pieces.length // CHUNK,
        K=k_dim, V=v_dim, BK=wide_k, BV=tile, GROUPS=config.groups, C=CHUNK, STAGES=config.stages,
        GATE=_gate_kind(inputs.log_decay), GIVEN=given is not None, KEEP=keep, LAST=last is not None,
        REVERSE=reverse, DOT=_triton_dtype(c.dtype), num_warps=4 * config.groups,
    )  # fmt: skip


def forward(inputs: Inputs, o: Tensor, *, return_state: bool) -> tuple[Tensor, Tensor, Tensor]:
    """See `kernels.walks.walk.forward`; `o` is written."""
    from kernels.walks import walk_hopper

    q, k, v = (_aligned(x) for x in (inputs.q, inputs.k, inputs.v))
    (batch, length, heads, v_dim), k_dim, state = v.shape, k.shape[3], inputs.state
    group, wide_k, wide_v = heads // k.shape[2], _width(k), _width(v)
    pieces, gate, last = share_out(inputs), gate_of(inputs.log_decay, v), _state_like(v, k_dim) if return_state else _nothing(v)
    config = SHARED if group > 1 else FORWARD[max(wide_k, wide_v)]
    constants = _constants(inputs, config.groups, pieces)
    kept = entering_like(inputs)
    lines, sums, decays = parts = kept.split(_sizes(inputs))
    if lines.numel():
        _make_lines(lines, gate)
    segment_sums(k, v, parts, inputs, reverse=False)
    described = [_described(x, [1, CHUNK, 1, width]) for x, width in ((q, wide_k), (k, wide_k), (v, wide_v), (o, wide_v))]
    states = described[3]
    if group > 1:
        kept = v.new_empty(batch, -(-length // CHUNK), heads, k_dim, v_dim)
        states = _described(kept.flatten(0, 2), [1, wide_k, wide_v])
    walk_hopper.forward_kernel[(batch * pieces.number * heads,)](
        *described, states, _line_rows(lines, batch * heads, described[0]), lines, gate,
        v if state is None else state.contiguous(), last, sums, decays,
        length, heads, group, gate_every(inputs.log_decay, batch), pieces.number, pieces.length // CHUNK,
        **constants, BK=wide_k, BV=wide_v, STAGES=config.stages, FIRST=state is not None, KEEP=group > 1, LAST=return_state,
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries and keys [B, T, H, K], and what sums to that of the cumulated decays, [3, B, H, T].

    See `kernels.walks.walk._walk_back`; `rows` are q, k, v and do.
    """
    from kernels.walks import walk_hopper_back

    q, k, v, do = (_aligned(x) for x in rows)
    (batch, length, heads, _), k_dim, state = v.shape, k.shape[3], inputs.state
    pieces, gate, width = share_out(inputs), gate_of(inputs.log_decay, v), max(_width(k), _width(v))
    config = BACKWARD[width]
    constants = _constants(inputs, config.groups, pieces)
    lines, *before = kept.split(_sizes(inputs))
    _, *behind = torch.empty_like(kept).split(_sizes(inputs))
    segment_sums(q, do, (lines, *behind), inputs, reverse=True)
    dq, dk = (v.new_empty(batch, length, heads, k_dim) for _ in range(2))
    parts = (batch, heads, 2 * config.groups + 4, -(-length // CHUNK) * CHUNK)
    rowsums = v.new_empty(parts if gate_grad else (0, 0, 0, 0), dtype=torch.float32).permute(2, 0, 1, 3)[..., :length]
    described = [_described(x, [1, CHUNK, 1, width]) for x in (q, k, v, do, dq, dk, dv)]
    walk_hopper_back.backward_kernel[(batch * pieces.number * heads * 2,)](
        *described, _line_rows(lines, batch * heads, described[0]), lines, gate,
        v if state is None else state.contiguous(), v if dlast is None else dlast, dfirst, *before, *behind, rowsums,
        length, heads, gate_every(inputs.log_decay, batch), pieces.number, pieces.length // CHUNK,
        **constants, W=width, STAGES=config.stages, BACK_STAGES=config.back, SLOTS=config.slots,
        FIRST=state is not None, DLAST=dlast is not None, GATE_GRAD=gate_grad, LATE=LATE, SORTED=SORTED,
    )  # fmt: skip
    return dq, dk, rowsums
