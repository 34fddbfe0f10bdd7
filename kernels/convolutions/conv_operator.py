"""The short causal convolution and its step as custom operators: fake, autograd and vmap rules around Triton kernels.

Shape legend: B batch, T time, D channels, K taps, P = K - 1 remembered inputs, M members (each B / M sequences).
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels._members import fold_members
from kernels._operator import operator


@operator("mixer_bench::short_conv")
def short_conv_operator(x_BTD: Tensor, weight_MDK: Tensor, bias_MD: Tensor | None, silu: bool) -> Tensor:
    """`kernels.conv.short_conv` from zeros, for M members with taps of their own, their sequences one after the other.

    Returns:
        The outputs [B, T, D] in the dtype of x; products and sums are made in fp32.
    """
    from kernels.convolutions.conv_triton import forward

    with torch.cuda.device_of(x_BTD):  # Triton launches on the current device
        return forward(x_BTD, weight_MDK, bias_MD, silu)


@operator("mixer_bench::short_conv_backward")
def _backward_operator(
    dy_BTD: Tensor, beside_BTD: Tensor | None, x_BTD: Tensor, weight_MDK: Tensor, bias_MD: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, of the taps, and of the bias, empty where there is none.

    The outputs' gradient may be the sum of two tensors: `bench.two_terms` puts the second one into graphs.
    """
    from kernels.convolutions.conv_backward_triton import backward

    with torch.cuda.device_of(dy_BTD):  # Triton launches on the current device
        return backward(dy_BTD, x_BTD, weight_MDK, bias_MD, silu, beside=beside_BTD)


@torch.library.custom_op("mixer_bench::short_conv_backward_into", mutates_args=("rows_BTR",))
def _backward_into_operator(
    dy_BTD: Tensor,
    beside_BTD: Tensor | None,
    x_BTD: Tensor,
    weight_MDK: Tensor,
    bias_MD: Tensor | None,
    silu: bool,
    rows_BTR: Tensor,
) -> tuple[Tensor, Tensor]:
    """The same, with the gradient of x written to the first D numbers of wider rows; put into graphs by `bench.joined_rows`."""
    from kernels.convolutions.conv_backward_triton import backward

    out = rows_BTR[..., : x_BTD.shape[2]]
    with torch.cuda.device_of(dy_BTD):  # Triton launches on the current device
        return backward(dy_BTD, x_BTD, weight_MDK, bias_MD, silu, beside=beside_BTD, out=out)[1:]


def _like_weights(weight_MDK: Tensor, bias_MD: Tensor | None) -> tuple[Tensor, Tensor]:
    """What gradients of the taps and the bias look like."""
    return weight_MDK.new_empty(weight_MDK.shape), weight_MDK.new_empty(0) if bias_MD is None else bias_MD.new_empty(bias_MD.shape)


@_backward_into_operator.register_fake
def _(dy_BTD, beside_BTD, x_BTD, weight_MDK: Tensor, bias_MD: Tensor | None, silu, rows_BTR) -> tuple[Tensor, Tensor]:
    return _like_weights(weight_MDK, bias_MD)


@short_conv_operator.register_fake
def _(x_BTD: Tensor, weight_MDK: Tensor, bias_MD: Tensor | None, silu: bool) -> Tensor:
    return x_BTD.new_empty(x_BTD.shape)


@_backward_operator.register_fake
def _(
    dy_BTD: Tensor, beside_BTD: Tensor | None, x_BTD: Tensor, weight_MDK: Tensor, bias_MD: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return x_BTD.new_empty(x_BTD.shape), *_like_weights(weight_MDK, bias_MD)


def _save(ctx, inputs: tuple[Tensor, Tensor, Tensor | None, bool], output: Tensor) -> None:
    x_BTD, weight_MDK, bias_MD, ctx.silu = inputs
    ctx.save_for_backward(x_BTD, weight_MDK, bias_MD)


def _differentiate(ctx, dy_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
    x_BTD, weight_MDK, bias_MD = ctx.saved_tensors
    dx_BTD, dweight_MDK, dbias_MD = _backward_operator(dy_BTD, None, x_BTD, weight_MDK, bias_MD, ctx.silu)
    return dx_BTD, dweight_MDK, None if bias_MD is None else dbias_MD, None


short_conv_operator.register_autograd(_differentiate, setup_context=_save)


@short_conv_operator.register_sizes
def _(x_BTD: Tensor, weight_MDK: Tensor, bias_MD: Tensor | None, silu: bool) -> list[tuple[Tensor | bool | None, ...]]:
    """Whole runs and ragged ones."""
    row, width = x_BTD.stride(1), x_BTD.shape[2]
    sizes = ((64, 64), (1, 1))
    rows = [x_BTD.new_empty(*size, max(row, width))[..., :width].requires_grad_(x_BTD.requires_grad) for size in sizes]
    return [(x, weight_MDK[:1], None if bias_MD is None else bias_MD[:1], silu) for x in rows]


@short_conv_operator.register_vmap
def _(
    info, in_dims: tuple[int | None, ...], x_BTD: Tensor, weight_MDK: Tensor, bias_MD: Tensor | None, silu: bool
) -> tuple[Tensor, int]:
    members = info.batch_size
    x, weight, bias = (
        None if tensor is None else fold_members(tensor, axis, members)
        for tensor, axis in zip((x_BTD, weight_MDK, bias_MD), in_dims[:3], strict=True)
    )
    return short_conv_operator(x, weight, bias, silu).unflatten(0, (members, -1)), 0


@operator("mixer_bench::short_conv_step")
def short_conv_step_operator(
    x_BD: Tensor, tail_BPD: Tensor, weight_MDK: Tensor, bias_MD: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor]:
    """`kernels.conv.short_conv_step` for M members: the output [B, D] and the new tail [B, P, D]."""
    from kernels.convolutions.conv_triton import step

    with torch.cuda.device_of(x_BD):  # Triton launches on the current device
        return step(x_BD, tail_BPD, weight_MDK, bias_MD, silu)


@short_conv_step_operator.register_fake
def _(x_BD: Tensor, tail_BPD: Tensor, weight_MDK: Tensor, bias_MD: Tensor | None, silu: bool) -> tuple[Tensor, Tensor]:
    return x_BD.new_empty(x_BD.shape), tail_BPD.new_empty(tail_BPD.shape)


def _save_step(ctx, inputs: tuple[Tensor, Tensor, Tensor, Tensor | None, bool], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.silu = inputs
    ctx.save_for_backward(*tensors)


def _differentiate_step(ctx, dy_BD: Tensor, dtail_BPD: Tensor) -> tuple[Tensor | None, ...]:
    """Decoding is hardly ever differentiated, so this is plain torch: the window is a sequence of K tokens."""
    x_BD, tail_BPD, weight_MDK, bias_MD = ctx.saved_tensors
    window_BKD = torch.cat((tail_BPD.to(x_BD.dtype), x_BD[:, None]), dim=1)
    dy_BKD = torch.cat((torch.zeros_like(window_BKD[:, 1:]), dy_BD[:, None]), dim=1)
    dwindow_BKD, dweight_MDK, dbias_MD = _backward_operator(dy_BKD, None, window_BKD, weight_MDK, bias_MD, ctx.silu)
    dwindow_BKD = dwindow_BKD + torch.cat((torch.zeros_like(dy_BKD[:, :1]), dtail_BPD.to(x_BD.dtype)), dim=1)
    dbias_MD = None if bias_MD is None else dbias_MD
    return dwindow_BKD[:, -1], dwindow_BKD[:, :-1].to(tail_BPD.dtype), dweight_MDK, dbias_MD, None


short_conv_step_operator.register_autograd(_differentiate_step, setup_context=_save_step)


@short_conv_step_operator.register_vmap
def _(info, in_dims: tuple[int | None, ...], *arguments: Tensor | bool | None) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    members = info.batch_size
    folded = (
        fold_members(value, axis, members) if isinstance(value, Tensor) else value
        for value, axis in zip(arguments, in_dims, strict=True)
    )
    y, tail = short_conv_step_operator(*folded)
    return (y.unflatten(0, (members, -1)), tail.unflatten(0, (members, -1))), (0, 0)
