"""Turns the rows of a selective scan's b and c so that time is last, which is how its backward pass reads them.

Shape legend: B batch, T time, N state size.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from kernels._entry import entry

TOKENS, STATES = 64, 16
"""A tile of rows to turn."""


@entry(do_not_specialize=("n_tokens", "row", "n_states"))
def turn_kernel(b, c, turned_b, turned_c, n_tokens: tl.int32, row: tl.int32, n_states: tl.int32, T: tl.constexpr, N: tl.constexpr):
    """B and c [B, T, N] as fp32 [B, N, row], zeros behind the last token. Grid: (B * tiles of states * tiles of tokens,)."""
    tiles, groups = tl.cdiv(row, T), tl.cdiv(n_states, N)
    t, rest = tl.program_id(0) % tiles * T + tl.arange(0, T), tl.program_id(0) // tiles
    n, sequence = rest % groups * N + tl.arange(0, N), (rest // groups).to(tl.int64)
    place = sequence * n_tokens * n_states + t[:, None] * n_states + n[None, :]
    inside = (t < n_tokens)[:, None] & (n < n_states)[None, :]
    target = sequence * n_states * row + t[:, None] + n[None, :] * row
    exists = (t < row)[:, None] & (n < n_states)[None, :]
    tl.store(turned_b + target, tl.load(b + place, mask=inside, other=0.0).to(tl.float32), mask=exists)
    tl.store(turned_c + target, tl.load(c + place, mask=inside, other=0.0).to(tl.float32), mask=exists)


def turned(b_BTN: Tensor, c_BTN: Tensor, tile: int) -> tuple[Tensor, Tensor]:
    """[B, N, T] in fp32, zeros up to a whole number of tiles: a thread reads one state element's tile of time."""
    batch, length, n_states = b_BTN.shape
    row = -(-length // tile) * tile
    outs = [x.new_empty(batch, n_states, row, dtype=torch.float32) for x in (b_BTN, c_BTN)]
    grid = batch * -(-n_states // STATES) * -(-row // TOKENS)
    turn_kernel[(grid,)](b_BTN.contiguous(), c_BTN.contiguous(), *outs, length, row, n_states, T=TOKENS, N=STATES)
    return outs[0], outs[1]
