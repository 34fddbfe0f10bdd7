"""Time steps of heads, softplus(raw + bias), as an operator that a compiler does not look into.

A step is one number of a token and head and multiplies all its channels. A compiler that sees how it is made makes it again for
each of them, backward too: an exponential and a logarithm an element of [B, T, H, P], more than the pass's bytes take.

Shape legend: B batch, T time, H heads, M members (each B / M sequences).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels._arguments import check_arguments, check_axes
from kernels._members import fold_members


def time_steps(raw_BTH: Tensor, bias_H: Tensor) -> Tensor:
    """softplus(raw + bias), [B, T, H] in fp32 or better.

    Raises:
        ValueError: shapes, dtypes or devices do not match.
    """
    check_axes("raw", raw_BTH, "B T H")
    check_arguments(raw_BTH, {"bias": (bias_H, raw_BTH.shape[2:])}, first="raw")
    return time_steps_operator(raw_BTH, bias_H[None])


@torch.library.custom_op("mixer_bench::time_steps", mutates_args=())
def time_steps_operator(raw_BTH: Tensor, bias_MH: Tensor) -> Tensor:
    """`time_steps` for M members with biases of their own, their sequences one after the other."""
    return F.softplus(_biased(raw_BTH, bias_MH)).contiguous()


def _biased(raw_BTH: Tensor, bias_MH: Tensor) -> Tensor:
    wide = torch.promote_types(torch.promote_types(raw_BTH.dtype, bias_MH.dtype), torch.float32)
    return (raw_BTH.to(wide).unflatten(0, (bias_MH.shape[0], -1)) + bias_MH[:, None, None]).flatten(0, 1)


@time_steps_operator.register_fake
def _(raw_BTH: Tensor, bias_MH: Tensor) -> Tensor:
    wide = torch.promote_types(torch.promote_types(raw_BTH.dtype, bias_MH.dtype), torch.float32)
    return raw_BTH.new_empty(raw_BTH.shape, dtype=wide)


def _save(ctx, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx, dsteps_BTH: Tensor) -> tuple[Tensor, Tensor]:
    raw_BTH, bias_MH = ctx.saved_tensors
    draw_BTH = dsteps_BTH * torch.sigmoid(_biased(raw_BTH, bias_MH))
    dbias_MH = draw_BTH.unflatten(0, (bias_MH.shape[0], -1)).sum((1, 2))
    return draw_BTH.to(raw_BTH.dtype), dbias_MH.to(bias_MH.dtype)


time_steps_operator.register_autograd(_differentiate, setup_context=_save)


@time_steps_operator.register_vmap
def _(info, in_dims: tuple[int | None, ...], raw_BTH: Tensor, bias_MH: Tensor) -> tuple[Tensor, int]:
    raw, bias = (fold_members(x, axis, info.batch_size) for x, axis in zip((raw_BTH, bias_MH), in_dims, strict=True))
    return time_steps_operator(raw, bias).unflatten(0, (info.batch_size, -1)), 0
