"""The long convolution of products, y_b = sum_a q_a (f * (k_a v_b)) head by head, in one launch each way and one for the filter.

Everything lies channel by channel with time innermost, [channels, B, L], as a matrix product W x^T leaves it: a channel's
sequences are the columns of a matrix that its filter's Toeplitz blocks multiply, and nothing is turned. A program owns some
sequences of a head. It makes the products k_a v_b of all pairs (a, b), side by side as columns, once for each chunk of C tokens;
block f[t - s] of chunk s in chunk r is the one at distance r - s, and what the sum over chunks leaves meets q in registers.
Chunks are unrolled, so this serves short sequences; others take `kernels.convolutions.long_conv_triton`.

Backward, with g_ab = q_a dy_b: dq_a = sum_b dy_b (f * k_a v_b), the gradient of k_a v_b is g_ab through the transposed blocks, and
the filter's is the sum of g (k v)^T over diagonals.

Bytes an element of [channels, B, L] in 16 bits: forward reads 6 and writes 2, backward reads 8 and writes 6, the filter's
gradient reads 8.

Shape legend: M members, I heads' width, H heads, D = I H, B sequences, N chunks of C tokens, L = N C, P = I I S columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from kernels._entry import entry
from kernels.convolutions.channel_conv_triton import (
    CHUNK,
    add_outer,
    blocks_of,
    filtered,
    shifted,
    shifted_backward,
    store_diagonals,
    taps_gradient,
    toeplitz_blocks,
)

QUERIES, KEYS, VALUES = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
"""Parts of qkv."""
COLUMNS, WARPS = 128, 4
BACK_COLUMNS, BACK_WARPS = 64, 4
GRADIENT_COLUMNS, GRADIENT_WARPS, GRADIENT_STAGES, SPLITS = 64, 4, 2, 2
"""Columns of a program and its warps: forward, backward, and of the filter's gradient, where programs share a head's sequences."""


@triton.jit
def _head(tensor, row, heads, size, part, PARTS: tl.constexpr, HEAD: tl.constexpr):
    """Where a head's first channel begins in a part of [M, PARTS, I, H, B, L]; size is that of B L."""
    return tensor + ((row // heads * PARTS + part) * HEAD * heads + row % heads).to(tl.int64) * size


@triton.jit
def _along(part, HEAD: tl.constexpr, AXIS: tl.constexpr):
    """Numbers of a head's channels, broadcast over [C, HEAD, HEAD, S] along axis 1 or 2."""
    if AXIS == 1:
        return part[None, :, None, None]
    else:
        return part[None, None, :, None]


@triton.jit
def _chunk(pointer, bias, place, inside):
    """A chunk of a head's channels, [C, HEAD, 1, S] or [C, 1, HEAD, S], in fp32 with their bias."""
    return tl.load(pointer + place, mask=inside, other=0.0).to(tl.float32) + bias


@triton.jit
def _bias(bias, row, heads, which, part, HEAD: tl.constexpr, AXIS: tl.constexpr):
    """The bias of a head's channels."""
    own = tl.load(bias + ((row // heads * 3 + which) * HEAD + part) * heads + row % heads).to(tl.float32)
    return _along(own, HEAD, AXIS)


@triton.jit
def _products(a, b, kind: tl.constexpr, HEAD: tl.constexpr, S: tl.constexpr):
    """The products of all pairs of channels as columns (i, j, sequence), [C, HEAD HEAD S]."""
    return tl.reshape((a * b).to(kind), (a.shape[0], HEAD * HEAD * S))


@triton.jit
def _sum_with(x, factor, AXIS: tl.constexpr, HEAD: tl.constexpr, S: tl.constexpr):
    """The sum over i (AXIS 1) or j (AXIS 2) of columns (i, j, sequence) with factors of that axis: [C, HEAD S]."""
    whole = tl.reshape(x, (x.shape[0], HEAD, HEAD, S)) * factor
    return tl.reshape(whole if HEAD == 1 else tl.sum(whole, AXIS), (x.shape[0], HEAD * S))


@entry(do_not_specialize=["heads", "batch"])
def forward_kernel(
    qkv, k, bias, blocks, y, heads: tl.int32, batch: tl.int32,
    N: tl.constexpr, HEAD: tl.constexpr, S: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Grid: (M * H * tiles of S sequences,). Qkv [M, 3 D, B, L]; k [M, K_PARTS D, B, L] is its part or a tensor of its own."""
    tiles = tl.cdiv(batch, S)
    row, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    size = batch * (N * C)
    kind: tl.constexpr = qkv.dtype.element_ty
    q_head, v_head = _head(qkv, row, heads, size, QUERIES, 3, HEAD), _head(qkv, row, heads, size, VALUES, 3, HEAD)
    k_head = _head(k, row, heads, size, 0, 1, HEAD)
    part = tl.arange(0, HEAD)
    q_bias, v_bias = _bias(bias, row, heads, QUERIES, part, HEAD, 1), _bias(bias, row, heads, VALUES, part, HEAD, 2)
    i, sequence = tl.arange(0, C), tile * S + tl.arange(0, S)
    inside = (sequence < batch)[None, None, None, :]
    place = (sequence * (N * C))[None, None, None, :] + i[:, None, None, None]
    at_a, at_b = place + _along(part, HEAD, 1) * heads * size, place + _along(part, HEAD, 2) * heads * size
    own_blocks = blocks_of(blocks + row.to(tl.int64) * N * C * C, C, N, False)
    products = ()
    for s in tl.static_range(N):
        k_chunk, v_chunk = _chunk(k_head, 0.0, at_a + s * C, inside), _chunk(v_head, v_bias, at_b + s * C, inside)
        products = products + (_products(k_chunk, v_chunk, kind, HEAD, S),)
    out, out_sequence = tl.arange(0, HEAD * S) // S, tile * S + tl.arange(0, HEAD * S) % S
    y_at = _head(y, row, heads, size, 0, 1, HEAD) + (out * heads * size + out_sequence * (N * C))[None, :] + i[:, None]
    for r in tl.static_range(N):
        q_chunk = _chunk(q_head, q_bias, at_a + r * C, inside)
        y_chunk = _sum_with(filtered(own_blocks, products, r, N, N, False), q_chunk, 1, HEAD, S)
        tl.store(y_at + r * C, y_chunk.to(y.dtype.element_ty), mask=(out_sequence < batch)[None, :])


@entry(do_not_specialize=["heads", "batch"])
def backward_kernel(
    qkv, k, bias, blocks, dy, d_qkv, dk, sums, heads: tl.int32, batch: tl.int32,
    N: tl.constexpr, HEAD: tl.constexpr, S: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Grid: (M * H * tiles,). D_qkv like qkv, dk like k; sums [tiles, M, 3 D] of the former over a program's tokens."""
    tiles = tl.cdiv(batch, S)
    row, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    size = batch * (N * C)
    kind: tl.constexpr = qkv.dtype.element_ty
    q_head, v_head = _head(qkv, row, heads, size, QUERIES, 3, HEAD), _head(qkv, row, heads, size, VALUES, 3, HEAD)
    k_head = _head(k, row, heads, size, 0, 1, HEAD)
    part = tl.arange(0, HEAD)
    q_bias, v_bias = _bias(bias, row, heads, QUERIES, part, HEAD, 1), _bias(bias, row, heads, VALUES, part, HEAD, 2)
    dy_head = _head(dy, row, heads, size, 0, 1, HEAD)
    i, sequence = tl.arange(0, C), tile * S + tl.arange(0, S)
    inside = (sequence < batch)[None, None, None, :]
    place = (sequence * (N * C))[None, None, None, :] + i[:, None, None, None]
    at_a, at_b = place + _along(part, HEAD, 1) * heads * size, place + _along(part, HEAD, 2) * heads * size
    out, out_sequence = tl.arange(0, HEAD * S) // S, tile * S + tl.arange(0, HEAD * S) % S
    out_place, there = (out * heads * size + out_sequence * (N * C))[None, :] + i[:, None], (out_sequence < batch)[None, :]
    dq_at = _head(d_qkv, row, heads, size, QUERIES, 3, HEAD) + out_place
    dk_at = _head(dk, row, heads, size, 0, 1, HEAD) + out_place
    dv_at = _head(d_qkv, row, heads, size, VALUES, 3, HEAD) + out_place
    own_blocks = blocks_of(blocks + row.to(tl.int64) * N * C * C, C, N, False)
    chunks = ()
    for s in tl.static_range(N):
        k_chunk, v_chunk = _chunk(k_head, 0.0, at_a + s * C, inside), _chunk(v_head, v_bias, at_b + s * C, inside)
        chunks = chunks + (_products(k_chunk, v_chunk, kind, HEAD, S),)
    dq_sum = tl.zeros([HEAD * S], tl.float32)
    for r in tl.static_range(N):
        dy_chunk = _chunk(dy_head, 0.0, at_b + r * C, inside)
        dq_chunk = _sum_with(filtered(own_blocks, chunks, r, N, N, False), dy_chunk, 2, HEAD, S)
        dq_sum += tl.sum(dq_chunk, 0)
        tl.store(dq_at + r * C, dq_chunk.to(kind), mask=there)
    own_blocks = blocks_of(blocks + row.to(tl.int64) * N * C * C, C, N, True)
    chunks = ()
    for r in tl.static_range(N):
        q_chunk, dy_chunk = _chunk(q_head, q_bias, at_a + r * C, inside), _chunk(dy_head, 0.0, at_b + r * C, inside)
        chunks = chunks + (_products(q_chunk, dy_chunk, kind, HEAD, S),)
    dv_sum = tl.zeros([HEAD * S], tl.float32)
    for s in tl.static_range(N):
        k_chunk, v_chunk = _chunk(k_head, 0.0, at_a + s * C, inside), _chunk(v_head, v_bias, at_b + s * C, inside)
        dp_chunk = filtered(own_blocks, chunks, s, N, N, True)
        dk_chunk, dv_chunk = _sum_with(dp_chunk, v_chunk, 2, HEAD, S), _sum_with(dp_chunk, k_chunk, 1, HEAD, S)
        dv_sum += tl.sum(dv_chunk, 0)
        tl.store(dk_at + s * C, dk_chunk.to(kind), mask=there)
        tl.store(dv_at + s * C, dv_chunk.to(kind), mask=there)
    sums += (
        (tile * (tl.num_programs(0) // tiles // heads) + row // heads).to(tl.int64) * 3 * HEAD * heads + part * heads + row % heads
    )
    tl.store(sums + QUERIES * HEAD * heads, tl.sum(tl.reshape(dq_sum, (HEAD, S)), 1))
    tl.store(sums + VALUES * HEAD * heads, tl.sum(tl.reshape(dv_sum, (HEAD, S)), 1))


@entry(do_not_specialize=["heads", "batch", "splits"])
def taps_kernel(
    qkv, k, bias, dy, sums, heads: tl.int32, batch: tl.int32, splits: tl.int32,
    N: tl.constexpr, HEAD: tl.constexpr, S: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Grid: (M * H * splits of the tiles,); sums [M H, splits, N, 2, C]."""
    row, split = tl.program_id(0) // splits, tl.program_id(0) % splits
    size = batch * (N * C)
    kind: tl.constexpr = qkv.dtype.element_ty
    q_head, v_head = _head(qkv, row, heads, size, QUERIES, 3, HEAD), _head(qkv, row, heads, size, VALUES, 3, HEAD)
    k_head = _head(k, row, heads, size, 0, 1, HEAD)
    part = tl.arange(0, HEAD)
    q_bias, v_bias = _bias(bias, row, heads, QUERIES, part, HEAD, 1), _bias(bias, row, heads, VALUES, part, HEAD, 2)
    dy_head = _head(dy, row, heads, size, 0, 1, HEAD)
    i = tl.arange(0, C)
    acc = ()
    for _ in tl.static_range(N):
        acc = acc + (tl.zeros([C, C], tl.float32),)
    for tile in range(split, tl.cdiv(batch, S), splits):
        sequence = tile * S + tl.arange(0, S)
        inside = (sequence < batch)[None, None, None, :]
        place = (sequence * (N * C))[None, None, None, :] + i[:, None, None, None]
        at_a, at_b = place + _along(part, HEAD, 1) * heads * size, place + _along(part, HEAD, 2) * heads * size
        early, late = (), ()
        for s in tl.static_range(N):
            k_chunk, v_chunk = _chunk(k_head, 0.0, at_a + s * C, inside), _chunk(v_head, v_bias, at_b + s * C, inside)
            early = early + (_products(k_chunk, v_chunk, kind, HEAD, S),)
            q_chunk, dy_chunk = _chunk(q_head, q_bias, at_a + s * C, inside), _chunk(dy_head, 0.0, at_b + s * C, inside)
            late = late + (_products(q_chunk, dy_chunk, kind, HEAD, S),)
        acc = add_outer(acc, late, early, N, N)
    sums += (row.to(tl.int64) * splits + split) * N * 2 * C
    for m in tl.static_range(N):
        store_diagonals(acc[m], sums + m * 2 * C, C)


def forward(qkv: Tensor, bias: Tensor, taps_MHL: Tensor, shift_MDK: Tensor) -> tuple[Tensor, Tensor]:
    """See `kernels.convolutions.gated_long_conv_operator`."""
    tokens, heads = qkv.shape[-1], taps_MHL.shape[1]
    qkv, bias = _whole(qkv), bias.contiguous()
    members, _, _, batch, length = qkv.shape
    k = shifted(qkv, bias, shift_MDK, KEYS.value)
    y = torch.empty_like(k)
    blocks, sizes = toeplitz_blocks(taps_MHL, length, qkv.dtype), _sizes(qkv, heads, COLUMNS)
    grid = (members * heads * triton.cdiv(batch, sizes["S"]),)
    forward_kernel[grid](qkv, k, bias, blocks, y, heads, batch, num_warps=WARPS, **sizes)
    return y[..., :tokens], k


def backward(
    dy: Tensor, qkv: Tensor, k: Tensor, bias: Tensor, taps_MHL: Tensor, shift_MDK: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of qkv, in fp32 of its bias, of the filters, and of the shift's."""
    tokens = qkv.shape[-1]
    qkv, dy, bias = _whole(qkv), _whole(dy), bias.contiguous()
    d_qkv, dk, dbias = _backward_of_qkv(dy, qkv, k, bias, taps_MHL)
    dtaps = _backward_of_taps(dy, qkv, k, bias, taps_MHL, tokens)
    dbias[:, KEYS.value], dshift = shifted_backward(dk, qkv, bias, shift_MDK, d_qkv, KEYS.value, tokens)
    return d_qkv[..., :tokens], dbias, dtaps, dshift


def _backward_of_qkv(dy: Tensor, qkv: Tensor, k: Tensor, bias: Tensor, taps_MHL: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of qkv and of its bias, without those of keys, and of what the shift made of these."""
    members, _, width, batch, length = qkv.shape
    heads, d_qkv, dk = taps_MHL.shape[1], torch.empty_like(qkv), torch.empty_like(k)
    blocks, sizes = toeplitz_blocks(taps_MHL, length, qkv.dtype), _sizes(qkv, heads, BACK_COLUMNS)
    tiles = triton.cdiv(batch, sizes["S"])
    sums = qkv.new_empty(tiles, members, 3, width, dtype=torch.float32)
    grid = (members * heads * tiles,)
    backward_kernel[grid](qkv, k, bias, blocks, dy, d_qkv, dk, sums, heads, batch, num_warps=BACK_WARPS, **sizes)
    return d_qkv, dk, sums.sum(0)


def _backward_of_taps(dy: Tensor, qkv: Tensor, k: Tensor, bias: Tensor, taps_MHL: Tensor, tokens: int) -> Tensor:
    members, heads, _ = taps_MHL.shape
    batch, sizes = qkv.shape[3], _sizes(qkv, heads, GRADIENT_COLUMNS)
    splits = min(SPLITS, triton.cdiv(batch, sizes["S"]))
    sums = qkv.new_empty(members * heads, splits, sizes["N"], 2, CHUNK, dtype=torch.float32)
    taps_kernel[(members * heads * splits,)](
        qkv, k, bias, dy, sums, heads, batch, splits, num_warps=GRADIENT_WARPS, num_stages=GRADIENT_STAGES, **sizes
    )
    return taps_gradient(sums, tokens, taps_MHL)


def _whole(x: Tensor) -> Tensor:
    """With zeros up to a whole chunk."""
    rest = -x.shape[-1] % CHUNK
    return (F.pad(x, (0, rest)) if rest else x).contiguous()  # padding by nothing is a copy


def _sizes(qkv: Tensor, heads: int, columns: int) -> dict[str, int]:
    """Constants of a kernel that has so many columns."""
    head = qkv.shape[2] // heads
    return {"N": qkv.shape[-1] // CHUNK, "HEAD": head, "S": columns // head**2, "C": CHUNK}
