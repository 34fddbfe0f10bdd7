"""Reading a sequence for a few queries as a custom operator: fake, autograd and vmap rules around Triton kernels.

Shape legend: B batch, T time, D width, R rows (heads and positions).
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels._members import fold_members


@torch.library.custom_op("mixer_bench::read_rows", mutates_args=())
def read_rows_operator(
    q_BRD: Tensor, x_BTD: Tensor, place_BR: Tensor, taylor: bool, eps: float, window: int
) -> tuple[Tensor, Tensor]:
    """`kernels.rows.read_rows` with each row's position; eps < 0 stands for no division and window 0 for none.

    Returns:
        The sums [B, R, D] in the dtype of x, and in fp32 what the weights of each row need beside its scores, [B, R].
    """
    from kernels.between.rows_triton import forward

    with torch.cuda.device_of(x_BTD):  # Triton launches on the current device
        return forward(q_BRD, x_BTD, place_BR, taylor, eps, window)


@torch.library.custom_op("mixer_bench::read_rows_backward", mutates_args=())
def _backward_operator(
    dy_BRD: Tensor,
    q_BRD: Tensor,
    x_BTD: Tensor,
    place_BR: Tensor,
    y_BRD: Tensor,
    scale_BR: Tensor,
    taylor: bool,
    eps: float,
    window: int,
) -> tuple[Tensor, Tensor]:
    """Gradients of the queries and of x."""
    from kernels.between.rows_triton import backward

    with torch.cuda.device_of(x_BTD):  # Triton launches on the current device
        return backward(dy_BRD, q_BRD, x_BTD, place_BR, y_BRD, scale_BR, taylor, eps, window)


@read_rows_operator.register_fake
def _(q_BRD, x_BTD, place_BR, taylor, eps, window) -> tuple[Tensor, Tensor]:
    return x_BTD.new_empty(q_BRD.shape), q_BRD.new_empty(q_BRD.shape[:2], dtype=torch.float32)


@_backward_operator.register_fake
def _(dy_BRD, q_BRD, x_BTD, *rest) -> tuple[Tensor, Tensor]:
    return q_BRD.new_empty(q_BRD.shape), x_BTD.new_empty(x_BTD.shape)


def _save(ctx, inputs, output: tuple[Tensor, Tensor]) -> None:
    *tensors, taylor, eps, window = inputs
    ctx.flags = (taylor, eps, window)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, *output)


def _differentiate(ctx, dy_BRD: Tensor, _dscale) -> tuple[Tensor | None, ...]:
    return *_backward_operator(dy_BRD, *ctx.saved_tensors, *ctx.flags), None, None, None, None


read_rows_operator.register_autograd(_differentiate, setup_context=_save)


@read_rows_operator.register_vmap
def _(info, in_dims, *arguments) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    members = info.batch_size
    folded = (fold_members(t, axis, members) for t, axis in zip(arguments[:3], in_dims[:3], strict=True))
    return tuple(t.unflatten(0, (members, -1)) for t in read_rows_operator(*folded, *arguments[3:])), (0, 0)
