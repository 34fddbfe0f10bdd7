"""The vector-gate kernels as torch operators: fake tensors, autograd, and vmap that folds its axis into the batch.

Shape legend: B batch, T time, H heads, K key, V value width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from kernels._ahead import other_sizes
from kernels._operator import operator
from kernels.vector_gates import vector_gate, vector_gate_kept
from kernels.walks.recurrence_op import Folded, _folded, _unfolded


def vector_gate_recurrence(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    log_decay_BTHK: Tensor,
    beta_BTH: Tensor | None,
    erase_BTHK: Tensor | None,
    state_BHKV: Tensor | None,
    return_state: bool,
) -> tuple[Tensor, Tensor]:
    """See `kernels.vector_gates.vector_gate.forward`; whether a backward pass needs more is found out by autograd."""
    return _recurrence(q_BTHK, k_BTHK, v_BTHV, log_decay_BTHK, beta_BTH, erase_BTHK, state_BHKV, return_state, False)[:2]


@operator("mixer_bench::vector_gate_recurrence")
def _recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor | None,
    erase: Tensor | None,
    state: Tensor | None,
    return_state: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `kernels.vector_gates.vector_gate.forward`."""
    with torch.cuda.device_of(v):  # Triton launches on the current device
        return vector_gate.forward(q, k, v, log_decay, beta, erase, state, return_state=return_state, keep=keep)


@_recurrence.register_fake
def _(q, k, v, log_decay, beta, erase, state, return_state, keep) -> tuple[Tensor, Tensor, Tensor]:
    final = (v.shape[0], v.shape[2], k.shape[3], v.shape[3]) if return_state else (0,)
    memory = vector_gate_kept.kept_memory(q, k, v, delta=beta is not None, keep=keep)
    return v.new_empty(v.shape), v.new_empty(final, dtype=torch.float32), memory


@operator("mixer_bench::vector_gate_recurrence_backward")
def _recurrence_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor | None,
    erase: Tensor | None,
    state: Tensor | None,
    memory: Tensor,
    do: Tensor,
    dfinal: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `kernels.vector_gates.vector_gate.backward`."""
    with torch.cuda.device_of(do):
        found: Any = vector_gate.backward(q, k, v, log_decay, beta, erase, state, memory, do, dfinal)
    return found


@_recurrence_backward.register_fake
def _(*args: Any) -> tuple[Tensor, ...]:
    q, k, v, log_decay, beta, erase, state = args[:7]
    nothing = v.new_empty(0, dtype=torch.float32)
    more = (nothing if x is None else x.new_empty(x.shape) for x in (beta, erase, state))
    return *(x.new_empty(x.shape) for x in (q, k, v, log_decay)), *more


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    """Keeps the inputs, and what the forward pass kept."""
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)  # zeros for what is kept would be most of the memory that is written
    ctx.save_for_backward(*inputs[:7], output[2])


def _differentiate(ctx: Any, do: Tensor | None, dfinal: Tensor | None, _memory: None) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    found = _recurrence_backward(*saved, torch.zeros_like(saved[2]) if do is None else do, dfinal)
    return *(None if x is None else dx for x, dx in zip(saved[:7], found, strict=True)), None, None


_recurrence.register_autograd(_differentiate, setup_context=_save, keep=True)


@_recurrence.register_sizes
def _(q, k, v, log_decay, beta, erase, state, return_state, keep) -> Iterator[tuple[Any, ...]]:
    """Long rows of few heads are walked in segments."""
    for other in other_sizes(v.shape[2], v.shape[2]):
        yield *(other.of(x, "BTH") for x in (q, k, v, log_decay, beta, erase)), other.of(state, "BH"), return_state, keep


@_recurrence.register_vmap
def _(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Folded:
    return _unfolded(_recurrence(*_folded(info.batch_size, in_dims, args)), info.batch_size)


@_recurrence_backward.register_vmap
def _(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Folded:
    return _unfolded(_recurrence_backward(*_folded(info.batch_size, in_dims, args)), info.batch_size)
