"""Chunked linear attention with and without decay, in plain torch: quadratic inside a chunk, a matrix state between.

With G the cumulated log decay of a chunk and S the state that enters it (Yang et al. 2024, GLA, section 4; Dao & Gu
2024, section 6):

    O = (Q K^T o exp(G_i - G_j)) V + exp(G) Q S,    S <- exp(G_C) S + K^T (exp(G_C - G) V)

Shape legend: B batch, T time, H heads, G groups of q and k, R = H / G, N chunks, C tokens of a chunk, K key, V value.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from kernels.chunks._chunks import decayed_scores, from_chunks, pairwise_decay, to_chunks, walk

Pair = tuple[Tensor, Tensor | None]


class Lift(NamedTuple):
    """A feature map with a closed form of its inner product, so that features are only built between chunks.

    Args:
        features: phi.
        scores: the function with scores(q . k) = phi(q) . phi(k).
    """

    features: Callable[[Tensor], Tensor]
    scores: Callable[[Tensor], Tensor]


def scalar_decay(
    q_BTGK: Tensor,
    k_BTGK: Tensor,
    v_BTHV: Tensor,
    log_decay: Tensor | None,
    state: Tensor | None,
    size: int,
    lift: Lift | None,
) -> Pair:
    """No decay (None), a constant one [H], or a scalar per token and head [B, T, H]."""
    length, groups = v_BTHV.shape[1], k_BTGK.shape[2]
    q, k, v = (to_chunks(x, size, groups) for x in (q_BTGK, k_BTGK, v_BTHV))
    g = None if log_decay is None else cumulated(log_decay, length, size, groups)
    scores = q @ k.mT
    if lift is not None:
        scores = lift.scores(scores)
    scores = scores.tril() if g is None else scores * pairwise_decay(g)
    o, final = scores @ v, None
    if v.shape[3] > 1 or state is not None:
        features = (lambda x: x) if lift is None else lift.features
        phi_q, phi_k = features(q), features(k)
        update = phi_k.mT @ (v if g is None else v * (g[..., -1:] - g).exp()[..., None])
        carry = None if g is None else g[..., -1:, None].exp()
        entering, final = walk(update, carry, initial_state(state, phi_k, v))
        read = phi_q @ entering
        o = o + (read if g is None else read * g.exp()[..., None])
    return from_chunks(o, length), None if state is None else final.flatten(1, 2)


def vector_decay(q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, log_decay_BTHK: Tensor, state: Tensor | None, size: int) -> Pair:
    """A decay per token, head and key channel."""
    length, n_heads = v_BTHV.shape[1:3]
    q, k, v, g = (to_chunks(x, size, n_heads) for x in (q_BTHK, k_BTHK, v_BTHV, log_decay_BTHK))
    g = g.cumsum(-2)
    scores = decayed_scores(q[..., None, :], g[..., None, :], k[..., None, :], g[..., None, :])[..., 0, :, 0]
    o, final = scores @ v + (q * k).sum(-1, keepdim=True) * v, None
    if v.shape[3] > 1 or state is not None:
        last = g[..., -1:, :]
        update = (k * (last - g).exp()).mT @ v
        entering, final = walk(update, last.exp().mT, initial_state(state, k, v))
        o = o + (q * g.exp()) @ entering
    return from_chunks(o, length), None if state is None else final.flatten(1, 2)


def cumulated(log_decay: Tensor, length: int, size: int, groups: int) -> Tensor:
    """Cumulated log decay inside each chunk, [B or 1, G, R, N, C], from [H] or [B, T, H]; padding does not decay."""
    if log_decay.ndim == 1:
        log_decay = log_decay.expand(1, length, -1)
    return to_chunks(log_decay, size, groups).cumsum(-1)


def initial_state(state_BHKV: Tensor | None, k: Tensor, v: Tensor) -> Tensor:
    """The state before the first chunk, [B, G, R, K, V], from keys and values in chunks."""
    if state_BHKV is None:
        return v.new_zeros(*v.shape[:3], k.shape[-1], v.shape[-1])
    return state_BHKV.unflatten(1, v.shape[1:3])
