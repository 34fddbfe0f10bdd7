"""RWKV-7's tokens as pairs of tokens of the vector-gate delta rule, in one launch; see `kernels.dplr`.

Shape legend: B batch, T time, H heads, K key, V value width; rows are B T H, and pairs of them 2 B T H.
"""

from __future__ import annotations

import torch
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


def pairs(
    q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, a_BTHK: Tensor, b_BTHK: Tensor, log_decay_BTHK: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `kernels.dplr_op.pairs`; keys are rounded to `dtype`."""
    inputs = [x.contiguous() for x in (q_BTHK, k_BTHK, v_BTHV, a_BTHK, b_BTHK, log_decay_BTHK)]
    batch, length, heads, k_dim = k_BTHK.shape
    v_dim, rows, twice = v_BTHV.shape[3], batch * length * heads, (batch, 2 * length, heads)
    queries, values = q_BTHK.new_empty(*twice, k_dim), v_BTHV.new_empty(*twice, v_dim)
    keys, erase = (k_BTHK.new_empty(*twice, k_dim, dtype=dtype) for _ in range(2))
    decays, strength = log_decay_BTHK.new_empty(*twice, k_dim), v_BTHV.new_empty(twice, dtype=torch.float32)
    pairs_kernel[(triton.cdiv(rows, ROWS),)](
        *inputs, queries, keys, values, decays, erase, strength, rows, heads,
        K=k_dim, V=v_dim, BK=triton.next_power_of_2(k_dim), BV=triton.next_power_of_2(v_dim), ROWS=ROWS, num_warps=4,
    )  # fmt: skip
    return queries, keys, values, decays, erase, strength
