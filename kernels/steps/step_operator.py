"""The decoding step as custom operators, one that returns a new state and one that writes over it: fake and vmap rules.

Shape legend: B batch, H heads of v and of the state, G heads of q and k, K key, V value width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels._members import fold_members

MAX_KEYS = 1024
STATE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@torch.library.custom_op("mixer_bench::recurrent_step", mutates_args=())
def step_operator(
    q_BGK: Tensor,
    k_BGK: Tensor,
    v_BHV: Tensor,
    log_decay: Tensor | None,
    beta_BH: Tensor | None,
    a_BHK: Tensor | None,
    b_BHK: Tensor | None,
    state_BHKV: Tensor,
) -> tuple[Tensor, Tensor]:
    """`kernels.step.recurrent_step`, its decays [B, H] or [B, H, K]: the output and a new state."""
    from kernels.steps.step_launch import step

    new_BHKV = state_BHKV.new_empty(state_BHKV.shape)
    with torch.cuda.device_of(v_BHV):  # Triton launches on the current device
        return step(q_BGK, k_BGK, v_BHV, log_decay, beta_BH, a_BHK, b_BHK, state_BHKV.contiguous(), new_BHKV), new_BHKV


@step_operator.register_fake
def _(
    q_BGK: Tensor,
    k_BGK: Tensor,
    v_BHV: Tensor,
    log_decay: Tensor | None,
    beta_BH: Tensor | None,
    a_BHK: Tensor | None,
    b_BHK: Tensor | None,
    state_BHKV: Tensor,
) -> tuple[Tensor, Tensor]:
    return v_BHV.new_empty(v_BHV.shape), state_BHKV.new_empty(state_BHKV.shape)


@torch.library.custom_op("mixer_bench::recurrent_step_", mutates_args=("state_BHKV",))
def step_in_place(
    q_BGK: Tensor,
    k_BGK: Tensor,
    v_BHV: Tensor,
    log_decay: Tensor | None,
    beta_BH: Tensor | None,
    a_BHK: Tensor | None,
    b_BHK: Tensor | None,
    state_BHKV: Tensor,
) -> Tensor:
    """The same on a contiguous state that is written over; returns the output."""
    from kernels.steps.step_launch import step

    with torch.cuda.device_of(v_BHV):
        return step(q_BGK, k_BGK, v_BHV, log_decay, beta_BH, a_BHK, b_BHK, state_BHKV, state_BHKV)


@step_in_place.register_fake
def _(
    q_BGK: Tensor,
    k_BGK: Tensor,
    v_BHV: Tensor,
    log_decay: Tensor | None,
    beta_BH: Tensor | None,
    a_BHK: Tensor | None,
    b_BHK: Tensor | None,
    state_BHKV: Tensor,
) -> Tensor:
    return v_BHV.new_empty(v_BHV.shape)


@step_operator.register_vmap
def _(info: Any, in_dims: tuple[int | None, ...], *tensors: Tensor | None) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    members = info.batch_size
    folded = (None if x is None else fold_members(x, axis, members) for x, axis in zip(tensors, in_dims, strict=True))
    o, state = step_operator(*folded)  # pyright: ignore[reportCallIssue]
    return (o.unflatten(0, (members, -1)), state.unflatten(0, (members, -1))), (0, 0)
