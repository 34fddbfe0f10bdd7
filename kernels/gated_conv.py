"""The gated convolution of BaseConv (Arora et al. 2023): y = conv(x) * (x W^T + b) + x, with a short depthwise filter.

In one piece because it is bound by bytes: apart, its factors and their gradients go through memory three times as often.

Shape legend: B batch, T time, D channels, K taps.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels._arguments import check_arguments, check_axes
from kernels.backends import TWO
from kernels.conv import MOST_TAPS, short_conv
from kernels.dispatch import pick


def gated_conv(x_BTD: Tensor, weight_DD: Tensor, bias_D: Tensor, taps_DK: Tensor, tap_bias_D: Tensor) -> Tensor:
    """y_t = x_t + (W x_t + b) (tap_bias + sum_j taps[:, j] x_{t-K+1+j}).

    Args:
        x_BTD: input, [B, T, D].
        weight_DD: W.
        bias_D: b.
        taps_DK: the filter; the last tap meets the current token.
        tap_bias_D: the filter's bias.

    Returns:
        [B, T, D], in the dtype of x.

    Raises:
        ValueError: shapes, dtypes or devices do not match, or the sequence is empty.
    """
    check_axes("x", x_BTD, "B T D")
    check_axes("taps", taps_DK, "D K")
    width, taps = x_BTD.shape[2], taps_DK.shape[1]
    vectors = {"bias": (bias_D, (width,)), "tap_bias": (tap_bias_D, (width,))}
    check_arguments(x_BTD, {"weight": (weight_DD, (width, width)), "taps": (taps_DK, (width, taps)), **vectors})
    obstacle = f"{taps} taps are more than {MOST_TAPS}" if taps > MOST_TAPS else None
    if pick("gated_conv", x_BTD, obstacle=obstacle, backends=TWO) == "triton":
        from kernels.convolutions.gated_conv_operator import gated_conv_operator, taps_first

        taps_1KD = taps_first(taps_DK[None])
        return gated_conv_operator(x_BTD, weight_DD.to(x_BTD.dtype)[None], bias_D[None], taps_1KD, tap_bias_D[None])[0]
    return torch.addcmul(
        x_BTD, short_conv(x_BTD, taps_DK, tap_bias_D)[0], F.linear(x_BTD, weight_DD.to(x_BTD.dtype), bias_D.to(x_BTD.dtype))
    )
