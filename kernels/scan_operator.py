"""The selective scan as a custom operator: fake, autograd and vmap rules around its Triton kernels.

Shape legend: B batch, T time, D channels, N state size, M members (each B / M sequences), S borders of tiles.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels._members import fold_members

TILE = 16
"""Tokens between two stored states."""


@torch.library.custom_op("mixer_bench::selective_scan", mutates_args=())
def selective_scan_operator(
    x_BTD: Tensor, dt_BTD: Tensor, rate_MDN: Tensor, b_BTN: Tensor, c_BTN: Tensor, start_BDN: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """`kernels.scan.selective_scan` for M members with rates of their own, their sequences one after the other.

    Returns:
        The outputs [B, T, D] in the dtype of x; in fp32 the final state [B, D, N], and the states at the borders of tiles
        [B, S, N, D], which backward starts from.
    """
    from kernels.scan_triton import forward

    return forward(x_BTD, dt_BTD, rate_MDN, b_BTN, c_BTN, start_BDN)


@torch.library.custom_op("mixer_bench::selective_scan_backward", mutates_args=())
def _backward_operator(
    dy_BTD: Tensor,
    dfinal_BDN: Tensor | None,
    x_BTD: Tensor,
    dt_BTD: Tensor,
    rate_MDN: Tensor,
    b_BTN: Tensor,
    c_BTN: Tensor,
    states_BSND: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, dt, rate, b, c and the initial state."""
    from kernels.scan_triton import backward

    return backward(dy_BTD, dfinal_BDN, x_BTD, dt_BTD, rate_MDN, b_BTN, c_BTN, states_BSND)


@selective_scan_operator.register_fake
def _(
    x_BTD: Tensor, dt_BTD: Tensor, rate_MDN: Tensor, b_BTN: Tensor, c_BTN: Tensor, start_BDN: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    batch, length, width = x_BTD.shape
    n_states, n_borders = rate_MDN.shape[-1], (length + TILE - 1) // TILE + 1
    final_BDN = x_BTD.new_empty(batch, width, n_states, dtype=torch.float32)
    return x_BTD.new_empty(x_BTD.shape), final_BDN, final_BDN.new_empty(batch, n_borders, n_states, width)


@_backward_operator.register_fake
def _(
    dy_BTD: Tensor,
    dfinal_BDN: Tensor | None,
    x_BTD: Tensor,
    dt_BTD: Tensor,
    rate_MDN: Tensor,
    b_BTN: Tensor,
    c_BTN: Tensor,
    states_BSND: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dx, ddt, drate, db, dc = (tensor.new_empty(tensor.shape) for tensor in (x_BTD, dt_BTD, rate_MDN, b_BTN, c_BTN))
    return dx, ddt, drate, db, dc, states_BSND.new_empty(x_BTD.shape[0], *rate_MDN.shape[1:])


def _save(ctx, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[2])
    *tensors, start_BDN = inputs
    ctx.start_dtype = None if start_BDN is None else start_BDN.dtype
    ctx.save_for_backward(*tensors, output[2])


def _differentiate(ctx, dy_BTD: Tensor | None, dfinal_BDN: Tensor | None, _dstates: None) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    dy_BTD = torch.zeros_like(tensors[0]) if dy_BTD is None else dy_BTD
    *gradients, dstart_BDN = _backward_operator(dy_BTD, dfinal_BDN, *tensors)
    return *gradients, None if ctx.start_dtype is None else dstart_BDN.to(ctx.start_dtype)


selective_scan_operator.register_autograd(_differentiate, setup_context=_save)


@selective_scan_operator.register_vmap
def _(info, in_dims: tuple[int | None, ...], *arguments: Tensor | None) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    members = info.batch_size
    folded = (
        None if tensor is None else fold_members(tensor, axis, members) for tensor, axis in zip(arguments, in_dims, strict=True)
    )
    return tuple(out.unflatten(0, (members, -1)) for out in selective_scan_operator(*folded)), (0, 0, 0)
