"""RWKV-7's tokens as pairs of tokens of the vector-gate delta rule, and the gradients back, in a launch each; see `kernels.dplr`.

Shape legend: B batch, T time, H heads, K key, V value width; rows are B T H, and pairs of them 2 B T H.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from kernels._entry import entry

ROWS = 16
"""Rows of a program."""


@triton.jit
def _copy(source, target, row_R, first_R, second_R, SLOT: tl.constexpr, SIGN: tl.constexpr, cols, inside, WIDTH: tl.constexpr):
    """A row into one token of its pair, zeros into the other."""
    x = SIGN * tl.load(source + row_R[:, None] * WIDTH + cols[None, :], mask=inside, other=0.0)
    x = x.to(target.dtype.element_ty)
    zero = tl.zeros_like(x)
    tl.store(target + first_R[:, None] * WIDTH + cols[None, :], x if SLOT == 0 else zero, mask=inside)
    tl.store(target + second_R[:, None] * WIDTH + cols[None, :], zero if SLOT == 0 else x, mask=inside)


@entry
def pairs_kernel(
    q, k, v, a, b, log_decay, queries, keys, values, decays, erase, strength, n_rows: tl.int64, heads: tl.int32,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Grid: (rows / ROWS,). The first token of a pair erases with -b, decays, writes under a; the second writes v and is read."""
    row_R = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    known_R = row_R < n_rows
    token_R, head_R = row_R // heads, row_R % heads
    first_R = 2 * token_R * heads + head_R
    second_R = first_R + heads
    key_K, value_V = tl.arange(0, BK), tl.arange(0, BV)
    inside_RK, inside_RV = known_R[:, None] & (key_K < K)[None, :], known_R[:, None] & (value_V < V)[None, :]
    _copy(q, queries, row_R, first_R, second_R, 1, 1, key_K, inside_RK, K)
    _copy(v, values, row_R, first_R, second_R, 1, 1, value_V, inside_RV, V)
    _copy(log_decay, decays, row_R, first_R, second_R, 0, 1, key_K, inside_RK, K)
    _copy(b, erase, row_R, first_R, second_R, 0, -1, key_K, inside_RK, K)
    place_RK = row_R[:, None] * K + key_K[None, :]
    a_RK, k_RK = tl.load(a + place_RK, mask=inside_RK, other=0.0), tl.load(k + place_RK, mask=inside_RK, other=0.0)
    tl.store(keys + first_R[:, None] * K + key_K[None, :], a_RK.to(keys.dtype.element_ty), mask=inside_RK)
    tl.store(keys + second_R[:, None] * K + key_K[None, :], k_RK.to(keys.dtype.element_ty), mask=inside_RK)
    one_R = tl.full([ROWS], 1.0, tl.float32)
    tl.store(strength + first_R, one_R, mask=known_R)
    tl.store(strength + second_R, one_R, mask=known_R)


@triton.jit
def _half(source, target, row_R, from_R, SIGN: tl.constexpr, cols, inside, WIDTH: tl.constexpr):
    """The row of one token of a pair."""
    x = tl.load(source + from_R[:, None] * WIDTH + cols[None, :], mask=inside, other=0.0)
    tl.store(target + row_R[:, None] * WIDTH + cols[None, :], SIGN * x, mask=inside)


@entry
def halves_kernel(
    queries, keys, values, decays, erase, q, k, v, a, b, log_decay, n_rows: tl.int64, heads: tl.int32,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Gradients of tokens from those of their pairs. Grid: (rows / ROWS,)."""
    row_R = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    known_R = row_R < n_rows
    first_R = 2 * (row_R // heads) * heads + row_R % heads
    second_R = first_R + heads
    key_K, value_V = tl.arange(0, BK), tl.arange(0, BV)
    inside_RK, inside_RV = known_R[:, None] & (key_K < K)[None, :], known_R[:, None] & (value_V < V)[None, :]
    _half(queries, q, row_R, second_R, 1, key_K, inside_RK, K)
    _half(keys, k, row_R, second_R, 1, key_K, inside_RK, K)
    _half(values, v, row_R, second_R, 1, value_V, inside_RV, V)
    _half(keys, a, row_R, first_R, 1, key_K, inside_RK, K)
    _half(erase, b, row_R, first_R, -1, key_K, inside_RK, K)
    _half(decays, log_decay, row_R, first_R, 1, key_K, inside_RK, K)


@entry
def spread_kernel(
    source, target, n_rows: tl.int64, heads: tl.int32, V: tl.constexpr, BV: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """Rows of tokens as those of the second token of each pair, zeros as the first's. Grid: (rows / ROWS,)."""
    row_R = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    first_R = 2 * (row_R // heads) * heads + row_R % heads
    value_V = tl.arange(0, BV)
    inside_RV = (row_R < n_rows)[:, None] & (value_V < V)[None, :]
    _copy(source, target, row_R, first_R, first_R + heads, 1, 1, value_V, inside_RV, V)


def spread(x_BTHV: Tensor) -> Tensor:
    """[B, 2 T, H, V]: zeros, then the row of a token, for each."""
    batch, length, heads, v_dim = x_BTHV.shape
    found, rows = x_BTHV.new_empty(batch, 2 * length, heads, v_dim), batch * length * heads
    spread_kernel[(triton.cdiv(rows, ROWS),)](
        x_BTHV.contiguous(), found, rows, heads, V=v_dim, BV=triton.next_power_of_2(v_dim), ROWS=ROWS, num_warps=4
    )
    return found


def pairs(inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...]) -> None:
    """Writes queries, keys, values, log decays, keys of the erasure and write strengths of 1, all dense, [B, 2 T, H, ...].

    Args:
        inputs: q, k, v, a, b and log decays of tokens, [B, T, H, ...].
        outputs: what is written.
    """
    batch, length, heads, k_dim = inputs[0].shape
    _launch(pairs_kernel, (*(x.contiguous() for x in inputs), *outputs), batch * length * heads, heads, k_dim, inputs[2].shape[3])


def halves(dqueries: Tensor, dkeys: Tensor, dvalues: Tensor, ddecays: Tensor, derase: Tensor) -> tuple[Tensor, ...]:
    """Gradients of q, k, v, a, b and log decays, [B, T, H, ...], from those of their pairs, which are dense."""
    batch, twice, heads, k_dim = dqueries.shape
    rows, v_dim = batch * twice // 2 * heads, dvalues.shape[3]
    found = tuple(x.new_empty(batch, twice // 2, heads, x.shape[3]) for x in (dqueries, dkeys, dvalues, dkeys, derase, ddecays))
    _launch(halves_kernel, (dqueries, dkeys, dvalues, ddecays, derase, *found), rows, heads, k_dim, v_dim)
    return found


def _launch(kernel: Any, tensors: tuple[Tensor, ...], rows: int, heads: int, k_dim: int, v_dim: int) -> None:
    kernel[(triton.cdiv(rows, ROWS),)](
        *tensors, rows, heads,
        K=k_dim, V=v_dim, BK=triton.next_power_of_2(k_dim), BV=triton.next_power_of_2(v_dim), ROWS=ROWS, num_warps=4,
    )  # fmt: skip
