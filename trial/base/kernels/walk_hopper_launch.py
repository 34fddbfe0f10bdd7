"""Launches the forward walk for Hopper where it is faster: whole rows of heads with keys of their own.

Shape legend: B batch, T time, H heads, K key, V value width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

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
"""The widest heads that fit on chip, and the widest for which a scalar gate makes it slower and short rows no faster."""
LONG = 512
"""Tokens of a row that is not short."""


class Config(NamedTuple):
    """How a walk is compiled; one program has a multiprocessor for itself.

    Args:
        groups: groups of four warps.
        stages: chunks that are on their way or read.
    """

    groups: int
    stages: int


FORWARD = {NARROW: Config(1, 4), WIDTH: Config(2, 3)}
"""By the width of keys and values on chip."""


def suits(inputs: Inputs) -> bool:
    """Whether the Hopper walk takes these inputs: what is known of fake tensors too."""
    q, k, v, log_decay, _, starts = inputs
    if starts is not None or not v.is_cuda or torch.cuda.get_device_capability(v.device)[0] != 9:
        return False
    if any(x.dtype != torch.bfloat16 or x.shape[3] % ALIGNED for x in (q, k, v)):
        return False
    if k.shape[2] != v.shape[2] or n_segments(k, v) > 1:
        return False
    least, most = sorted((k.shape[3], v.shape[3]))
    wide = least > NARROW and most <= WIDTH
    return wide or (most <= NARROW and (log_decay is None or log_decay.ndim == 2) and v.shape[1] >= LONG)


def _aligned(x: Tensor) -> Tensor:
    """Rows as the tensor memory accelerator takes them."""
    fits = x.data_ptr() % 16 == 0 and x.stride(3) == 1 and all(s > 0 and s % ALIGNED == 0 for s in x.stride()[:3])
    return x if fits else x.clone(memory_format=torch.contiguous_format)


def forward(inputs: Inputs, o: Tensor, *, return_state: bool) -> tuple[Tensor, Tensor, Tensor]:
    """See `kernels.walk.forward`; `o` is written."""
    from kernels import walk_hopper

    q, k, v = (_aligned(x) for x in (inputs.q, inputs.k, inputs.v))
    (batch, length, heads, v_dim), k_dim = v.shape, k.shape[3]
    width = max(padded(k_dim), padded(v_dim), NARROW)
    config, last = FORWARD[width], _state_like(v, k_dim) if return_state else _nothing(v)
    walk_hopper.forward_kernel[(batch * heads,)](
        *(_described(x, [1, CHUNK, 1, width]) for x in (q, k, v, o)), gate_of(inputs.log_decay, v),
        v if inputs.state is None else inputs.state.contiguous(), last, length, heads, gate_every(inputs.log_decay, batch),
        K=k_dim, V=v_dim, W=width, GROUPS=config.groups, C=CHUNK, STAGES=config.stages, GATE=_gate_kind(inputs.log_decay),
        FIRST=inputs.state is not None, LAST=return_state, DOT=_triton_dtype(v.dtype), num_warps=4 * config.groups,
    )  # fmt: skip
    return o, last, _nothing(v)
