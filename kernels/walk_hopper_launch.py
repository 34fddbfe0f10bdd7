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
from kernels.walk_pieces import n_segments

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
TRIAL = {"FACTORS": False, "CHECK": 0}


def suits(inputs: Inputs) -> bool:
    """Whether the Hopper walks take these inputs: what is known of fake tensors too."""
    q, k, v, _, _, starts = inputs
    if starts is not None or not v.is_cuda or torch.cuda.get_device_capability(v.device)[0] != 9:
        return False
    if any(x.dtype != torch.bfloat16 or x.shape[3] % ALIGNED for x in (q, k, v)):
        return False
    if k.shape[2] != v.shape[2] or n_segments(k, v) > 1:
        return False
    least, most = sorted((k.shape[3], v.shape[3]))
    return (least > NARROW and most <= WIDTH) or (most <= NARROW and v.shape[1] >= LONG)


def entering_like(inputs: Inputs) -> Tensor:
    """Room for what `forward` keeps for `backward`: lines of scalar decays, [B * H, N * C]."""
    (batch, length, heads, _), gate = inputs.v.shape, inputs.log_decay
    kept = (batch * heads, -(-length // CHUNK) * CHUNK) if gate is not None and gate.ndim == 3 else (0,)
    return inputs.v.new_empty(kept, dtype=torch.float32)


def _aligned(x: Tensor) -> Tensor:
    """Rows as the tensor memory accelerator takes them."""
    fits = x.data_ptr() % 16 == 0 and x.stride(3) == 1 and all(s > 0 and s % ALIGNED == 0 for s in x.stride()[:3])
    return x if fits else x.clone(memory_format=torch.contiguous_format)


def _lines(inputs: Inputs) -> Tensor:
    """The log decays as the walks read them."""
    from kernels.walk_lines_triton import lines_kernel

    lines, gate = entering_like(inputs), inputs.log_decay
    if gate is not None and gate.ndim == 3:
        batch, length, heads = gate.shape
        chunks = -(-length // CHUNK)
        lines_kernel[(batch * chunks * -(-heads // LINE_HEADS),)](
            gate.contiguous(), lines, length, heads, chunks, C=CHUNK, HEADS=LINE_HEADS, num_warps=4
        )
    return lines


def _lines_described(lines: Tensor, spare: Any) -> Any:
    """Lines of decays in blocks of a chunk, or anything."""
    if lines.ndim == 1:
        return spare
    from triton.experimental.gluon.language import NVMMASharedLayout
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    return TensorDescriptor(lines, list(lines.shape), list(lines.stride()), [1, CHUNK], NVMMASharedLayout(0, 32, rank=2))


def _constants(inputs: Inputs, configs: dict[int, Config]) -> dict[str, Any]:
    k_dim, v_dim = inputs.k.shape[3], inputs.v.shape[3]
    width = max(padded(k_dim), padded(v_dim), NARROW)
    config = configs[width]
    return {
        "K": k_dim, "V": v_dim, "W": width, "C": CHUNK, "GATE": _gate_kind(inputs.log_decay), "DOT": _triton_dtype(inputs.v.dtype),
        "GROUPS": config.groups, "STAGES": config.stages, "num_warps": 4 * config.groups, **TRIAL,
    }  # fmt: skip


def forward(inputs: Inputs, o: Tensor, *, return_state: bool) -> tuple[Tensor, Tensor, Tensor]:
    """See `kernels.walk.forward`; `o` is written, and the lines of scalar decays are kept."""
    from kernels import walk_hopper

    q, k, v = (_aligned(x) for x in (inputs.q, inputs.k, inputs.v))
    (batch, length, heads, _), k_dim = v.shape, k.shape[3]
    constants, lines = _constants(inputs, FORWARD), _lines(inputs)
    last = _state_like(v, k_dim) if return_state else _nothing(v)
    described = [_described(x, [1, CHUNK, 1, constants["W"]]) for x in (q, k, v, o)]
    walk_hopper.forward_kernel[(batch * heads,)](
        *described, _lines_described(lines, described[0]), lines, gate_of(inputs.log_decay, v),
        v if inputs.state is None else inputs.state.contiguous(), last, length, batch, heads, gate_every(inputs.log_decay, batch),
        **constants, FIRST=inputs.state is not None, LAST=return_state,
    )  # fmt: skip
    return o, last, lines


def backward(
    narrow: tuple[Tensor, ...],
    inputs: Inputs,
    lines: Tensor,
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

    q, k, v, do = (_aligned(x) for x in narrow)
    (batch, length, heads, _), k_dim, state = v.shape, k.shape[3], inputs.state
    constants = _constants(inputs, BACKWARD)
    dq, dk = (v.new_empty(batch, length, heads, k_dim) for _ in range(2))
    rowsums = v.new_empty((2, batch, heads, length) if gate_grad else (2, 0), dtype=torch.float32)
    described = [_described(x, [1, CHUNK, 1, constants["W"]]) for x in (q, k, v, do, dq, dk, dv)]
    walk_hopper.backward_kernel[(batch * heads * 3,)](
        *described, _lines_described(lines, described[0]), lines, gate_of(inputs.log_decay, v),
        v if state is None else state.contiguous(), v if dlast is None else dlast, dfirst, rowsums,
        length, batch, heads, gate_every(inputs.log_decay, batch),
        **constants, SLOTS=BACKWARD[constants["W"]].slots, FIRST=state is not None, DLAST=dlast is not None, GATE_GRAD=gate_grad,
    )  # fmt: skip
    return dq, dk, rowsums
