"""Definitions as token loops, in the dtype given: what every faster form is tested against.

Nearly all recurrent mixers are one recurrence on a matrix state S per head [K, V]:

    S_t = decay_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T,    o_t = S_t^T q_t

where the decay is none, constant, one scalar per token, or one factor per row of S, and the rank-one erasure
(with its beta) is present (DeltaNet family) or absent (linear attention family). A diagonal decay comes first:
S_t = (I - beta_t k_t k_t^T) Diag(decay_t) S_{t-1} + ... (Kimi Linear 2025, eq. 1). RWKV-7 needs independent vectors
in the rank-one term. Mamba's S6 has no outer product at all: h_t = a_t h_{t-1} + x_t elementwise.

Shape legend: B batch, T time, H heads of v and of the state, G heads of q and k (G divides H), K key, V value width.
"""

from __future__ import annotations

import torch
from torch import Tensor


def linear_recurrence_reference(
    q_BTGK: Tensor,
    k_BTGK: Tensor,
    v_BTHV: Tensor,
    *,
    log_decay: Tensor | None = None,
    beta_BTH: Tensor | None = None,
    state_BHKV: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence above, token by token.

    Args:
        q_BTGK: queries.
        k_BTGK: keys.
        v_BTHV: values.
        log_decay: natural log of the decay, <= 0: None, [H], [B, T, H] or [B, T, H, K].
        beta_BTH: write strength of the delta rule, or None for no erasure and unit writes.
        state_BHKV: S_0; None means zero.

    Returns:
        The outputs [B, T, H, V] and the final state [B, H, K, V].
    """
    batch, length, n_heads, v_dim = v_BTHV.shape
    q_BTHK, k_BTHK = (x.repeat_interleave(n_heads // x.shape[2], dim=2) for x in (q_BTGK, k_BTGK))
    s_BHKV = v_BTHV.new_zeros(batch, n_heads, q_BTHK.shape[3], v_dim) if state_BHKV is None else state_BHKV
    outputs = []
    for t in range(length):
        q_BHK, k_BHK, v_BHV = q_BTHK[:, t], k_BTHK[:, t], v_BTHV[:, t]
        if log_decay is not None:
            s_BHKV = _decay(log_decay, t) * s_BHKV
        if beta_BTH is not None:
            read_BHV = torch.einsum("bhkv,bhk->bhv", s_BHKV, k_BHK)
            v_BHV = beta_BTH[:, t, :, None] * (v_BHV - read_BHV)
        s_BHKV = s_BHKV + k_BHK[..., :, None] * v_BHV[..., None, :]
        outputs.append(torch.einsum("bhkv,bhk->bhv", s_BHKV, q_BHK))
    return torch.stack(outputs, dim=1), s_BHKV


def _decay(log_decay: Tensor, t: int) -> Tensor:
    """The decay of token t, broadcastable to [B, H, K, V]."""
    if log_decay.ndim == 1:
        return log_decay.exp()[None, :, None, None]
    now = log_decay[:, t].exp()
    return now[..., None, None] if log_decay.ndim == 3 else now[..., None]


def dplr_reference(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    a_BTHK: Tensor,
    b_BTHK: Tensor,
    *,
    log_decay_BTHK: Tensor,
    state_BHKV: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Diagonal plus rank one, S_t = (Diag(decay_t) + a_t b_t^T) S_{t-1} + k_t v_t^T (Peng et al. 2025, RWKV-7).

    KDA is the special case a = -beta k, b = decay * k, with beta k in place of k in the write.

    Args:
        q_BTHK: queries.
        k_BTHK: keys of the write.
        v_BTHV: values.
        a_BTHK: left vector of the rank-one transition.
        b_BTHK: right vector of the rank-one transition, which reads S_{t-1}.
        log_decay_BTHK: natural log of the diagonal, <= 0.
        state_BHKV: S_0; None means zero.

    Returns:
        The outputs [B, T, H, V] and the final state [B, H, K, V].
    """
    batch, length, n_heads, v_dim = v_BTHV.shape
    s_BHKV = v_BTHV.new_zeros(batch, n_heads, q_BTHK.shape[3], v_dim) if state_BHKV is None else state_BHKV
    outputs = []
    for t in range(length):
        read_BHV = torch.einsum("bhkv,bhk->bhv", s_BHKV, b_BTHK[:, t])
        s_BHKV = (
            log_decay_BTHK[:, t].exp()[..., None] * s_BHKV
            + a_BTHK[:, t, :, :, None] * read_BHV[..., None, :]
            + k_BTHK[:, t, :, :, None] * v_BTHV[:, t, :, None, :]
        )
        outputs.append(torch.einsum("bhkv,bhk->bhv", s_BHKV, q_BTHK[:, t]))
    return torch.stack(outputs, dim=1), s_BHKV


def scan_reference(a: Tensor, x: Tensor, state: Tensor | None = None) -> Tensor:
    """Elementwise h_t = a_t h_{t-1} + x_t along the second axis.

    Args:
        a: factors, [B, T, ...].
        x: inputs, the same shape.
        state: h_0, [B, ...]; None means zero.

    Returns:
        Every h_t, [B, T, ...].
    """
    h = torch.zeros_like(x[:, 0]) if state is None else state
    outputs = []
    for t in range(x.shape[1]):
        h = a[:, t] * h + x[:, t]
        outputs.append(h)
    return torch.stack(outputs, dim=1)
