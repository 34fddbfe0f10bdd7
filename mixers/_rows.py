"""The last layer's output at a few positions: attention whose keys and values are never made (`kernels.rows`).

Shape legend: B batch, T time, D width, H heads, M rows, K width of a query, V width of a value.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.rows import read_rows


def few_rows(x_BTD: Tensor, rows_BM: Tensor, n_heads: int) -> bool:
    """Whether reading the input once for every head and row costs less than making keys and values of all tokens."""
    return n_heads * rows_BM.shape[1] <= x_BTD.shape[1]


def attend_rows(
    x_BTD: Tensor,
    rows_BM: Tensor,
    x_BMD: Tensor,
    qkv: nn.Linear,
    n_heads: int,
    k_dim: int,
    *,
    weights: str = "softmax",
    eps: float | None = None,
    window: int | None = None,
) -> Tensor:
    """Causal attention at some rows, before the output projection: [B, M, H V].

    A bias of the keys is left out: it adds the same to all scores of a query, which softmax does not see. That of the values
    is added at the end, since the weights sum to one. Other weights than softmax take no biases.

    Args:
        x_BTD: the layer's input.
        rows_BM: positions of the queries.
        x_BMD: the input there.
        qkv: maps D to all queries, all keys, all values.
        n_heads: H.
        k_dim: K.
        weights: what becomes of scores q . k / sqrt(K), with eps and window as for `kernels.rows.read_rows`.
    """
    key = n_heads * k_dim
    q_weight, k_weight, v_weight = qkv.weight.split((key, key, qkv.out_features - 2 * key))
    q_bias, v_bias = (None, None) if qkv.bias is None else (qkv.bias[:key], qkv.bias[2 * key :])
    q_BMHK = F.linear(x_BMD, q_weight, q_bias).unflatten(-1, (n_heads, k_dim)) * k_dim**-0.5
    q_BHMD = torch.einsum("bmhk,hkd->bhmd", q_BMHK, k_weight.unflatten(0, (n_heads, k_dim)))
    read_BHMD = read_rows(q_BHMD, x_BTD, rows_BM, weights=weights, eps=eps, window=window)
    y_BMHV = torch.einsum("bhmd,hvd->bmhv", read_BHMD, v_weight.unflatten(0, (n_heads, -1)))
    y_BMD = y_BMHV.flatten(-2)
    return y_BMD if v_bias is None else y_BMD + v_bias.to(y_BMD.dtype)
