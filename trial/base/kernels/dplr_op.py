"""Pairs of tokens for `kernels.dplr` as a torch operator: fake tensors, autograd, and vmap that folds its axis into the batch.

Shape legend: B batch, T time, H heads, K key, V value width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels._operator import operator
from kernels.recurrence_op import Folded, _folded, _unfolded


def key_dtype(k: Tensor, v: Tensor) -> torch.dtype:
    """Of the keys: they would be rounded to the dtype of the values later, so they are before they are twice as many."""
    return v.dtype if v.dtype.itemsize < k.dtype.itemsize else k.dtype


@operator("mixer_bench::dplr_pairs")
def pairs(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, log_decay: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Two tokens for each: the first erases with the keys -b, decays, and writes under a; the second writes v under k.

    Returns:
        Queries [B, 2 T, H, K], keys, values, log decays, keys of the erasure, and write strengths of 1 [B, 2 T, H] in fp32.
    """
    from kernels import dplr_triton

    with torch.cuda.device_of(v):  # Triton launches on the current device
        return dplr_triton.pairs(q, k, v, a, b, log_decay, key_dtype(k, v))


@pairs.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, log_decay: Tensor) -> tuple[Tensor, ...]:
    batch, length, heads, k_dim = k.shape
    twice, dtype = (batch, 2 * length, heads), key_dtype(k, v)
    keys, erase = (k.new_empty(*twice, k_dim, dtype=dtype) for _ in range(2))
    values, strength = v.new_empty(*twice, v.shape[3]), v.new_empty(twice, dtype=torch.float32)
    return q.new_empty(*twice, k_dim), keys, values, log_decay.new_empty(*twice, k_dim), erase, strength


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(output[5])
    ctx.set_materialize_grads(False)
    ctx.dtypes = [x.dtype for x in inputs]


def _differentiate(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    queries, keys, values, decays, erase, _ = gradients

    def half(x: Tensor | None, number: int, dtype: torch.dtype) -> Tensor | None:
        return None if x is None else x[:, number::2].to(dtype)

    db = half(erase, 0, ctx.dtypes[4])
    places = ((queries, 1), (keys, 1), (values, 1), (keys, 0))
    first = (half(x, number, dtype) for (x, number), dtype in zip(places, ctx.dtypes[:4], strict=True))
    return *first, None if db is None else -db, half(decays, 0, ctx.dtypes[5])


pairs.register_autograd(_differentiate, setup_context=_save)


@pairs.register_vmap
def _(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Folded:
    return _unfolded(pairs(*_folded(info.batch_size, in_dims, args)), info.batch_size)
