"""The recurrences of `kernels.reference` in chunked form: plain torch, no loop over tokens, right for strong gates.

Everything below fp32 is computed in fp32 and autocast is switched off inside; outputs return in the dtype of v.

Shape legend: B batch, T time, H heads of v and of the state, G heads of q and k (G divides H), K key, V value width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.chunks.chunk_decay import Lift, scalar_decay, vector_decay
from kernels.chunks.chunk_delta import delta_rule, dplr

CHUNK = 64


def linear_recurrence(
    q_BTGK: Tensor,
    k_BTGK: Tensor,
    v_BTHV: Tensor,
    *,
    log_decay: Tensor | None = None,
    beta_BTH: Tensor | None = None,
    state_BHKV: Tensor | None = None,
    lift: Lift | None = None,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor | None]:
    """S_t = decay_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T, o_t = S_t^T q_t; see `kernels.reference`.

    Args:
        q_BTGK: queries; fewer heads than v (G < H) are shared by groups, without decay or with a scalar one.
        k_BTGK: keys.
        v_BTHV: values.
        log_decay: natural log of the decay, <= 0 and finite: None, [H], [B, T, H] or [B, T, H, K].
        beta_BTH: write strength of the delta rule, or None for no erasure and unit writes.
        state_BHKV: S_0; None means "from zero, and return no state", as for `Mixer.forward`.
        lift: q and k are still to be mapped to features, K of the state being the number of features.
        chunk: longest chunk, a power of two.

    Returns:
        The outputs [B, T, H, V] in the dtype of v, and the final state [B, H, K, V] in that of the given one or None.
    """
    vector = log_decay is not None and log_decay.ndim == 4
    assert lift is None or (beta_BTH is None and not vector), "features in closed form need scalar decays and no delta rule"
    size = _chunk_size(v_BTHV.shape[1], chunk)
    with torch.autocast(v_BTHV.device.type, enabled=False):
        q, k, v, log_decay, beta, state = _widen(v_BTHV.dtype, q_BTGK, k_BTGK, v_BTHV, log_decay, beta_BTH, state_BHKV)
        if beta is not None:
            if q.shape[2] < v.shape[2]:
                q, k = (x.repeat_interleave(v.shape[2] // x.shape[2], 2) for x in (q, k))
            o, final = delta_rule(q, k, v, log_decay, beta, state, size)
        elif vector:
            o, final = vector_decay(q, k, v, log_decay, state, size)
        else:
            o, final = scalar_decay(q, k, v, log_decay, state, size, lift)
    return o.to(v_BTHV.dtype), None if state_BHKV is None else final.to(state_BHKV.dtype)


def dplr_recurrence(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    a_BTHK: Tensor,
    b_BTHK: Tensor,
    *,
    log_decay_BTHK: Tensor,
    state_BHKV: Tensor | None = None,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor | None]:
    """S_t = (Diag(decay_t) + a_t b_t^T) S_{t-1} + k_t v_t^T, o_t = S_t^T q_t; see `kernels.reference`.

    Args:
        q_BTHK: queries.
        k_BTHK: keys of the write.
        v_BTHV: values.
        a_BTHK: left vector of the rank-one transition.
        b_BTHK: right vector of the rank-one transition.
        log_decay_BTHK: natural log of the diagonal, <= 0 and finite.
        state_BHKV: S_0; None means "from zero, and return no state".
        chunk: longest chunk, a power of two.

    Returns:
        The outputs [B, T, H, V] in the dtype of v, and the final state [B, H, K, V] in that of the given one or None.
    """
    size = _chunk_size(v_BTHV.shape[1], chunk)
    with torch.autocast(v_BTHV.device.type, enabled=False):
        tensors = _widen(v_BTHV.dtype, q_BTHK, k_BTHK, v_BTHV, a_BTHK, b_BTHK, log_decay_BTHK, state_BHKV)
        o, final = dplr(*tensors, size)
    return o.to(v_BTHV.dtype), None if state_BHKV is None else final.to(state_BHKV.dtype)


def _chunk_size(length: int, chunk: int) -> int:
    """The chunk length, or for a shorter sequence the next power of two."""
    return min(chunk, 1 << (length - 1).bit_length())


def _widen(dtype: torch.dtype, *tensors: Tensor | None) -> list[Tensor | None]:
    wide = torch.promote_types(dtype, torch.float32)
    return [None if x is None else x.to(wide) for x in tensors]
