"""Causal convolutions along time: a short depthwise one with a carried tail, and a long one.

Shape legend: B batch, T time, D channels, K taps, P = K - 1 remembered inputs, L filter length.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels._arguments import check_arguments, check_axes
from kernels.backends import TWO
from kernels.convolutions.conv_operator import short_conv_operator, short_conv_step_operator
from kernels.convolutions.gated_long_conv_operator import gated_long_conv_operator
from kernels.convolutions.long_conv_operator import long_conv_operator
from kernels.dispatch import pick

MOST_TAPS = 4
"""Of the Triton form, whose threads keep as many inputs, gradients and sums in registers."""
LONGEST_TOEPLITZ = 2048
"""Tokens up to which T^2 multiply-adds on tensor cores take less time than an FFT's trips to memory."""
MOST_UNROLLED = 256
"""Tokens whose chunks a program of the gated form holds side by side."""


def short_conv(
    x_BTD: Tensor,
    weight_DK: Tensor,
    bias_D: Tensor | None = None,
    tail_BPD: Tensor | None = None,
    *,
    silu: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Causal depthwise convolution, y_t = bias + sum_j weight[:, j] x_{t-K+1+j}.

    The torch form is shifted multiply-adds, which are faster than `conv1d` at these sizes (few taps, narrow models), in
    particular backward.

    Args:
        x_BTD: input, [B, T, D].
        weight_DK: taps, [D, K]; the last one meets the current token.
        bias_D: [D] or None.
        tail_BPD: the K - 1 inputs before the segment, [B, K-1, D]; None means zeros.
        silu: whether to apply SiLU to the output.

    Returns:
        The output [B, T, D], and the tail after the segment if one was given, else None.

    Raises:
        ValueError: shapes, dtypes or devices do not match, or the sequence is empty.
    """
    check_axes("x", x_BTD, "B T D")
    _check(x_BTD, weight_DK, bias_D, tail_BPD)
    length, taps = x_BTD.shape[1], weight_DK.shape[1]
    if pick("short_conv", x_BTD, obstacle=_too_many(weight_DK), backends=TWO) == "triton":
        padded_BSD = x_BTD if tail_BPD is None else torch.cat((tail_BPD.to(x_BTD.dtype), x_BTD), dim=1)
        y_BSD = short_conv_operator(padded_BSD, weight_DK[None], None if bias_D is None else bias_D[None], silu)
        y_BTD = y_BSD[:, padded_BSD.shape[1] - length :]
    else:
        before_BPD = x_BTD.new_zeros(1, 1, 1).expand(x_BTD.shape[0], taps - 1, x_BTD.shape[2]) if tail_BPD is None else tail_BPD
        padded_BSD = torch.cat((before_BPD.to(x_BTD.dtype), x_BTD), dim=1)
        y_BTD = _ShortConv.apply(padded_BSD, weight_DK.t().to(x_BTD.dtype))
        if bias_D is not None:
            y_BTD = y_BTD + bias_D.to(x_BTD.dtype)
        y_BTD = F.silu(y_BTD) if silu else y_BTD
    return y_BTD, None if tail_BPD is None else padded_BSD[:, length:].to(tail_BPD.dtype)


def _too_many(weight_DK: Tensor) -> str | None:
    """What keeps a convolution from its Triton form."""
    taps = weight_DK.shape[1]
    return f"{taps} taps are more than {MOST_TAPS}" if taps > MOST_TAPS else None


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor | None) -> None:
    check_axes("weight", weight, "D K")
    width, taps = x.shape[-1], weight.shape[1]
    tail_shape = (x.shape[0], taps - 1, width)
    check_arguments(x, {"weight": (weight, (width, taps)), "bias": (bias, (width,)), "tail": (tail, tail_shape)})


class _ShortConv(torch.autograd.Function):
    """The sum over taps; its gradient is written out because autograd would pad each tap's share to full length."""

    generate_vmap_rule = True

    @staticmethod
    def forward(padded_BSD: Tensor, taps_KD: Tensor) -> Tensor:
        return _stencil(padded_BSD, taps_KD)

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, dy_BTD: Tensor) -> tuple[Tensor, Tensor]:
        padded_BSD, taps_KD = ctx.saved_tensors
        length, taps = dy_BTD.shape[1], taps_KD.shape[0]
        d_padded_BSD = _stencil(F.pad(dy_BTD, (0, 0, taps - 1, taps - 1)), taps_KD.flip(0))
        d_taps = [(dy_BTD * padded_BSD[:, j : j + length]).sum((0, 1)) for j in range(taps)]
        return d_padded_BSD, torch.stack(d_taps)


def _stencil(x_BSD: Tensor, taps_KD: Tensor) -> Tensor:
    """sum_j taps_j x_{t+j}, as long as the window fits."""
    length = x_BSD.shape[1] - taps_KD.shape[0] + 1
    y_BTD = x_BSD[:, :length] * taps_KD[0]
    for j in range(1, taps_KD.shape[0]):
        y_BTD = torch.addcmul(y_BTD, x_BSD[:, j : j + length], taps_KD[j])
    return y_BTD


def short_conv_step(
    x_BD: Tensor, weight_DK: Tensor, bias_D: Tensor | None, tail_BPD: Tensor, *, silu: bool = False
) -> tuple[Tensor, Tensor]:
    """One token of `short_conv`: the dot product of the last K inputs with the taps.

    Args:
        x_BD: input, [B, D].
        weight_DK: taps, [D, K].
        bias_D: [D] or None.
        tail_BPD: the K - 1 inputs before this token, [B, K-1, D].
        silu: whether to apply SiLU to the output.

    Returns:
        The output [B, D] and the new tail [B, K-1, D].

    Raises:
        ValueError: shapes, dtypes or devices do not match, or the sequence is empty.
    """
    check_axes("x", x_BD, "B D")
    _check(x_BD, weight_DK, bias_D, tail_BPD)
    if pick("short_conv_step", x_BD, obstacle=_too_many(weight_DK), backends=TWO) == "triton":
        return short_conv_step_operator(x_BD, tail_BPD, weight_DK[None], None if bias_D is None else bias_D[None], silu)
    window_BKD = torch.cat((tail_BPD.to(x_BD.dtype), x_BD[:, None]), dim=1)
    y_BD = (window_BKD * weight_DK.t().to(x_BD.dtype)).sum(1)
    if bias_D is not None:
        y_BD = y_BD + bias_D.to(x_BD.dtype)
    return F.silu(y_BD) if silu else y_BD, window_BKD[:, 1:].to(tail_BPD.dtype)


def long_conv(x_BTD: Tensor, filter_DL: Tensor) -> Tensor:
    """Causal convolution with a filter as long as the sequence, y_t = sum_{s<=t} filter[:, t-s] x_s.

    The torch form is an FFT in fp32 or better. The Triton form multiplies 16-bit inputs with Toeplitz matrices, see
    `kernels.convolutions.long_conv_triton`; the filter is rounded to 16 bit there, sums are in fp32.

    Args:
        x_BTD: input, [B, T, D].
        filter_DL: taps, newest first, [D, L]; taps beyond T are not read.

    Returns:
        The output, [B, T, D], in the dtype of `x_BTD`.

    Raises:
        ValueError: shapes, dtypes or devices do not match.
    """
    check_axes("x", x_BTD, "B T D")
    check_axes("filter", filter_DL, "D L")
    check_arguments(x_BTD, {"filter": (filter_DL, (x_BTD.shape[2], filter_DL.shape[1]))})
    if torch.is_autocast_enabled(x_BTD.device.type):
        with torch.autocast(x_BTD.device.type, enabled=False):
            return long_conv(x_BTD.to(torch.get_autocast_dtype(x_BTD.device.type)), filter_DL).to(x_BTD.dtype)
    length = x_BTD.shape[1]
    if pick("long_conv", x_BTD, obstacle=_wants_fft(length, x_BTD.dtype), tensor_cores=True, backends=TWO) == "triton":
        return long_conv_operator(x_BTD, filter_DL[None])
    return _by_fft(x_BTD, filter_DL[:, :length].t(), 1)


def _by_fft(x: Tensor, taps: Tensor, time: int) -> Tensor:
    """The convolution along axis `time`, whose place in the taps is the same from the end.

    Transforms get matrices of rows. Of tensors whose order in memory is not that of their axes a compiler takes the result's order
    for the usual one, without a word, and gradients of the filter were wrong (torch 2.13).
    """
    length, dtype = x.shape[time], torch.promote_types(x.dtype, torch.float32)
    size = 1 << (2 * length - 1).bit_length()  # >= 2T keeps the circular wrap out; a power of two is always fast
    with torch.autocast(x.device.type, enabled=False):
        rows = x.to(dtype).movedim(time, -1)
        x_F = torch.fft.rfft(rows.flatten(0, -2), n=size).unflatten(0, rows.shape[:-1])
        taps_F = torch.fft.rfft(taps.to(dtype).movedim(time - x.ndim, -1), n=size)
        y = torch.fft.irfft((x_F * taps_F).flatten(0, -2), n=size).unflatten(0, rows.shape[:-1])
    return y[..., :length].movedim(-1, time).to(x.dtype)


def _wants_fft(length: int, dtype: torch.dtype) -> str | None:
    """What keeps a long convolution from its Triton form."""
    if length > LONGEST_TOEPLITZ:
        return f"{length} tokens are more than {LONGEST_TOEPLITZ}"
    return None if dtype.itemsize == 2 else f"{dtype} is more exact by an FFT"


def gated_long_conv(qkv_EBT: Tensor, bias_E: Tensor, filter_HL: Tensor, shift_DK: Tensor) -> Tensor:
    """Long convolution of products, y_b = sum_a q_a (filter * (k_a v_b)) in each head, of tensors that lie channel by channel.

    Time is innermost, as in W x^T; channel i H + h is number i of head h. The Triton form makes products, convolution and sum in
    one launch, see `kernels.convolutions.gated_long_conv_triton`; the torch form is `long_conv` of the products.

    Args:
        qkv_EBT: queries, keys and values, each of D channels, [3 D, B, T].
        bias_E: added to them, [3 D].
        filter_HL: taps of each head, newest first, [H, L], where H divides D; taps beyond T are not read.
        shift_DK: a filter that keys pass through first, [D, K].

    Returns:
        [D, B, T] in the dtype of `qkv_EBT`.

    Raises:
        ValueError: shapes, dtypes or devices do not match.
    """
    check_axes("qkv", qkv_EBT, "E B T")
    check_axes("filter", filter_HL, "H L")
    check_axes("shift", shift_DK, "D K")
    width, heads = qkv_EBT.shape[0] // 3, filter_HL.shape[0]
    if qkv_EBT.shape[0] % (3 * heads):
        raise ValueError(f"qkv has {qkv_EBT.shape[0]} channels; a filter of {heads} heads needs a multiple of {3 * heads}")
    others = {
        "bias": (bias_E, (3 * width,)),
        "filter": (filter_HL, filter_HL.shape),
        "shift": (shift_DK, (width, shift_DK.shape[1])),
    }
    check_arguments(qkv_EBT, others, first="qkv")
    if (
        pick("gated_long_conv", qkv_EBT, obstacle=_not_unrolled(qkv_EBT, width // heads), tensor_cores=True, backends=TWO)
        == "triton"
    ):
        qkv, bias = qkv_EBT.unflatten(0, (3, width))[None], bias_E.view(1, 3, width)
        y, _ = gated_long_conv_operator(qkv, bias, filter_HL[None], shift_DK[None])
        return y.squeeze(0)  # the gradient of an index would be a copy into zeros
    q_DBT, k_DBT, v_DBT = (qkv_EBT + bias_E[:, None, None].to(qkv_EBT.dtype)).chunk(3)
    per_head = (a.unflatten(0, (-1, heads)) for a in (q_DBT, _channel_long_conv(k_DBT, shift_DK), v_DBT))
    q_IHBT, k_IHBT, v_JHBT = per_head
    y_IJHBT = _channel_long_conv(k_IHBT[:, None] * v_JHBT, filter_HL)
    return (q_IHBT[:, None] * y_IJHBT).sum(0).flatten(0, 1)


def _channel_long_conv(x: Tensor, filter_DL: Tensor) -> Tensor:
    """`long_conv` of [..., D, B, T]."""
    length = x.shape[-1]
    if pick("long_conv", x, obstacle=_wants_fft(length, x.dtype), tensor_cores=True, backends=TWO) == "triton":
        rows = x.movedim(-3, -1)
        return long_conv_operator(rows.flatten(0, -3), filter_DL[None]).view(rows.shape).movedim(-1, -3)
    return _by_fft(x, filter_DL[:, None, :length], x.ndim - 1)


def _not_unrolled(qkv_EBT: Tensor, head_width: int) -> str | None:
    """What keeps a gated long convolution from its Triton form."""
    if qkv_EBT.shape[2] > MOST_UNROLLED:
        return f"{qkv_EBT.shape[2]} tokens are more than {MOST_UNROLLED}"
    if head_width > 2:
        return f"heads of {head_width} channels are wider than 2"
    if qkv_EBT.shape[0] // 3 * qkv_EBT.shape[1] * MOST_UNROLLED >= 1 << 31:
        return f"{qkv_EBT.shape[1]} sequences of {qkv_EBT.shape[0]} channels are too many for 32-bit places"
    return None if qkv_EBT.dtype.itemsize == 2 else f"{qkv_EBT.dtype} is more exact by an FFT"
