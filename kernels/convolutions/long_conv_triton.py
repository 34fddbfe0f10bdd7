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
SIDE, TURN_WARPS = 64, 8
"""Rows and columns of a tile that is turned on chip, and warps that turn it."""


@entry(do_not_specialize=["x_b", "x_r", "rows", "columns", "row"])
def turn_kernel(
    x, out, x_b: tl.int64, x_r: tl.int64, rows: tl.int32, columns: tl.int32, row: tl.int32, SIDE: tl.constexpr,
):  # fmt: skip
    """X [B, rows, columns] as [B, columns, row], with zeros behind the last of the rows. Grid: (B * tiles of both sides,)."""
    across, down = tl.cdiv(columns, SIDE), tl.cdiv(row, SIDE)
    c, rest = tl.program_id(0) % across * SIDE + tl.arange(0, SIDE), tl.program_id(0) // across
    r, sequence = rest % down * SIDE + tl.arange(0, SIDE), (rest // down).to(tl.int64)
    there = (r < rows)[:, None] & (c < columns)[None, :]
    x_RC = tl.load(x + sequence * x_b + r[:, None] * x_r + c[None, :], mask=there, other=0.0)
    target = out + (sequence * columns + c)[None, :] * row + r[:, None]
    tl.store(target, x_RC, mask=(r < row)[:, None] & (c < columns)[None, :])


@entry(do_not_specialize=["batch", "width", "chunks", "reach"])
def toeplitz_kernel(
    x, taps, y, batch: tl.int32, width: tl.int32, chunks: tl.int32, reach: tl.int32,
    BACK: tl.constexpr, C: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Grid: (M * D * tiles of B * N columns,); x and y are [M B, D, L], taps [M, D, L]; BACK runs backwards in time.

    Taps reach over `reach` distances of blocks.
    """
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
    for m in range(0, reach):
        if BACK:
            lag, source, there = m * C + i[None, :] - i[:, None], first + m * C, inside & (chunk + m < chunks)
        else:
            lag, source, there = m * C + i[:, None] - i[None, :], first - m * C, inside & (chunk >= m)
        matrix = tl.load(own_taps + lag, mask=lag >= 0, other=0.0)
        seen = tl.load(x + source[None, :] + i[:, None], mask=there[None, :], other=0.0)
        acc = tl.dot(matrix, seen, acc)
    tl.store(y + first[None, :] + i[:, None], acc.to(y.dtype.element_ty), mask=inside[None, :])


@entry(do_not_specialize=["batch", "width", "chunks", "reach"])
def taps_gradient_kernel(
    x, dy, sums, batch: tl.int32, width: tl.int32, chunks: tl.int32, reach: tl.int32, C: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Grid: (M * D * R,), a distance m each; sums [M, D, R, 2, C] of the lags m C + i and (m - 1) C + i."""
    row, m = tl.program_id(0) // reach, tl.program_id(0) % reach
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
    out = sums + (row.to(tl.int64) * reach + m) * 2 * C
    tl.store(out + i, tl.sum(tl.where(same, turned, 0.0), 0))
    tl.store(out + C + i, tl.sum(tl.where(same, 0.0, turned), 0))


def forward(x_BTD: Tensor, taps_MDL: Tensor) -> Tensor:
    """Each member's sequences, one after the other, through its own filters; returns [B, T, D]."""
    length = x_BTD.shape[1]
    return _rows(_convolved(_columns(x_BTD), taps_MDL), length)


def backward(dy_BTD: Tensor, x_BTD: Tensor, taps_MDL: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the filters; the former is the convolution run backwards in time."""
    length = x_BTD.shape[1]
    x_BDL, dy_BDL = _columns(x_BTD), _columns(dy_BTD.to(x_BTD.dtype))
    dx_BTD = _rows(_convolved(dy_BDL, taps_MDL, back=True), length)
    members, width, n_taps = taps_MDL.shape
    chunks = x_BDL.shape[2] // CHUNK
    reach = _reach(n_taps, chunks)
    sums = x_BDL.new_empty(members, width, reach, 2, CHUNK, dtype=torch.float32)
    taps_gradient_kernel[(members * width * reach,)](
        x_BDL, dy_BDL, sums, len(x_BTD) // members, width, chunks, reach, C=CHUNK, COLUMNS=GRADIENT_COLUMNS, num_warps=WARPS
    )
    dtaps = sums[..., 0, :]
    dtaps[:, :, :-1] += sums[:, :, 1:, 1]
    dtaps = dtaps.flatten(2)[..., : min(length, n_taps)]
    return dx_BTD, F.pad(dtaps, (0, n_taps - dtaps.shape[2])).to(taps_MDL.dtype)


def _reach(n_taps: int, chunks: int) -> int:
    """Distances of blocks at which there is a tap: those of whole blocks, and one that it shares with the next."""
    return min(chunks, -(-(n_taps - 1) // CHUNK) + 1)


def _convolved(x_BDL: Tensor, taps_MDL: Tensor, *, back: bool = False) -> Tensor:
    members, width, n_taps = taps_MDL.shape
    batch, chunks = len(x_BDL) // members, x_BDL.shape[2] // CHUNK
    y_BDL = torch.empty_like(x_BDL)
    toeplitz_kernel[(members * width * triton.cdiv(batch * chunks, COLUMNS),)](
        x_BDL, _padded(taps_MDL, x_BDL.shape[2], x_BDL.dtype), y_BDL, batch, width, chunks, _reach(n_taps, chunks),
        BACK=back, C=CHUNK, COLUMNS=COLUMNS, num_warps=WARPS,
    )  # fmt: skip
    return y_BDL


def _columns(x_BTD: Tensor) -> Tensor:
    """[B, D, L]: tokens side by side, with zeros up to a whole chunk."""
    return _turned(x_BTD, x_BTD.shape[1] + -x_BTD.shape[1] % CHUNK)


def _rows(y_BDL: Tensor, length: int) -> Tensor:
    return _turned(y_BDL[..., :length], y_BDL.shape[1])


def _turned(x_BRC: Tensor, row: int) -> Tensor:
    """[B, C, row], the last two axes changed places; rows behind the last are zero."""
    x = x_BRC if x_BRC.stride(2) == 1 or x_BRC.shape[2] == 1 else x_BRC.contiguous()
    batch, rows, columns = x.shape
    out = x.new_empty(batch, columns, row)
    grid = batch * -(-columns // SIDE) * -(-row // SIDE)
    turn_kernel[(grid,)](x, out, x.stride(0), x.stride(1), rows, columns, row, SIDE=SIDE, num_warps=TURN_WARPS)
    return out


def _padded(taps_MDL: Tensor, row: int, dtype: torch.dtype) -> Tensor:
    """The taps that are read, with zeros up to a whole chunk, in the dtype of the products."""
    taps_MDL = taps_MDL[..., :row].to(dtype)
    return F.pad(taps_MDL, (0, row - taps_MDL.shape[2])).contiguous()
