"""What the selective scan's backward pass needs before and after its walk: rows turned so that time is last, and sums of parts.

Shape legend: B batch, T time (padded to whole tiles), N state size, S parts to add, O sums beside each other, R rows and C
columns of each.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._entry import entry

TOKENS, STATES = 64, 16
"""A tile of rows to turn."""
PARTS, ELEMENTS = 16, 256
"""Parts that are added at once, and elements of a sum that a program owns."""


@entry(do_not_specialize=("n_tokens", "row", "n_states"))
def turn_kernel(b, c, turned_b, turned_c, n_tokens: tl.int32, row: tl.int32, n_states: tl.int32, T: tl.constexpr, N: tl.constexpr):
    """b and c [B, T, N] as fp32 [B, N, row], zeros behind the last token. Grid: (B * tiles of states * tiles of tokens,)."""
    tiles, groups = tl.cdiv(row, T), tl.cdiv(n_states, N)
    t, rest = tl.program_id(0) % tiles * T + tl.arange(0, T), tl.program_id(0) // tiles
    n, sequence = rest % groups * N + tl.arange(0, N), (rest // groups).to(tl.int64)
    place = sequence * n_tokens * n_states + t[:, None] * n_states + n[None, :]
    inside = (t < n_tokens)[:, None] & (n < n_states)[None, :]
    target = sequence * n_states * row + t[:, None] + n[None, :] * row
    exists = (t < row)[:, None] & (n < n_states)[None, :]
    tl.store(turned_b + target, tl.load(b + place, mask=inside, other=0.0).to(tl.float32), mask=exists)
    tl.store(turned_c + target, tl.load(c + place, mask=inside, other=0.0).to(tl.float32), mask=exists)


@triton.jit
def _add(parts, out, n_parts, part_stride, r, c, rows, columns, row_stride, BS: tl.constexpr):
    """out [C, R] of parts [S, R, C]."""
    s = tl.arange(0, BS)
    place = r[:, None] * row_stride + c[None, :]
    inside = (r < rows)[:, None] & (c < columns)[None, :]
    total = tl.zeros(place.shape, tl.float32)
    for first in range(0, n_parts, BS):
        offsets = (first + s).to(tl.int64)[:, None, None] * part_stride + place[None, :, :]
        part = tl.load(parts + offsets, mask=(first + s < n_parts)[:, None, None] & inside[None, :, :], other=0.0)
        total += tl.sum(part.to(tl.float32), 0)
    tl.store(out + c[None, :] * rows + r[:, None], total.to(out.dtype.element_ty), mask=inside)


@entry(do_not_specialize=("n_parts", "part_stride", "outer_stride", "rows", "columns", "row_stride"))
def sum_kernel(
    first, second, first_out, second_out, n_parts: tl.int32, part_stride: tl.int64, outer_stride: tl.int64,
    rows: tl.int32, columns: tl.int32, row_stride: tl.int32, PAIR: tl.constexpr, BS: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Sums over parts, turned: [O, C, R] of [S, O, R, row_stride], one or two of a kind. Grid: (O * tiles of rows and columns,)."""
    across, down = tl.cdiv(columns, BC), tl.cdiv(rows, BR)
    c, rest = tl.program_id(0) % across * BC + tl.arange(0, BC), tl.program_id(0) // across
    r, outer = rest % down * BR + tl.arange(0, BR), (rest // down).to(tl.int64)
    skipped, written = outer * outer_stride, outer * columns * rows
    _add(first + skipped, first_out + written, n_parts, part_stride, r, c, rows, columns, row_stride, BS)
    if PAIR:
        _add(second + skipped, second_out + written, n_parts, part_stride, r, c, rows, columns, row_stride, BS)


def turned(b_BTN: Tensor, c_BTN: Tensor, tile: int) -> tuple[Tensor, Tensor]:
    """[B, N, T] in fp32, zeros up to a whole number of tiles: a thread reads one state element's tile of time."""
    batch, length, n_states = b_BTN.shape
    row = -(-length // tile) * tile
    outs = [x.new_empty(batch, n_states, row, dtype=torch.float32) for x in (b_BTN, c_BTN)]
    grid = batch * -(-n_states // STATES) * -(-row // TOKENS)
    turn_kernel[(grid,)](b_BTN.contiguous(), c_BTN.contiguous(), *outs, length, row, n_states, T=TOKENS, N=STATES)
    return outs[0], outs[1]


def add_parts(parts: tuple[Tensor, ...], outs: tuple[Tensor, ...], strides: tuple[int, int], n_parts: int) -> None:
    """Writes out [O, C, R] = the sum over s of parts[s * strides[0] + o * strides[1] + r * row + c], for one tensor or two of a shape.

    Args:
        parts: [..., R, row], rows dense, of which the first C columns count.
        outs: [O, C, R], dense.
        strides: elements between parts, and between the sums beside each other.
        n_parts: S.
    """
    outer, columns, rows = outs[0].shape
    down = min(16, triton.next_power_of_2(rows))
    across = ELEMENTS // down
    grid = outer * -(-rows // down) * -(-columns // across)
    sum_kernel[(grid,)](
        parts[0], parts[-1], outs[0], outs[-1], n_parts, *strides, rows, columns, parts[0].shape[-1],
        PAIR=len(parts) > 1, BS=PARTS, BR=down, BC=across, num_warps=4,
    )  # fmt: skip
