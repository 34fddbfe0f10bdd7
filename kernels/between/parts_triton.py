"""Sums of parts that programs left, turned on the way: a kernel's last step where it may not use atomics.

Parts are added in order, so repeats are equal to the bit.

Shape legend: S parts to add, O sums beside each other, R rows and C columns of each.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kernels._entry import entry

LARGE, MANY = (16, 256), (64, 64)
"""Parts that are added at once, and elements of the sum that a program owns: of sums that fill a device, and of small ones."""

DENSE, DENSE_AT_ONCE = 1024, 8
"""Where nothing is turned: elements of the sum that a program owns, eight a thread, and parts that are on their way at once."""


@triton.jit
def _add(parts, out, n_parts, part_stride, r, c, rows, columns, row_stride, BS: tl.constexpr):
    """Out [C, R] of parts [S, R, C]."""
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
    rows: tl.int32, columns: tl.int32, row_stride: tl.int32,
    PAIR: tl.constexpr, BS: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Sums over parts, turned: [O, C, R] of [S, O, R, row_stride], one or two of a kind. Grid: (O * tiles of rows and columns,)."""
    across, down = tl.cdiv(columns, BC), tl.cdiv(rows, BR)
    c, rest = tl.program_id(0) % across * BC + tl.arange(0, BC), tl.program_id(0) // across
    r, outer = rest % down * BR + tl.arange(0, BR), (rest // down).to(tl.int64)
    skipped, written = outer * outer_stride, outer * columns * rows
    _add(first + skipped, first_out + written, n_parts, part_stride, r, c, rows, columns, row_stride, BS)
    if PAIR:
        _add(second + skipped, second_out + written, n_parts, part_stride, r, c, rows, columns, row_stride, BS)


def add_parts(
    parts: tuple[Tensor, ...], outs: tuple[Tensor, ...], strides: tuple[int, int], n_parts: int, *, at_once: tuple[int, int] = LARGE
) -> None:
    """Writes out [O, C, R] = the sum over s of parts[s * strides[0] + o * strides[1] + r * row + c], for one tensor or two.

    Args:
        parts: [..., R, row], rows dense, of which the first C columns count.
        outs: [O, C, R], dense.
        strides: elements between parts, and between the sums beside each other.
        n_parts: S.
        at_once: parts that are added at once, and elements that a program owns.
    """
    outer, columns, rows = outs[0].shape
    down = min(16, triton.next_power_of_2(rows))
    across = at_once[1] // down
    grid = outer * -(-rows // down) * -(-columns // across)
    sum_kernel[(grid,)](
        parts[0], parts[-1], outs[0], outs[-1], n_parts, *strides, rows, columns, parts[0].shape[-1],
        PAIR=len(parts) > 1, BS=at_once[0], BR=down, BC=across, num_warps=4,
    )  # fmt: skip


@entry(do_not_specialize=("n_parts",))
def dense_sum_kernel(
    first, second, first_out, second_out, n_parts, columns,
    ROW: tl.constexpr, STRIDE: tl.constexpr, BC: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Sums over the parts [S, C] of one of two tensors, in rows of ROW that lie STRIDE apart. Grid: (2 * blocks of columns,)."""
    which, c = tl.program_id(0) % 2, tl.program_id(0) // 2 * BC + tl.arange(0, BC)
    s, inside = tl.arange(0, AT_ONCE), c < columns
    parts = first if which == 0 else second
    out = first_out if which == 0 else second_out
    total = tl.zeros([BC], tl.float32)
    for at in range(0, n_parts, AT_ONCE):
        place = (at + s).to(tl.int64)[:, None] * columns + c[None, :]
        part = tl.load(parts + place, mask=(at + s < n_parts)[:, None] & inside[None, :], other=0.0)
        total += tl.sum(part.to(tl.float32), 0)
    tl.store(out + (c // ROW * STRIDE + c % ROW), total.to(out.dtype.element_ty), mask=inside)


def add_dense_parts(parts: tuple[Tensor, Tensor], outs: tuple[Tensor, Tensor]) -> None:
    """Writes the sums over the first axis of two dense tensors of one shape and dtype, [S, ...], to two others, in one launch.

    These are dense too, or columns of wider rows.
    """
    columns, row, stride = outs[0].numel(), outs[0].shape[-1], outs[0].stride(-2)
    if row == stride:  # one kernel for dense rows of all widths
        row = stride = 1
    dense_sum_kernel[(2 * -(-columns // DENSE),)](
        *parts, *outs, parts[0].shape[0], columns, ROW=row, STRIDE=stride, BC=DENSE, AT_ONCE=DENSE_AT_ONCE, num_warps=4
    )
