"""Chunked delta rules, in plain torch: one unit-triangular solve per chunk replaces the token-by-token erasures.

Write S_t = decay_t S_{t-1} + k_t u_t^T with u_t = beta_t (v_t - S_{t-1}^T decay_t k_t). Inside a chunk that starts
from S, the u solve (Yang et al. 2024, DeltaNet, eq. 10; Gated DeltaNet 2025, eq. 8; Kimi Linear 2025, eq. 6)

    (I + beta tril(K K^T o exp(G_i - G_j), -1)) U = beta (V - exp(G) K S)

after which the chunk is ordinary decayed linear attention with values U.

Shape legend: B batch, T time, H heads, N chunks, C tokens of a chunk, K key, V value.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.chunks._chunks import decayed_scores, from_chunks, pairwise_decay, to_chunks
from kernels.chunks.chunk_decay import Pair, cumulated, initial_state


def delta_rule(
    q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, log_decay: Tensor | None, beta_BTH: Tensor, state: Tensor | None, size: int
) -> Pair:
    """Delta rule with no decay (None), a constant [H], a scalar [B, T, H] or a vector decay [B, T, H, K]."""
    length, n_heads = v_BTHV.shape[1:3]
    q, k, v = (to_chunks(x, size, n_heads) for x in (q_BTHK, k_BTHK, v_BTHV))
    beta = to_chunks(beta_BTH, size, n_heads)[..., None]
    if log_decay is None or log_decay.ndim < 4:
        g = None if log_decay is None else cumulated(log_decay, length, size, n_heads)[..., None]
        erase, scores = _scalar_scores(q, k, g)
    else:
        g = to_chunks(log_decay, size, n_heads).cumsum(-2)
        erase, scores = _vector_scores(q, k, g)
    if v.shape[3] == 1 and state is None:
        return from_chunks(scores @ _solve(beta * erase, beta * v), length), None
    k_read, q_read, k_write = (k, q, k) if g is None else (k * g.exp(), q * g.exp(), k * (g[..., -1:, :] - g).exp())
    solved = _solve(beta * erase, beta * torch.cat((v, -k_read), dim=-1))
    carry = None if g is None else g[..., -1:, :].exp().mT
    u, entering, final = _walk(solved, k_write.mT, carry, None, initial_state(state, k, v))
    o = scores @ u + q_read @ entering
    return from_chunks(o, length), None if state is None else final.flatten(1, 2)


def _scalar_scores(q: Tensor, k: Tensor, g: Tensor | None) -> tuple[Tensor, Tensor]:
    """K K^T and Q K^T with decays; the first may keep an upper triangle, which the solve does not read."""
    if g is None:
        return k @ k.mT, (q @ k.mT).tril()
    decay = pairwise_decay(g[..., 0])
    return (k @ k.mT) * decay, (q @ k.mT) * decay


def _vector_scores(q: Tensor, k: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    rows, g = torch.stack((k, q), dim=-2), g[..., None, :]
    both = decayed_scores(rows, g, k[..., None, :], g)[..., 0]
    own = torch.diag_embed((q * k).sum(-1))
    return both[..., 0, :], both[..., 1, :] + own


def _solve(strict: Tensor, right: Tensor) -> Tensor:
    """(I + tril(strict, -1))^-1 right; the diagonal and the upper triangle are never read."""
    return torch.linalg.solve_triangular(strict, right, upper=False, unitriangular=True)


def _walk(
    solved: Tensor, write_T: Tensor, carry: Tensor | None, plain: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Walks the chunks: u = own + read S, S <- carry S + write^T u + plain.

    Args:
        solved: own and read side by side, [B, H, 1, N, C, V + K].
        write_T: [B, H, 1, N, K, C].
        carry: decay of a whole chunk, [B, H, 1, N, K or 1, 1], or None for 1.
        plain: writes that do not depend on S, [B, H, 1, N, K, V], or None for none.
        state: S before the first chunk, [B, H, 1, K, V].

    Returns:
        Every u [B, H, 1, N, C, V], every S before its chunk [B, H, 1, N, K, V], and the last S.
    """
    v_dim = state.shape[-1]
    values, entering = [], []
    for n in range(solved.shape[3]):
        entering.append(state)
        values.append(solved[:, :, :, n, :, :v_dim] + solved[:, :, :, n, :, v_dim:] @ state)
        if carry is not None:
            state = state * carry[:, :, :, n]
        if plain is not None:
            state = state + plain[:, :, :, n]
        state = state + write_T[:, :, :, n] @ values[-1]
    return torch.stack(values, dim=3), torch.stack(entering, dim=3), state


def dplr(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    a_BTHK: Tensor,
    b_BTHK: Tensor,
    log_decay_BTHK: Tensor,
    state: Tensor | None,
    size: int,
) -> Pair:
    """S_t = (Diag(decay_t) + a_t b_t^T) S_{t-1} + k_t v_t^T; b reads before the decay of its own token.

    With w_t = S_{t-1}^T b_t the chunk solves (I - L_ba) W = L_bk V + exp(G_{i-1}) B S, and then
    O = A_qk V + A_qa W + exp(G) Q S.
    """
    length, n_heads = v_BTHV.shape[1:3]
    q, k, v, a, b, log_decay = (to_chunks(x, size, n_heads) for x in (q_BTHK, k_BTHK, v_BTHV, a_BTHK, b_BTHK, log_decay_BTHK))
    g = log_decay.cumsum(-2)
    g_before = g - log_decay
    qk, qa, bk, ba = _dplr_scores(q, k, a, b, g, g_before)
    if v.shape[3] == 1 and state is None:
        return from_chunks(qk @ v + qa @ _solve(-ba, bk @ v), length), None
    solved = _solve(-ba, torch.cat((bk @ v, b * g_before.exp()), dim=-1))
    last = g[..., -1:, :]
    fade = (last - g).exp()
    plain = (k * fade).mT @ v
    w, entering, final = _walk(solved, (a * fade).mT, last.exp().mT, plain, initial_state(state, k, v))
    o = qk @ v + qa @ w + (q * g.exp()) @ entering
    return from_chunks(o, length), None if state is None else final.flatten(1, 2)


def _dplr_scores(q: Tensor, k: Tensor, a: Tensor, b: Tensor, g: Tensor, g_before: Tensor) -> tuple[Tensor, ...]:
    """Scores [..., C, C] of q against k and a, which include the own token, and of b against k and a, which do not."""
    rows, cols = torch.stack((q, b), dim=-2), torch.stack((k, a), dim=-2)
    scores = decayed_scores(rows, torch.stack((g, g_before), dim=-2), cols, g[..., None, :])
    own_k, own_a = (q[..., None, :] * cols).sum(-1).unbind(-1)
    q_rows, b_rows = scores.unbind(-3)
    (qk, qa), (bk, ba) = q_rows.unbind(-1), b_rows.unbind(-1)
    return qk + torch.diag_embed(own_k), qa + torch.diag_embed(own_a), bk, ba
