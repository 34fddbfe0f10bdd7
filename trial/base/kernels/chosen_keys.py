"""Which keys a query reads when content decides: hash buckets, write-time scores, and the attention over them.

Keys come as S stored ones followed by those of T new tokens, in order of time, so the query of new token t has seen keys
0 .. S + t. Every mask is dense, [B, T, S + T]; each function is also right for S = 0.

Shape legend: B batch, T queries, K all keys (S + T), R hash rounds, N key width, V value width.
"""

from __future__ import annotations

import torch
from torch import Tensor


def seen(n_queries: int, filled_BK: Tensor) -> Tensor:
    """Keys that exist when each query is asked.

    Args:
        n_queries: T; the last T keys are those of the queries' own tokens.
        filled_BK: False where stored room is still empty.

    Returns:
        [B, T, K].
    """
    n_keys = filled_BK.shape[1]
    index = torch.arange(n_keys, device=filled_BK.device)
    return filled_BK[:, None] & (index <= index[n_keys - n_queries :, None])


def dilated_keys(n_queries: int, n_keys: int, *, budget: int, dilation: int, device: torch.device | str) -> Tensor:
    """The own key and every `dilation`-th before it, `budget` in all: [T, K]; dilation 1 is a window."""
    index = torch.arange(n_keys, device=device)
    age_TK = index[n_keys - n_queries :, None] - index
    return (age_TK >= 0) & (age_TK < budget * dilation) & (age_TK % dilation == 0)


def bucket_keys(code_BTR: Tensor, code_BKR: Tensor, seen_BTK: Tensor, budget: int) -> Tensor:
    """The own key and the newest keys that share the query's bucket in any hash round, `budget` in all.

    Args:
        code_BTR: buckets of the queries.
        code_BKR: buckets of the keys.
        seen_BTK: from `seen`.
        budget: most keys of a query.

    Returns:
        [B, T, K].
    """
    same = torch.zeros_like(seen_BTK)
    for query_BT, key_BK in zip(code_BTR.unbind(-1), code_BKR.unbind(-1), strict=True):
        same = same | (query_BT[:, :, None] == key_BK[:, None])
    n_queries, n_keys = seen_BTK.shape[1:]
    own_TK = dilated_keys(n_queries, n_keys, budget=1, dilation=1, device=seen_BTK.device)
    same = (same & seen_BTK) | own_TK
    newer_or_equal = same.flip(-1).cumsum(-1, dtype=torch.int32).flip(-1)
    return same & (newer_or_equal <= budget)


def top_keys(score_BK: Tensor, filled_BK: Tensor, seen_BTK: Tensor, budget: int) -> Tensor:
    """The `budget` best keys that each query has seen, all of them if fewer; of equal scores the newer key wins.

    A key is among the best as long as fewer than `budget` seen keys beat it, so no sort is needed, and a key that has
    dropped out never returns.

    Args:
        score_BK: one score per key, fixed when the key is written.
        filled_BK: False where stored room is still empty.
        seen_BTK: from `seen`.
        budget: most keys of a query.

    Returns:
        [B, T, K].
    """
    n_stored = seen_BTK.shape[2] - seen_BTK.shape[1]
    index = torch.arange(score_BK.shape[1], device=score_BK.device)
    rival, key = score_BK[:, :, None], score_BK[:, None, :]
    beats_BKK = ((rival > key) | ((rival == key) & (index[:, None] > index))) & filled_BK[:, :, None]
    stored_rivals = beats_BKK[:, :n_stored].sum(1, keepdim=True, dtype=torch.int32)
    rivals_BTK = stored_rivals + beats_BKK[:, n_stored:].cumsum(1, dtype=torch.int32)
    return seen_BTK & (rivals_BTK < budget)


def attend(q_BTN: Tensor, k_BKN: Tensor, v_BKV: Tensor, mask_BTK: Tensor, log_gate_BK: Tensor | None = None) -> Tensor:
    """Single-head softmax attention over masked keys, scale N^-1/2.

    Args:
        q_BTN: queries.
        k_BKN: keys.
        v_BKV: values.
        mask_BTK: True where a query reads a key; every row reads something.
        log_gate_BK: added to the logits of a key, or None.

    Returns:
        [B, T, V].
    """
    scores_BTK = (q_BTN * q_BTN.shape[-1] ** -0.5) @ k_BKN.mT
    if log_gate_BK is not None:
        scores_BTK = scores_BTK + log_gate_BK[:, None]
    return scores_BTK.masked_fill(~mask_BTK, float("-inf")).softmax(-1).to(v_BKV.dtype) @ v_BKV
