"""The gated long convolution as its kernels compute it: every rounding to 16 bits in its place, all else in fp64.

What is further from this than roundings that fall the other way is an error of a kernel, even in a sum that cancels, of which 16
bits may leave less than an oracle without roundings allows.

Shape legend: D = I H channels, I of a head, H heads, B sequences, T time, L taps.
"""

from __future__ import annotations

import torch
from torch import Tensor


def followed(leaves: dict[str, Tensor], weight: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """Output and gradients of `cases_channels.leaves_of`, as `differentiated` names them.

    `dtype` is what operands of products and stored tensors are rounded to; fp64 rounds nothing and gives the definition's.
    """

    def rounded(x: Tensor) -> Tensor:
        return x.to(dtype).double()

    qkv, bias, taps, shift = (leaf.detach().double().cpu() for leaf in leaves.values())
    dy = _per_head(weight.double().cpu(), len(taps))
    queries, keys, values = (qkv + bias[:, None, None]).chunk(3)
    keys = rounded(keys)
    shift_DTT, taps_HTT = (_toeplitz(rounded(filters), qkv.shape[-1]) for filters in (shift, taps))
    q, k, v = (_per_head(part, len(taps)) for part in (queries, rounded(keys @ shift_DTT.mT), values))

    products, gated = rounded(k[:, None] * v), rounded(q[:, None] * dy)
    convolved, d_products = products @ taps_HTT.mT, gated @ taps_HTT
    y, dq = (q[:, None] * convolved).sum(0), (dy * convolved).sum(1)
    dk, dv = rounded((v * d_products).sum(1)).flatten(0, 1), (k[:, None] * d_products).sum(0)

    dqkv = torch.cat((dq.flatten(0, 1), dk @ shift_DTT, dv.flatten(0, 1)))
    return {
        "y": rounded(y.flatten(0, 1)),
        "dqkv": rounded(dqkv),
        "dbias": dqkv.sum((1, 2)),
        "dfilter": _by_lag((gated.mT @ products).sum((0, 1)), taps.shape[1]),
        "dshift": _by_lag(dk.mT @ keys, shift.shape[1]),
    }


def _per_head(x_DBT: Tensor, heads: int) -> Tensor:
    """[I, H, B, T]."""
    return x_DBT.unflatten(0, (-1, heads))


def _toeplitz(taps_DL: Tensor, tokens: int) -> Tensor:
    """Matrices [D, T, T] whose product with a sequence is its convolution."""
    lag_TT = torch.arange(tokens)[:, None] - torch.arange(tokens)
    there = (lag_TT >= 0) & (lag_TT < taps_DL.shape[1])
    return taps_DL[:, lag_TT.clamp(0, taps_DL.shape[1] - 1)] * there


def _by_lag(pairs_DTT: Tensor, n_taps: int) -> Tensor:
    """Sums over diagonals, [D, L]; zero beyond the sequence."""
    sums_DL = pairs_DTT.new_zeros(len(pairs_DTT), n_taps)
    for lag in range(min(n_taps, pairs_DTT.shape[1])):
        sums_DL[:, lag] = pairs_DTT.diagonal(-lag, 1, 2).sum(-1)
    return sums_DL
