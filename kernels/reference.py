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

from collections.abc import Sequence

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
    tokens = (_tokens(x, length) for x in (q_BTHK, k_BTHK, v_BTHV, _decays(log_decay, length), beta_BTH))
    for q_BHK, k_BHK, v_BHV, decay, beta_BH in zip(*tokens, strict=True):
        if decay is not None:
            s_BHKV = decay * s_BHKV
        write_BHV = v_BHV
        if beta_BH is not None:
            read_BHV = torch.einsum("bhkv,bhk->bhv", s_BHKV, k_BHK)
            write_BHV = beta_BH[..., None] * (v_BHV - read_BHV)
        s_BHKV = s_BHKV + k_BHK[..., :, None] * write_BHV[..., None, :]
        outputs.append(torch.einsum("bhkv,bhk->bhv", s_BHKV, q_BHK))
    return torch.stack(outputs, dim=1), s_BHKV


def _tokens(x: Tensor | None, length: int) -> Sequence[Tensor | None]:
    """The tokens of x, taken apart at once: each `x[:, t]` would have a gradient as large as x."""
    return [None] * length if x is None else x.unbind(1)


def _decays(log_decay: Tensor | None, length: int) -> Tensor | None:
    """The decays of all tokens, broadcastable to [B, T, H, K, V]."""
    if log_decay is None:
        return None
    if log_decay.ndim == 1:
        return log_decay.exp()[None, None, :, None, None].expand(1, length, -1, 1, 1)
    return log_decay.exp()[..., None, None] if log_decay.ndim == 3 else log_decay.exp()[..., None]


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
    batch, _, n_heads, v_dim = v_BTHV.shape
    s_BHKV = v_BTHV.new_zeros(batch, n_heads, q_BTHK.shape[3], v_dim) if state_BHKV is None else state_BHKV
    outputs = []
    tokens = (x.unbind(1) for x in (q_BTHK, k_BTHK, v_BTHV, a_BTHK, b_BTHK, log_decay_BTHK.exp()))
    for q_BHK, k_BHK, v_BHV, a_BHK, b_BHK, decay_BHK in zip(*tokens, strict=True):
        read_BHV = torch.einsum("bhkv,bhk->bhv", s_BHKV, b_BHK)
        s_BHKV = decay_BHK[..., None] * s_BHKV + a_BHK[..., None] * read_BHV[..., None, :] + k_BHK[..., None] * v_BHV[..., None, :]
        outputs.append(torch.einsum("bhkv,bhk->bhv", s_BHKV, q_BHK))
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
    for a_t, x_t in zip(a.unbind(1), x.unbind(1), strict=True):
        h = a_t * h + x_t
        outputs.append(h)
    return torch.stack(outputs, dim=1)
