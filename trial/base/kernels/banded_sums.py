"""The two sums whose quotient is banded softmax attention, for mixers that add a share of their own to both.

Shape legend: B batch, H heads, T queries, S keys, K key width, V value width, N blocks, C block length, P sinks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.attention import _band_visible, _block_pairs


def banded_attention_sums(
    q_BHTK: Tensor,
    k_BHSK: Tensor,
    v_BHSV: Tensor,
    *,
    window: int,
    start_B: Tensor,
    sink_kv: tuple[Tensor, Tensor] | None = None,
    null_logit_H: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """sum_s e^(q.k_s/sqrt(K) - m) v_s and sum_s e^(q.k_s/sqrt(K) - m) over a causal band with sinks, m the row's maximum.

    Args:
        q_BHTK: queries of T consecutive tokens.
        k_BHSK: keys of the same tokens, after those of S - T < window earlier tokens.
        v_BHSV: values.
        window: number of keys seen, the own one included.
        start_B: int64, absolute position of the first query; keys at negative positions are invisible.
        sink_kv: keys and values of the first P tokens, visible once they have left the window.
        null_logit_H: a score that every query sees beside its keys, without a value, so it enters the denominator only.

    Returns:
        The numerator [B, H, T, V] and the denominator [B, H, T, 1], in fp32 or better.
    """
    n_tokens, history = q_BHTK.shape[-2], k_BHSK.shape[-2] - q_BHTK.shape[-2]
    n_sinks = 0 if sink_kv is None else sink_kv[0].shape[-2]
    block = max(window - 1, 32)
    if n_tokens <= 2 * block:
        visible = _band_visible(n_tokens, history, window, start_B, n_sinks)[:, None]
        if sink_kv is not None:
            k_BHSK, v_BHSV = torch.cat((sink_kv[0], k_BHSK), -2), torch.cat((sink_kv[1], v_BHSV), -2)
        return _sums(q_BHTK, k_BHSK, v_BHSV, visible, None if null_logit_H is None else null_logit_H[:, None, None])
    n_blocks = -(-n_tokens // block)
    spare = n_blocks * block - n_tokens
    q_BHNCK = F.pad(q_BHTK, (0, 0, 0, spare)).unflatten(-2, (n_blocks, block))
    k, v = (_block_pairs(F.pad(a, (0, 0, block - history, spare)), block) for a in (k_BHSK, v_BHSV))
    if sink_kv is not None:
        sink_k, sink_v = (a[:, :, None].expand(-1, -1, n_blocks, -1, -1) for a in sink_kv)
        k, v = torch.cat((sink_k, k), -2), torch.cat((sink_v, v), -2)
    block_start = start_B[..., None] + torch.arange(0, n_blocks * block, block, device=q_BHTK.device)
    visible = _band_visible(block, block, window, block_start, n_sinks)[:, None]
    null = None if null_logit_H is None else null_logit_H[:, None, None, None]
    numerator, denominator = _sums(q_BHNCK, k, v, visible, null)
    return numerator.flatten(-3, -2)[..., :n_tokens, :], denominator.flatten(-3, -2)[..., :n_tokens, :]


def _sums(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, null: Tensor | None) -> tuple[Tensor, Tensor]:
    scores = ((q * q.shape[-1] ** -0.5) @ k.mT).to(torch.promote_types(q.dtype, torch.float32))
    scores = scores.masked_fill(~visible, float("-inf"))
    peak = scores.amax(-1, keepdim=True)
    peak = peak if null is None else torch.maximum(peak, null)
    weights = (scores - peak).exp()
    denominator = weights.sum(-1, keepdim=True)
    denominator = denominator if null is None else denominator + (null - peak).exp()
    return (weights.to(v.dtype) @ v).to(weights.dtype), denominator
