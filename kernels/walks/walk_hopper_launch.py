"""Launches the walks for Hopper where they are faster: bf16 heads up to 128 wide whose rows copies can take.

Shape legend: B batch, T time, H heads, N chunks of C tokens, K key, V value width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from kernels.delta_rule.delta_hopper_launch import ALIGNED, _described
from kernels.operands import _gate_kind, _nothing, _state_like, _triton_dtype, padded
from kernels.walks.walk_decays import gate_every, gate_of
from kernels.walks.walk_pieces import n_segments

if TYPE_CHECKING:
    from kernels.walks.walk import Inputs

CHUNK = 64
"""Tokens of a chunk, which are the rows of one product of a warp group."""
WIDTH, NARROW = 128, 64
"""The widest heads that fit on chip, and the widest of which short rows are no faster."""
LONG, LONGER = 512, 1024
"""Tokens of a row that is not short, under a scalar gate and otherwise."""
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


FORWARD = {NARROW: Config(1, 4), WIDTH: Config(2, 3)}
BACKWARD = {NARROW: Backward(1, 3, 2, 2), WIDTH: Backward(2, 3, 2, 1)}
"""By the width of keys and values on chip."""


def suits(inputs: Inputs) -> bool:
    """Whether both passes of these inputs are those of Hopper: what is known of fake tensors too."""
    if not _fits(inputs):
        return False
    scalar = inputs.log_decay is not None and inputs.log_decay.ndim == 3
    least, most = sorted((inputs.k.shape[3], inputs.v.shape[3]))
    return least > NARROW or (most <= NARROW and scalar and inputs.v.shape[1] >= LONG)


def suits_forward(inputs: Inputs) -> bool:
    """Whether the forward pass is that of Hopper: narrow heads without a scalar gate take it where the gradients do not."""
    return suits(inputs) or (_fits(inputs) and max(inputs.k.shape[3], inputs.v.shape[3]) <= NARROW and inputs.v.shape[1] >= LONGER)


def _fits(inputs: Inputs) -> bool:
    """Whole rows of bf16 heads with keys of their own."""
    q, k, v, _, _, starts = inputs
    if starts is not None or not v.is_cuda or torch.cuda.get_device_capability(v.device)[0] != 9:
        return False
    if k.shape[2] != v.shape[2] or n_segments(k, v) > 1:
        return False
    return all(x.dtype == torch.bfloat16 and x.shape[3] % ALIGNED == 0 and x.shape[3] <= WIDTH for x in (q, k, v))


def lines_like(inputs: Inputs) -> Tensor:
    """Room for what `forward` keeps for `backward`: lines of scalar decays, [B * H, N * C] in fp32."""
    (batch, length, heads, _), gate = inputs.v.shape, inputs.log_decay
    kept = (batch * heads, -(-length // CHUNK) * CHUNK) if gate is not None and gate.ndim == 3 else (0,)
    return inputs.v.new_empty(kept, dtype=torch.float32)


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


def _line_rows(lines: Tensor, spare: Any) -> Any:
    """Describes lines of decays in blocks of a chunk, or anything."""
    if not lines.numel():
        return spare
    from triton.experimental.gluon.language import NVMMASharedLayout
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    return TensorDescriptor(lines, list(lines.shape), list(lines.stride()), [1, CHUNK], NVMMASharedLayout(0, 32, rank=2))


def _constants(inputs: Inputs, groups: int) -> dict[str, Any]:
    """Compile-time arguments of both kernels."""
    return {
        "K": inputs.k.shape[3], "V": inputs.v.shape[3], "C": CHUNK, "GATE": _gate_kind(inputs.log_decay),
        "DOT": _triton_dtype(inputs.v.dtype), "GROUPS": groups, "num_warps": 4 * groups, "FIRST": inputs.state is not None,
    }  # fmt: skip


def forward(inputs: Inputs, o: Tensor, *, return_state: bool) -> tuple[Tensor, Tensor, Tensor]:
    """See `kernels.walks.walk.forward`; `o` is written, and the lines of scalar decays are kept."""
    from kernels.walks import walk_hopper

    q, k, v = (_aligned(x) for x in (inputs.q, inputs.k, inputs.v))
    (batch, length, heads, _), k_dim, wide_k, wide_v = v.shape, k.shape[3], _width(k), _width(v)
    gate, lines, config = gate_of(inputs.log_decay, v), lines_like(inputs), FORWARD[max(wide_k, wide_v)]
    if lines.numel():
        _make_lines(lines, gate)
    last = _state_like(v, k_dim) if return_state else _nothing(v)
    described = [_described(x, [1, CHUNK, 1, width]) for x, width in ((q, wide_k), (k, wide_k), (v, wide_v), (o, wide_v))]
    walk_hopper.forward_kernel[(batch * heads,)](
        *described, _line_rows(lines, described[0]), lines, gate,
        v if inputs.state is None else inputs.state.contiguous(), last, length, heads, gate_every(inputs.log_decay, batch),
        **_constants(inputs, config.groups), BK=wide_k, BV=wide_v, STAGES=config.stages, LAST=return_state,
    )  # fmt: skip
    return o, last, lines


def backward(
    rows: tuple[Tensor, ...],
    inputs: Inputs,
    lines: Tensor,
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
    gate, width = gate_of(inputs.log_decay, v), max(_width(k), _width(v))
    config = BACKWARD[width]
    dq, dk = (v.new_empty(batch, length, heads, k_dim) for _ in range(2))
    rowsums = v.new_empty((3, batch, heads, length) if gate_grad else 0, dtype=torch.float32)
    described = [_described(x, [1, CHUNK, 1, width]) for x in (q, k, v, do, dq, dk, dv)]
    walk_hopper_back.backward_kernel[(batch * heads * 2,)](
        *described, _line_rows(lines, described[0]), lines, gate,
        v if state is None else state.contiguous(), v if dlast is None else dlast, dfirst, rowsums,
        length, batch, heads, gate_every(inputs.log_decay, batch),
        **_constants(inputs, config.groups), W=width, STAGES=config.stages, BACK_STAGES=config.back, SLOTS=config.slots,
        DLAST=dlast is not None, GATE_GRAD=gate_grad,
    )  # fmt: skip
    return dq, dk, rowsums
