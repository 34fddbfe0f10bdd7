"""The gate of `kernels.gated_norm` as an operator: a compiler sees through the forward pass, the backward pass is one kernel.

Shape legend: M members, N tokens of a member, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels._members import fold_members


@torch.library.triton_op("mixer_bench::gated_norm", mutates_args={})
def gated_norm_operator(x_MND: Tensor, gate_MND: Tensor, weight_MD: Tensor | None, eps: float) -> Tensor:
    """`kernels.gated_norm.gated_norm` for M members."""
    from kernels.gated_norm import gated

    return gated(x_MND, gate_MND, None if weight_MD is None else weight_MD[:, None], eps)


@torch.library.custom_op("mixer_bench::gated_norm_backward", mutates_args=())
def _backward_operator(
    dy_MND: Tensor, x_MND: Tensor, gate_MND: Tensor, weight_MD: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x and of the gate, and that of the weight, [M, D] in fp32 or without elements."""
    from kernels.between.gated_norm_triton import backward

    with torch.cuda.device_of(dy_MND):  # Triton launches on the current device
        return backward(dy_MND, x_MND, gate_MND, weight_MD, eps)


@torch.library.custom_op("mixer_bench::gated_norm_backward_beside", mutates_args=())
def _backward_beside_operator(
    dy_MND: Tensor, x_MND: Tensor, gate_MND: Tensor, weight_MD: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The same with the gate's gradient in the right half of rows of 2 D; put into graphs by `bench.joined_rows`."""
    from kernels.between.gated_norm_triton import backward

    members, n_rows, width = x_MND.shape
    rows = gate_MND.new_empty(members, n_rows, 2 * width)
    with torch.cuda.device_of(dy_MND):  # Triton launches on the current device
        dx_MND, _, dweight_MD = backward(dy_MND, x_MND, gate_MND, weight_MD, eps, out=rows[..., width:])
    return dx_MND, rows, dweight_MD


@_backward_beside_operator.register_fake
def _(dy_MND, x_MND, gate_MND, weight_MD, eps) -> tuple[Tensor, Tensor, Tensor]:
    members, n_rows, width = x_MND.shape
    dweight_MD = x_MND.new_empty(members, 0 if weight_MD is None else width, dtype=torch.float32)
    return x_MND.new_empty(x_MND.shape), gate_MND.new_empty(members, n_rows, 2 * width), dweight_MD


@_backward_operator.register_fake
def _(dy_MND, x_MND, gate_MND, weight_MD, eps) -> tuple[Tensor, Tensor, Tensor]:
    members, _, width = x_MND.shape
    dweight_MD = x_MND.new_empty(members, 0 if weight_MD is None else width, dtype=torch.float32)
    return x_MND.new_empty(x_MND.shape), gate_MND.new_empty(x_MND.shape), dweight_MD


def _save(ctx, inputs: tuple[Tensor, Tensor, Tensor | None, float], output: Tensor) -> None:
    x_MND, gate_MND, weight_MD, ctx.eps = inputs
    ctx.save_for_backward(x_MND, gate_MND, weight_MD)


def _differentiate(ctx, dy_MND: Tensor) -> tuple[Tensor | None, ...]:
    x_MND, gate_MND, weight_MD = ctx.saved_tensors
    dx_MND, dgate_MND, dweight_MD = _backward_operator(dy_MND, x_MND, gate_MND, weight_MD, ctx.eps)
    return dx_MND, dgate_MND, None if weight_MD is None else dweight_MD.to(weight_MD.dtype), None


gated_norm_operator.register_autograd(_differentiate, setup_context=_save)


@gated_norm_operator.register_vmap
def _(info, in_dims, x_MND: Tensor, gate_MND: Tensor, weight_MD: Tensor | None, eps: float) -> tuple[Tensor, int]:
    members = info.batch_size
    x, gate, weight = (
        None if tensor is None else fold_members(tensor, axis, members)
        for tensor, axis in zip((x_MND, gate_MND, weight_MD), in_dims[:3], strict=True)
    )
    return gated_norm_operator(x, gate, weight, eps).unflatten(0, (members, -1)), 0
