"""The long causal convolution of short sequences that lie channel by channel, as products with unrolled Toeplitz blocks.

Channels-first tensors are [channels, B, L], as a matrix product W x^T leaves them: time is innermost, a channel's sequences are
the columns that its filter's Toeplitz blocks multiply, and nothing is turned. Block f[t - s] of chunk s in chunk r is the one at
distance r - s. A program reads each chunk once and unrolls over them; see `kernels.convolutions.long_conv_triton` for longer ones.

Shape legend: M members, D channels, B sequences, N chunks of C tokens, L = N C, R distances with taps, S sequences of a program.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._entry import entry

CHUNK = 64
SEQUENCES, WARPS = 64, 4
GRADIENT_SEQUENCES, GRADIENT_WARPS, GRADIENT_STAGES, SPLITS = 64, 4, 1, 2
"""Sequences of a program, its warps; of the filter's gradient, and programs that share a channel's sequences."""


@entry(do_not_specialize=["chunks", "n_taps"])
def blocks_kernel(taps, blocks, chunks: tl.int32, n_taps: tl.int32, C: tl.constexpr):
    """Toeplitz blocks [rows, N, C, C] of filters [rows, K], at distances from 0. Grid: (rows * N,)."""
    row, m, i = tl.program_id(0) // chunks, tl.program_id(0) % chunks, tl.arange(0, C)
    lag = m * C + i[:, None] - i[None, :]
    block = tl.load(taps + row.to(tl.int64) * n_taps + lag, mask=(lag >= 0) & (lag < n_taps), other=0.0)
    at = blocks + tl.program_id(0).to(tl.int64) * C * C + i[:, None] * C + i[None, :]
    tl.store(at, block.to(blocks.dtype.element_ty))


@entry(do_not_specialize=["splits", "n_taps", "tokens"])
def diagonals_kernel(sums, dtaps, splits: tl.int32, n_taps: tl.int32, tokens: tl.int32, REACH: tl.constexpr, C: tl.constexpr):
    """Gradients of taps [rows, K] from sums [rows, splits, R, 2, C] over diagonals. Grid: (rows * blocks of C taps,)."""
    blocks = tl.cdiv(n_taps, C)
    row, m, i = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks, tl.arange(0, C)
    total = tl.zeros([C], tl.float32)
    for split in range(splits):
        own = sums + ((row * splits + split) * REACH + m) * 2 * C + i
        total += tl.load(own, mask=i < (REACH - m) * C, other=0.0)
        total += tl.load(own + 3 * C, mask=i < (REACH - 1 - m) * C, other=0.0)
    lag = m * C + i
    tl.store(dtaps + row * n_taps + lag, tl.where(lag < tokens, total, 0.0).to(dtaps.dtype.element_ty), mask=lag < n_taps)


@triton.jit
def blocks_of(blocks, C: tl.constexpr, REACH: tl.constexpr, BACK: tl.constexpr):
    """The blocks [N, C, C] of a filter at REACH distances; BACK transposes them."""
    i = tl.arange(0, C)
    found = ()
    for m in tl.static_range(REACH):
        found = found + (tl.load(blocks + m * C * C + (i[None, :] * C + i[:, None] if BACK else i[:, None] * C + i[None, :])),)
    return found


@triton.jit
def filtered(blocks, chunks, r: tl.constexpr, N: tl.constexpr, REACH: tl.constexpr, BACK: tl.constexpr):
    """Chunk r, [C, columns], of the convolution of N chunks; BACK runs backwards in time."""
    acc = tl.zeros(chunks[0].shape, tl.float32)
    for m in tl.static_range(REACH):
        if BACK and r + m < N:
            acc = tl.dot(blocks[m], chunks[r + m], acc)
        if not BACK and r >= m:
            acc = tl.dot(blocks[m], chunks[r - m], acc)
    return acc


@triton.jit
def add_outer(sums, late, early, N: tl.constexpr, REACH: tl.constexpr):
    """The sums at each distance m with late_(s + m) early_s^T added."""
    new = ()
    for m in tl.static_range(REACH):
        acc = sums[m]
        for s in tl.static_range(N - m):
            acc = tl.dot(late[s + m], tl.trans(early[s]), acc)
        new = new + (acc,)
    return new


@triton.jit
def store_diagonals(acc, out, C: tl.constexpr):
    """Sums over a block's diagonals: out [2, C] of the lags i and i - C."""
    i = tl.arange(0, C)
    # row i of the turned matrix holds the pair (i, j) in column (i - j) mod C
    turned = tl.gather(acc, (i[:, None] - i[None, :] + C) % C, 1)
    same = i[:, None] >= i[None, :]
    tl.store(out + i, tl.sum(tl.where(same, turned, 0.0), 0))
    tl.store(out + C + i, tl.sum(tl.where(same, 0.0, turned), 0))


@triton.jit
def start_of(channel, sequence, batch, L: tl.constexpr):
    """Where a channel's sequence begins."""
    return (channel.to(tl.int64) * batch + sequence) * L


@entry(do_not_specialize=["width", "batch"])
def channel_conv_kernel(
    x, bias, blocks, y, sums, width: tl.int32, batch: tl.int32,
    X_PARTS: tl.constexpr, X: tl.constexpr, Y_PARTS: tl.constexpr, Y: tl.constexpr, BACK: tl.constexpr,
    N: tl.constexpr, REACH: tl.constexpr, S: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Grid: (M * D * tiles of S sequences,). X and y are parts of [M, PARTS, D, B, L], blocks [M D, N, C, C].

    Forwards x has a bias [M, 3, D]; backwards sums [tiles, M, D] over a program's tokens are stored.
    """
    tiles = tl.cdiv(batch, S)
    row, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    member, channel = row // width, row % width
    i, sequence = tl.arange(0, C), tile * S + tl.arange(0, S)
    inside = (sequence < batch)[None, :]
    x_at = x + start_of((member * X_PARTS + X) * width + channel, sequence, batch, N * C)[None, :] + i[:, None]
    y_at = y + start_of((member * Y_PARTS + Y) * width + channel, sequence, batch, N * C)[None, :] + i[:, None]
    own_blocks = blocks_of(blocks + row.to(tl.int64) * N * C * C, C, REACH, BACK)
    own_bias = 0.0 if BACK else tl.load(bias + (member * X_PARTS + X) * width + channel).to(tl.float32)
    chunks = ()
    for s in tl.static_range(N):
        chunk = tl.load(x_at + s * C, mask=inside, other=0.0)
        if not BACK:
            chunk = (chunk.to(tl.float32) + own_bias).to(chunk.dtype)
        chunks = chunks + (chunk,)
    total = tl.zeros([S], tl.float32)
    for r in tl.static_range(N):
        acc = filtered(own_blocks, chunks, r, N, REACH, BACK)
        total += tl.sum(acc, 0)
        tl.store(y_at + r * C, acc.to(y.dtype.element_ty), mask=inside)
    if BACK:
        tl.store(sums + tile * (tl.num_programs(0) // tiles) + row, tl.sum(total, 0))


@entry(do_not_specialize=["width", "batch", "splits"])
def channel_taps_kernel(
    x, bias, dy, sums, width: tl.int32, batch: tl.int32, splits: tl.int32,
    X_PARTS: tl.constexpr, X: tl.constexpr, N: tl.constexpr, REACH: tl.constexpr, S: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Grid: (M * D * splits of the tiles,); sums [M D, splits, R, 2, C]."""
    row, split = tl.program_id(0) // splits, tl.program_id(0) % splits
    member, channel = row // width, row % width
    i = tl.arange(0, C)
    part = (member * X_PARTS + X) * width + channel
    own_bias = tl.load(bias + part).to(tl.float32)
    acc = ()
    for _ in tl.static_range(REACH):
        acc = acc + (tl.zeros([C, C], tl.float32),)
    for tile in range(split, tl.cdiv(batch, S), splits):
        sequence = tile * S + tl.arange(0, S)
        inside = (sequence < batch)[None, :]
        x_at = x + start_of(part, sequence, batch, N * C)[None, :] + i[:, None]
        dy_at = dy + start_of(row, sequence, batch, N * C)[None, :] + i[:, None]
        early, late = (), ()
        for s in tl.static_range(N):
            chunk = tl.load(x_at + s * C, mask=inside, other=0.0)
            early = early + ((chunk.to(tl.float32) + own_bias).to(chunk.dtype),)
            late = late + (tl.load(dy_at + s * C, mask=inside, other=0.0),)
        acc = add_outer(acc, late, early, N, REACH)
    sums += (row.to(tl.int64) * splits + split) * REACH * 2 * C
    for m in tl.static_range(REACH):
        store_diagonals(acc[m], sums + m * 2 * C, C)


def reach_of(n_taps: int, chunks: int) -> int:
    """Distances of blocks at which there is a tap: those of whole blocks, and one that it shares with the next."""
    return min(chunks, -(-(n_taps - 1) // CHUNK) + 1)


def toeplitz_blocks(taps: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """The blocks [rows, N, C, C] of filters [M, rows / M, K], in the dtype of the products."""
    taps, chunks = taps.flatten(0, 1).contiguous(), length // CHUNK
    blocks = taps.new_empty(len(taps), chunks, CHUNK, CHUNK, dtype=dtype)
    blocks_kernel[(len(taps) * chunks,)](taps, blocks, chunks, taps.shape[1], C=CHUNK, num_warps=WARPS)
    return blocks


def taps_gradient(sums: Tensor, tokens: int, taps: Tensor) -> Tensor:
    """Gradients of filters [M, rows / M, K] from sums [rows, splits, R, 2, C] over diagonals."""
    found = taps.new_empty(taps.shape)
    rows, splits, reach = sums.shape[:3]
    diagonals_kernel[(rows * triton.cdiv(taps.shape[2], CHUNK),)](
        sums, found, splits, taps.shape[2], tokens, REACH=reach, C=CHUNK, num_warps=1
    )
    return found


def shifted(qkv: Tensor, bias: Tensor, taps: Tensor, part: int) -> Tensor:
    """One of three parts of qkv [M, 3, D, B, L] with its bias [M, 3, D], through filters [M, D, K]: [M, D, B, L]."""
    members, _, width, batch, length = qkv.shape
    chunks = length // CHUNK
    y = qkv.new_empty(members, width, batch, length)
    channel_conv_kernel[(members * width * triton.cdiv(batch, SEQUENCES),)](
        qkv, bias, toeplitz_blocks(taps, length, qkv.dtype), y, bias, width, batch,
        X_PARTS=3, X=part, Y_PARTS=1, Y=0, BACK=False, N=chunks, REACH=reach_of(taps.shape[-1], chunks), S=SEQUENCES, C=CHUNK,
        num_warps=WARPS,
    )  # fmt: skip
    return y


def shifted_backward(
    dy: Tensor, qkv: Tensor, bias: Tensor, taps: Tensor, d_qkv: Tensor, part: int, tokens: int
) -> tuple[Tensor, Tensor]:
    """Writes the part's gradient into d_qkv; returns those of its bias [M, D] in fp32, and of the filters."""
    members, _, width, batch, length = qkv.shape
    chunks = length // CHUNK
    reach, tiles = reach_of(taps.shape[-1], chunks), triton.cdiv(batch, SEQUENCES)
    bias_sums = dy.new_empty(tiles, members, width, dtype=torch.float32)
    channel_conv_kernel[(members * width * tiles,)](
        dy, bias, toeplitz_blocks(taps, length, qkv.dtype), d_qkv, bias_sums, width, batch,
        X_PARTS=1, X=0, Y_PARTS=3, Y=part, BACK=True, N=chunks, REACH=reach, S=SEQUENCES, C=CHUNK, num_warps=WARPS,
    )  # fmt: skip
    splits = min(SPLITS, triton.cdiv(batch, GRADIENT_SEQUENCES))
    sums = dy.new_empty(members * width, splits, reach, 2, CHUNK, dtype=torch.float32)
    channel_taps_kernel[(members * width * splits,)](
        qkv, bias, dy, sums, width, batch, splits,
        X_PARTS=3, X=part, N=chunks, REACH=reach, S=GRADIENT_SEQUENCES, C=CHUNK,
        num_warps=GRADIENT_WARPS, num_stages=GRADIENT_STAGES,
    )  # fmt: skip
    return bias_sums.sum(0), taps_gradient(sums, tokens, taps)
