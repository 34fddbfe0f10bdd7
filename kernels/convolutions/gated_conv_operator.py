"""The gated convolution as an operator: a compiler sees through the forward pass, the backward pass is one kernel and two products.

Shape legend: M members, B sequences of all members together, T time, D channels, K taps.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels._members import fold_members


@torch.library.custom_op("mixer_bench::taps_first", mutates_args=())
def taps_first(taps_MDK: Tensor) -> Tensor:
    """[M, K, D] in fp32.

    An operator, so that a compiler keeps it apart: reads that jump over taps would make it give up holding whole rows in
    registers, and write them to memory between the norms that it fuses with the convolution.
    """
    return taps_MDK.mT.to(torch.float32).clone(memory_format=torch.contiguous_format)


@taps_first.register_fake
def _(taps_MDK: Tensor) -> Tensor:
    members, width, taps = taps_MDK.shape
    return taps_MDK.new_empty(members, taps, width, dtype=torch.float32)


taps_first.register_autograd(lambda ctx, d_MKD: d_MKD.mT)


@taps_first.register_vmap
def _(info, in_dims: tuple[int], taps: Tensor) -> tuple[Tensor, int]:
    return taps_first(fold_members(taps, in_dims[0], info.batch_size)).unflatten(0, (info.batch_size, -1)), 0


@torch.library.triton_op("mixer_bench::gated_conv", mutates_args={})
def gated_conv_operator(
    x_BTD: Tensor, weight_MDD: Tensor, bias_MD: Tensor, taps_MKD: Tensor, tap_bias_MD: Tensor
) -> tuple[Tensor, Tensor]:
    """`kernels.gated_conv.gated_conv` for M members, their sequences one after the other; and W x.

    W is in the dtype of x.
    """
    length, taps = x_BTD.shape[1], taps_MKD.shape[1]
    wide = torch.promote_types(x_BTD.dtype, torch.float32)
    projected = (x_BTD.reshape(weight_MDD.shape[0], -1, x_BTD.shape[2]) @ weight_MDD.mT).view(x_BTD.shape)

    def of_members(p_MD: Tensor) -> Tensor:
        return p_MD.to(wide).repeat_interleave(x_BTD.shape[0] // p_MD.shape[0], 0)[:, None]

    filtered = of_members(tap_bias_MD)
    for back in range(taps):
        filtered = filtered + F.pad(x_BTD, (0, 0, back, 0))[:, :length] * of_members(taps_MKD[:, taps - 1 - back])
    return (x_BTD + filtered * (projected + of_members(bias_MD))).to(x_BTD.dtype), projected


@torch.library.custom_op("mixer_bench::gated_conv_backward", mutates_args=())
def _backward_operator(
    dy_BTD: Tensor, x_BTD: Tensor, projected_BTD: Tensor, weight_MDD: Tensor, bias_MD: Tensor, taps_MKD: Tensor, tap_bias_MD: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, in its dtype, and in fp32 of W, and of the taps, their bias and b, [M, K + 2, D]."""
    from kernels.convolutions.gated_conv_triton import backward

    with torch.cuda.device_of(dy_BTD):  # Triton launches on the current device
        return backward(dy_BTD, x_BTD, projected_BTD, weight_MDD, bias_MD, taps_MKD, tap_bias_MD)


@_backward_operator.register_fake
def _(dy_BTD, x_BTD, projected_BTD, weight_MDD, bias_MD, taps_MKD, tap_bias_MD) -> tuple[Tensor, Tensor, Tensor]:
    members, taps, width = taps_MKD.shape
    wide = {"dtype": torch.float32}
    return (
        x_BTD.new_empty(x_BTD.shape),
        x_BTD.new_empty(weight_MDD.shape, **wide),
        x_BTD.new_empty(members, taps + 2, width, **wide),
    )


def _save(ctx, inputs, output) -> None:
    x_BTD, *parameters = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x_BTD, output[1], *parameters)


def _differentiate(ctx, dy_BTD: Tensor, _dprojected) -> tuple[Tensor, ...]:
    x_BTD, projected_BTD, *parameters = ctx.saved_tensors
    dx_BTD, dweight_MDD, sums = _backward_operator(dy_BTD, x_BTD, projected_BTD, *parameters)
    found = (dweight_MDD, sums[:, -1], sums[:, :-2], sums[:, -2])
    return dx_BTD, *(gradient.to(p.dtype) for gradient, p in zip(found, parameters, strict=True))


gated_conv_operator.register_autograd(_differentiate, setup_context=_save)


@gated_conv_operator.register_vmap
def _(info, in_dims, *arguments) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    folded = (fold_members(t, axis, info.batch_size) for t, axis in zip(arguments, in_dims, strict=True))
    return tuple(t.unflatten(0, (info.batch_size, -1)) for t in gated_conv_operator(*folded)), (0, 0)
