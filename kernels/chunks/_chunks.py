"""Cutting sequences into chunks, and the decay algebra inside a chunk; shared by the chunked recurrences.

Numerics: decays stay in log space and only differences that are <= 0 are ever exponentiated; masks go in before the
exponential. Dividing by a cumulated decay (exp(-G)) would overflow as soon as a gate is strong.

Shape legend: B batch, T time, G groups of q and k, R = H / G heads per group, N chunks, C tokens of a chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def to_chunks(x_BTH: Tensor, size: int, groups: int) -> Tensor:
    """[B, T, H, ...] to [B, G, R, N, C, ...], zero-padded at the end, which is inert for keys and log decays."""
    batch, length, n_heads = x_BTH.shape[:3]
    rest = x_BTH.shape[3:]
    if missing := -length % size:
        x_BTH = F.pad(x_BTH, (0, 0) * (len(rest) + 1) + (0, missing))
    x = x_BTH.reshape(batch, -1, size, groups, n_heads // groups, *rest)
    return x.permute(0, 3, 4, 1, 2, *range(5, x.ndim)).contiguous()


def from_chunks(x_BGRNCV: Tensor, length: int) -> Tensor:
    """[B, G, R, N, C, V] back to [B, T, H, V]."""
    x_BNCGRV = x_BGRNCV.permute(0, 3, 4, 1, 2, 5)
    return x_BNCGRV.flatten(3, 4).flatten(1, 2)[:, :length]


def pairwise_decay(g_C: Tensor) -> Tensor:
    """exp(G_i - G_j) for i >= j, else 0, from cumulated log decays [..., C]: [..., C, C]."""
    future = torch.ones(g_C.shape[-1], g_C.shape[-1], dtype=torch.bool, device=g_C.device).triu(1)
    return (g_C[..., :, None] - g_C[..., None, :]).masked_fill(future, -torch.inf).exp()


def walk(updates: Tensor, carry: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
    """S <- carry_n S + updates_n over chunks.

    Args:
        updates: [B, G, R, N, K, V].
        carry: broadcastable to `updates`, or None for 1.
        state: S before the first chunk, [B, G, R, K, V].

    Returns:
        The state before each chunk [B, G, R, N, K, V], and the one after the last.
    """
    entering = []
    for n in range(updates.shape[3]):
        entering.append(state)
        state = (state if carry is None else state * carry[:, :, :, n]) + updates[:, :, :, n]
    return torch.stack(entering, dim=3), state


def decayed_scores(rows: Tensor, g_rows: Tensor, cols: Tensor, g_cols: Tensor) -> Tensor:
    """sum_k rows_ik cols_jk exp(Grow_ik - Gcol_jk) for i > j, else 0, with a decay of its own for every k.

    The decay depends on k, so it cannot be pulled out of the product, and C x C x K pairwise differences are large.
    Instead the lower triangle is cut in a binary tree: the block between two neighbouring halves of 2m tokens is a
    plain product once both sides are decayed to the boundary, and both of those exponents are <= 0.

    Args:
        rows: P row vectors per token, [..., C, P, K]; C is a power of two.
        g_rows: cumulated log decay up to which a row reads, broadcastable to `rows`; between G_i and G_{i-1}.
        cols: Q column vectors per token, [..., C, Q, K].
        g_cols: cumulated log decay G_j of the columns, [..., C, 1, K].

    Returns:
        Scores [..., C, P, C, Q].
    """
    size, p, q = rows.shape[-3], rows.shape[-2], cols.shape[-2]
    blocks = rows.new_zeros(1).expand(*rows.shape[:-3], size, p, q)
    half = 1
    while half < size:
        lower = _boundary_block(rows, g_rows, cols, g_cols, half)
        pairs = blocks.unflatten(-3, (size // (2 * half), 2))
        upper_left, lower_right = pairs[..., 0, :, :], pairs[..., 1, :, :]
        top = torch.cat((upper_left, torch.zeros_like(upper_left)), dim=-1)
        blocks = torch.cat((top, torch.cat((lower, lower_right), dim=-1)), dim=-2)
        half *= 2
    return blocks.reshape(*rows.shape[:-3], size, p, size, q)


def _boundary_block(rows: Tensor, g_rows: Tensor, cols: Tensor, g_cols: Tensor, half: int) -> Tensor:
    """Scores of the second against the first half of every 2m tokens: [..., C / 2m, m P, m Q]."""
    split = (rows.shape[-3] // (2 * half), 2, half)
    rows, g_rows, cols, g_cols = (x.unflatten(-3, split) for x in (rows, g_rows, cols, g_cols))
    g_first = g_cols[..., 0, :, :, :]
    g_edge = g_first[..., -1:, :, :]
    late = rows[..., 1, :, :, :] * (g_rows[..., 1, :, :, :] - g_edge).exp()
    early = cols[..., 0, :, :, :] * (g_edge - g_first).exp()
    return late.flatten(-3, -2) @ early.flatten(-3, -2).mT
