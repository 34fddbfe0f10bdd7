"""The long causal convolution of short sequences as products with Toeplitz matrices, on tensor cores.

A channel's filter f makes a lower triangular matrix f[t - s]. Cut in blocks of C tokens, all blocks at distance m are one
C x C matrix T_m, so y_r = sum_m T_m x_(r - m) over the chunks r of all sequences at once: products of C x C with C x (chunks
and sequences). T squared multiply-adds a channel and sequence, which an FFT saves, but an FFT moves fp32 complex numbers
through memory several times, and tensor cores are idle meanwhile.

The gradient of the filter is the sum of dy x^T over the diagonals of the same blocks.

Shape legend: M members, B sequences of a member, D channels, N chunks of C tokens, L = N C.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from kernels._entry import entry

CHUNK = 64
COLUMNS = 256
"""Columns of a program: chunks of sequences."""
GRADIENT_COLUMNS = 32
WARPS = 4


@entry(do_not_specialize=["batch", "width", "chunks"])
def toeplitz_kernel(
    x, taps, y, batch: tl.int32, width: tl.int32, chunks: tl.int32, C: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Grid: (M * D * tiles of B * N columns,); x and y are [M B, D, L], taps [M, D, L]."""
    tiles = (batch * chunks + COLUMNS - 1) // COLUMNS
    row, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    member, channel = row // width, row % width
    column = tile * COLUMNS + tl.arange(0, COLUMNS)
    sequence, chunk = column // chunks, column % chunks
    inside = sequence < batch
    first = (((member * batch + sequence) * width + channel).to(tl.int64) * chunks + chunk) * C
    own_taps = taps + row.to(tl.int64) * chunks * C
    i = tl.arange(0, C)
    acc = tl.zeros((C, COLUMNS), tl.float32)
    for m in range(0, chunks):
        lag = m * C + i[:, None] - i[None, :]
        matrix = tl.load(own_taps + lag, mask=lag >= 0, other=0.0)
        seen = tl.load(x + (first - m * C)[None, :] + i[:, None], mask=(inside & (chunk >= m))[None, :], other=0.0)
        acc = tl.dot(matrix, seen, acc)
    tl.store(y + first[None, :] + i[:, None], acc.to(y.dtype.element_ty), mask=inside[None, :])


@entry(do_not_specialize=["batch", "width", "chunks"])
def taps_gradient_kernel(
    x, dy, sums, batch: tl.int32, width: tl.int32, chunks: tl.int32, C: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Grid: (M * D * N,), a distance m each; sums [M, D, N, 2, C] of the lags m C + i and (m - 1) C + i."""
    row, m = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    member, channel = row // width, row % width
    i = tl.arange(0, C)
    acc = tl.zeros((C, C), tl.float32)
    for start in range(0, batch * (chunks - m), COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        sequence, chunk = column // (chunks - m), column % (chunks - m)
        first = (((member * batch + sequence) * width + channel).to(tl.int64) * chunks + chunk) * C
        inside = (sequence < batch)[None, :]
        early = tl.load(x + first[None, :] + i[:, None], mask=inside, other=0.0)
        late = tl.load(dy + (first + m * C)[None, :] + i[:, None], mask=inside, other=0.0)
        acc = tl.dot(late, tl.trans(early), acc)
    # row i of the turned matrix holds the pair (i, j) in column (i - j) mod C
    turned = tl.gather(acc, (i[:, None] - i[None, :] + C) % C, 1)
    same = i[:, None] >= i[None, :]
    out = sums + (row.to(tl.int64) * chunks + m) * 2 * C
    tl.store(out + i, tl.sum(tl.where(same, turned, 0.0), 0))
    tl.store(out + C + i, tl.sum(tl.where(same, 0.0, turned), 0))


def forward(x_BTD: Tensor, taps_MDL: Tensor) -> Tensor:
    """Each member's sequences, one after the other, through its own filters; returns [B, T, D]."""
    length = x_BTD.shape[1]
    return _rows(_convolved(_columns(x_BTD), _padded(taps_MDL, length, x_BTD.dtype)), length)


def backward(dy_BTD: Tensor, x_BTD: Tensor, taps_MDL: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the filters; the former is the convolution run backwards in time."""
    length = x_BTD.shape[1]
    turned = _columns(dy_BTD.to(x_BTD.dtype).flip(1))
    dx_BTD = _rows(_convolved(turned, _padded(taps_MDL, length, x_BTD.dtype)), length).flip(1)
    x_BDL, dy_BDL = _columns(x_BTD), _columns(dy_BTD.to(x_BTD.dtype))
    members, width, n_taps = taps_MDL.shape
    chunks = x_BDL.shape[2] // CHUNK
    sums = x_BDL.new_empty(members, width, chunks, 2, CHUNK, dtype=torch.float32)
    taps_gradient_kernel[(members * width * chunks,)](
        x_BDL, dy_BDL, sums, len(x_BTD) // members, width, chunks, C=CHUNK, COLUMNS=GRADIENT_COLUMNS, num_warps=WARPS
    )
    dtaps = sums[..., 0, :]
    dtaps[:, :, :-1] += sums[:, :, 1:, 1]
    dtaps = dtaps.flatten(2)[..., :length]
    return dx_BTD, F.pad(dtaps, (0, n_taps - dtaps.shape[2])).to(taps_MDL.dtype)


def _convolved(x_BDL: Tensor, taps_MDL: Tensor) -> Tensor:
    members, width, length = taps_MDL.shape
    batch, chunks = len(x_BDL) // members, length // CHUNK
    y_BDL = torch.empty_like(x_BDL)
    toeplitz_kernel[(members * width * triton.cdiv(batch * chunks, COLUMNS),)](
        x_BDL, taps_MDL, y_BDL, batch, width, chunks, C=CHUNK, COLUMNS=COLUMNS, num_warps=WARPS
    )
    return y_BDL


def _columns(x_BTD: Tensor) -> Tensor:
    """[B, D, L]: tokens side by side, with zeros up to a whole chunk."""
    missing = -x_BTD.shape[1] % CHUNK  # padding by nothing would be a copy
    return (F.pad(x_BTD.mT, (0, missing)) if missing else x_BTD.mT).contiguous()


def _rows(y_BDL: Tensor, length: int) -> Tensor:
    return y_BDL[..., :length].mT.contiguous()


def _padded(taps_MDL: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """The taps that are read, with zeros up to a whole chunk, in the dtype of the products."""
    taps_MDL = taps_MDL[..., :length].to(dtype)
    return F.pad(taps_MDL, (0, length + -length % CHUNK - taps_MDL.shape[2])).contiguous()
