"""RWKV-7's recurrence as torch operators: pairs of tokens for the vector-gate kernels, and their gradients as those of tokens.

Shape legend: B batch, T time, H heads, K key, V value width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from kernels._ahead import other_sizes
from kernels._kept import Part, memory_for, parts_of
from kernels._operator import operator
from kernels.vector_gates import vector_gate, vector_gate_kept
from kernels.walks.recurrence_op import Folded, _folded, _unfolded

Four = tuple[Tensor, Tensor, Tensor, Tensor]


def dplr_recurrence(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    a_BTHK: Tensor,
    b_BTHK: Tensor,
    log_decay_BTHK: Tensor,
    state_BHKV: Tensor | None,
    return_state: bool,
) -> tuple[Tensor, Tensor]:
    """See `kernels.dplr`: outputs, and the final state in fp32 or an empty tensor."""
    return _dplr(q_BTHK, k_BTHK, v_BTHV, a_BTHK, b_BTHK, log_decay_BTHK, state_BHKV, return_state, False)[:2]


def _pair_parts(rows: tuple[int, int, int], k_dim: int, dtypes: tuple[torch.dtype, torch.dtype, torch.dtype]) -> list[Part]:
    """Shapes and dtypes of queries, keys, keys of the erasure, log decays and write strengths of pairs; rows are B, T, H."""
    batch, length, heads = rows
    queries, keys, decays = dtypes
    twice = (batch, 2 * length, heads)
    return [((*twice, k_dim), dtype) for dtype in (queries, keys, keys, decays)] + [(twice, torch.float32)]


def _dtypes(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> tuple[torch.dtype, torch.dtype, torch.dtype]:
    """Of queries, keys and log decays; keys would be rounded to the dtype of the values later, so they are before that."""
    return q.dtype, v.dtype if v.dtype.itemsize < k.dtype.itemsize else k.dtype, log_decay.dtype


@operator("mixer_bench::dplr")
def _dplr(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    log_decay: Tensor,
    state: Tensor | None,
    return_state: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Outputs, every second row of their memory; the final state; memory of the pairs, and of `vector_gate.forward`."""
    from kernels.vector_gates import dplr_triton

    with torch.cuda.device_of(v):  # Triton launches on the current device
        parts = _pair_parts(k.shape[:3], k.shape[3], _dtypes(q, k, v, log_decay))
        pairs = memory_for(parts, k)
        queries, keys, erase, decays, strength = parts_of(pairs, parts)
        values = v.new_empty(v.shape[0], 2 * v.shape[1], *v.shape[2:])
        dplr_triton.pairs((q, k, v, a, b, log_decay), (queries, keys, values, decays, erase, strength))
        inputs = (queries, keys, values, decays, strength, erase, state)
        o, final, memory = vector_gate.forward(*inputs, return_state=return_state, keep=keep)
        return o[:, 1::2], final, pairs, memory


@_dplr.register_fake
def _(q, k, v, a, b, log_decay, state, return_state, keep) -> Four:
    final = (v.shape[0], v.shape[2], k.shape[3], v.shape[3]) if return_state else (0,)
    parts = _pair_parts(k.shape[:3], k.shape[3], _dtypes(q, k, v, log_decay))
    values = v.new_empty(v.shape[0], 2 * v.shape[1], *v.shape[2:])
    queries, keys = (values.new_empty(*values.shape[:3], k.shape[3], dtype=parts[i][1]) for i in range(2))
    memory = vector_gate_kept.kept_memory(queries, keys, values, delta=True, keep=keep)
    return values[:, 1::2], v.new_empty(final, dtype=torch.float32), memory_for(parts, k), memory


@operator("mixer_bench::dplr_backward")
def _dplr_backward(
    pairs: Tensor,
    state: Tensor | None,
    memory: Tensor,
    do: Tensor,
    dfinal: Tensor | None,
    k_dim: int,
    queries_dtype: torch.dtype,
    keys_dtype: torch.dtype,
    decays_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, a, b and log decays in the dtypes of their pairs, and that of the state or an empty tensor."""
    from kernels.vector_gates import dplr_triton

    with torch.cuda.device_of(do):
        parts = _pair_parts(do.shape[:3], k_dim, (queries_dtype, keys_dtype, decays_dtype))
        queries, keys, erase, decays, strength = parts_of(pairs, parts)
        do = dplr_triton.spread(do)
        inputs = (queries, keys, do, decays, strength, erase, state)
        dq, dk, dv, dgate, _, derase, dstate = vector_gate.backward(*inputs, memory, do, dfinal)
        return *dplr_triton.halves(dq, dk, dv, dgate, derase), dstate


@_dplr_backward.register_fake
def _(pairs, state, memory, do, dfinal, k_dim, queries_dtype, keys_dtype, decays_dtype) -> tuple[Tensor, ...]:
    *rows, v_dim = do.shape
    dtypes = (queries_dtype, keys_dtype, None, keys_dtype, keys_dtype, decays_dtype)
    found = (do.new_empty(*rows, v_dim if dtype is None else k_dim, dtype=dtype or do.dtype) for dtype in dtypes)
    return *found, do.new_empty(0 if state is None else state.shape, dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Four) -> None:
    """Keeps the pairs, and what the vector-gate kernels kept."""
    q, k, v, _, _, log_decay, state, *_ = inputs
    ctx.k_dim, ctx.dtypes = k.shape[3], [x.dtype for x in inputs[:6]]
    ctx.shape, ctx.pair_dtypes = output[0].shape, _dtypes(q, k, v, log_decay)
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[2], state, output[3])


def _differentiate(ctx: Any, do: Tensor | None, dfinal: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    pairs, state, memory = ctx.saved_tensors
    do = pairs.new_zeros(ctx.shape, dtype=ctx.dtypes[2]) if do is None else do
    *found, dstate = _dplr_backward(pairs, state, memory, do, dfinal, ctx.k_dim, *ctx.pair_dtypes)
    gradients = (x.to(dtype) for x, dtype in zip(found, ctx.dtypes, strict=True))
    return *gradients, None if state is None else dstate, None, None


_dplr.register_autograd(_differentiate, setup_context=_save, keep=True)


@_dplr.register_sizes
def _(q, k, v, a, b, log_decay, state, return_state, keep) -> Iterator[tuple[Any, ...]]:
    """Long rows of few heads are walked in segments."""
    for other in other_sizes(v.shape[2], v.shape[2]):
        yield *(other.of(x, "BTH") for x in (q, k, v, a, b, log_decay)), other.of(state, "BH"), return_state, keep


@_dplr.register_vmap
def _(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Folded:
    return _unfolded(_dplr(*_folded(info.batch_size, in_dims, args)), info.batch_size)


@_dplr_backward.register_vmap
def _(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Folded:
    return _unfolded(_dplr_backward(*_folded(info.batch_size, in_dims, args)), info.batch_size)
