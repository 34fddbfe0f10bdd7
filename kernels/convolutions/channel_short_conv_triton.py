"""The short causal depthwise convolution of what lies channel by channel, [channels, B, T]; a launch each way.

A program owns a run of one channel, over the ends of its sequences, so that taps and bias are numbers and not vectors; the tokens
before come from the cache. Bytes: forward reads x and writes y, backward reads x and dy and writes dx.

Shape legend: M members, D channels, B sequences, T time, K taps.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._entry import entry

RUN, WARPS = 2048, 4
"""Tokens of a program."""


@entry(do_not_specialize=["length"])
def forward_kernel(x, bias, weight, y, tokens, length: tl.int32, TAPS: tl.constexpr, RUN: tl.constexpr):
    """Grid: (M * D * runs of the B T tokens,). X and y [M, D, B, T], bias [M, D] is added to x, weight [M, D, K]."""
    runs = tl.cdiv(tokens, RUN)
    row, token = (tl.program_id(0) // runs).to(tl.int64), tl.program_id(0) % runs * RUN + tl.arange(0, RUN)
    time, there = token % length, token < tokens
    own_bias = tl.load(bias + row).to(tl.float32)
    total = tl.zeros([RUN], tl.float32)
    for back in tl.static_range(TAPS):
        seen = there & (time >= back)
        value = tl.load(x + row * tokens + token - back, mask=seen, other=0.0).to(tl.float32) + own_bias
        total += tl.where(seen, value, 0.0) * tl.load(weight + row * TAPS + TAPS - 1 - back).to(tl.float32)
    tl.store(y + row * tokens + token, total.to(y.dtype.element_ty), mask=there)


@entry(do_not_specialize=["length"])
def backward_kernel(dy, x, bias, weight, dx, sums, tokens, length: tl.int32, TAPS: tl.constexpr, RUN: tl.constexpr):
    """Grid as forward; sums [M, D, runs, K + 1]: shares of the gradients of taps and bias."""
    runs = tl.cdiv(tokens, RUN)
    row, token = (tl.program_id(0) // runs).to(tl.int64), tl.program_id(0) % runs * RUN + tl.arange(0, RUN)
    time, there = token % length, token < tokens
    own_bias = tl.load(bias + row).to(tl.float32)
    own_dy = tl.load(dy + row * tokens + token, mask=there, other=0.0).to(tl.float32)
    sums += tl.program_id(0).to(tl.int64) * (TAPS + 1)
    total = tl.zeros([RUN], tl.float32)
    for back in tl.static_range(TAPS):
        seen = there & (time >= back)
        value = tl.load(x + row * tokens + token - back, mask=seen, other=0.0).to(tl.float32) + own_bias
        tl.store(sums + TAPS - 1 - back, tl.sum(tl.where(seen, value, 0.0) * own_dy, 0))
        later = there & (time + back < length)
        later_dy = tl.load(dy + row * tokens + token + back, mask=later, other=0.0).to(tl.float32)
        total += later_dy * tl.load(weight + row * TAPS + TAPS - 1 - back).to(tl.float32)
    tl.store(sums + TAPS, tl.sum(total, 0))
    tl.store(dx + row * tokens + token, total.to(dx.dtype.element_ty), mask=there)


def forward(x_MDBT: Tensor, bias_MD: Tensor, weight_MDK: Tensor) -> Tensor:
    """See `kernels.convolutions.channel_short_conv_operator`."""
    members, width, batch, length = x_MDBT.shape
    x_MDBT, tokens = x_MDBT.contiguous(), batch * length
    y_MDBT = x_MDBT.new_empty(x_MDBT.shape)
    forward_kernel[(members * width * triton.cdiv(tokens, RUN),)](
        x_MDBT, bias_MD.contiguous(), weight_MDK.contiguous(), y_MDBT, tokens, length,
        TAPS=weight_MDK.shape[2], RUN=RUN, num_warps=WARPS,
    )  # fmt: skip
    return y_MDBT


def backward(dy_MDBT: Tensor, x_MDBT: Tensor, bias_MD: Tensor, weight_MDK: Tensor) -> tuple[Tensor, Tensor]:
    """See `kernels.convolutions.channel_short_conv_operator`."""
    members, width, batch, length = x_MDBT.shape
    x_MDBT, tokens, taps = x_MDBT.contiguous(), batch * length, weight_MDK.shape[2]
    runs = triton.cdiv(tokens, RUN)
    dx_MDBT = x_MDBT.new_empty(x_MDBT.shape)
    sums = dx_MDBT.new_empty(members, width, runs, taps + 1, dtype=torch.float32)
    backward_kernel[(members * width * runs,)](
        dy_MDBT.contiguous(), x_MDBT, bias_MD.contiguous(), weight_MDK.contiguous(), dx_MDBT, sums, tokens, length,
        TAPS=taps, RUN=RUN, num_warps=WARPS,
    )  # fmt: skip
    return dx_MDBT, sums.sum(2)
