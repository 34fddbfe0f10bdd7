"""Loads of one chunk's rows. Addresses are a 64-bit start and 32-bit offsets, which halves the registers they take.

Shape legend: C tokens of a chunk.
"""

from __future__ import annotations

import triton
import triton.language as tl

# What differs from call to call is not specialised, so that a new batch, length or head count compiles nothing.
SIZES = [f"{tensor}_{axis}" for tensor in ("q", "k", "f", "gate", "v", "u", "do") for axis in "bth"]
SIZES += ["length", "batches", "heads", "segments", "per"]


@triton.jit
def hidden(i_C, length):
    """Tokens of a chunk for masks: where the compiler knows the zeros of an operand, ptxas 13.3 to 13.5 may use registers unset."""
    return i_C + tl.minimum(length, 0)


@triton.jit
def load_rows(start, stride, i_C, cols, left, WIDTH: tl.constexpr, DOT: tl.constexpr):
    """Rows i_C of a chunk, of which `left` exist, with WIDTH columns; zero beyond its edges."""
    mask = (i_C < left)[:, None] & (cols < WIDTH)[None, :]
    return tl.load(start + (i_C[:, None] * stride + cols[None, :]), mask=mask, other=0.0).to(DOT)


@triton.jit
def store_rows(start, stride, i_C, cols, left, x_CE, WIDTH: tl.constexpr):
    """The reverse of `load_rows`; nothing is written beyond the edges."""
    mask = (i_C < left)[:, None] & (cols < WIDTH)[None, :]
    tl.store(start + (i_C[:, None] * stride + cols[None, :]), x_CE.to(start.dtype.element_ty), mask=mask)


@triton.jit
def load_beta(start, stride, i_C, left):
    """Write strengths of a chunk; padding writes nothing."""
    return tl.load(start + i_C * stride, mask=i_C < left, other=0.0).to(tl.float32)
