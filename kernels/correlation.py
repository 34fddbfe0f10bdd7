"""Sums of products of two sequences at every distance, by FFT.

Shape legend: R rows, N and K lengths, L lags, F frequencies; the last axis 2 is (real, imaginary).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels._arguments import check_arguments, check_axes
from kernels.pairs import times


def correlation(a_RN: Tensor, b_RK: Tensor, lags: int) -> Tensor:
    """y_l = sum_n a_n b_{n + l} for the lags 0 <= l < `lags`, with zeros behind the end of b.

    In fp32 or better, also under autocast. Rows go through complex transforms, whose gradients are again one transform each: those
    of real transforms fill whole spectra with zeros and scale halves of them, in complex numbers, for which compilers have no code.

    Args:
        a_RN: [R, N].
        b_RK: [R, K].
        lags: how many are wanted.

    Returns:
        [R, lags].

    Raises:
        ValueError: shapes, dtypes or devices do not match, or no lag is wanted.
    """
    check_axes("a", a_RN, "R N")
    check_axes("b", b_RK, "R K")
    check_arguments(a_RN, {"b": (b_RK, (a_RN.shape[0], b_RK.shape[1]))}, first="a")
    if lags < 1:
        raise ValueError(f"lags={lags}: at least one is wanted")
    dtype = torch.promote_types(torch.promote_types(a_RN.dtype, b_RK.dtype), torch.float32)
    size = _fast_size(max(a_RN.shape[1] + lags - 1, b_RK.shape[1]))  # the circular wrap meets zeros only
    with torch.autocast(a_RN.device.type, enabled=False):
        rows = torch.cat([F.pad(x.to(dtype), (0, size - x.shape[1])) for x in (a_RN.flip(1), b_RK)])  # a convolution
        spectra = torch.view_as_real(torch.fft.fft(torch.view_as_complex(torch.stack((rows, torch.zeros_like(rows)), -1))))
        product_RF = torch.view_as_complex(times(*spectra.chunk(2)))
        # without the factor 1 / size, which would be a pass of its own
        whole_RF2 = torch.view_as_real(torch.fft.ifft(product_RF, norm="forward"))
    return whole_RF2[:, a_RN.shape[1] - 1 :][:, :lags, 0] / size


def _fast_size(least: int) -> int:
    """The smallest of 4, 5, 6 and 7 times powers of two that is not below, since FFTs have kernels for these."""
    return min(factor << (-(-least // factor) - 1).bit_length() for factor in (4, 5, 6, 7))
