"""The Triton recurrence as torch operators: fake tensors, autograd, and vmap that folds its axis into the batch.

Shape legend: B batch, T time, H heads of v, G heads of q and k, K key, V value width, M rows of a constant decay.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels import walk

Folded = tuple[tuple[Tensor, ...], tuple[int | None, ...]]


@torch.library.custom_op("mixer_bench::linear_recurrence", mutates_args=())
def linear_recurrence(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor | None, return_state: bool
) -> tuple[Tensor, Tensor]:
    """See `kernels.walk.forward`."""
    return walk.forward(q, k, v, log_decay, state, return_state=return_state)


@linear_recurrence.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor | None, return_state: bool) -> tuple[Tensor, Tensor]:
    final = (v.shape[0], v.shape[2], k.shape[3], v.shape[3]) if return_state else (0,)
    return v.new_empty(v.shape), v.new_empty(final, dtype=torch.float32)


@torch.library.custom_op("mixer_bench::linear_recurrence_backward", mutates_args=())
def linear_recurrence_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    state: Tensor | None,
    do: Tensor,
    final: Tensor | None,
    dfinal: Tensor | None,
    gate_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `kernels.walk.backward`."""
    return walk.backward(q, k, v, log_decay, state, do, final, dfinal, gate_grad=gate_grad)


@linear_recurrence_backward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    state: Tensor | None,
    do: Tensor,
    final: Tensor | None,
    dfinal: Tensor | None,
    gate_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dgate = log_decay if gate_grad else None
    more = (v.new_empty(0 if x is None else x.shape, dtype=torch.float32) for x in (dgate, state))
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), *more


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, log_decay, state, return_state = inputs
    ctx.save_for_backward(q, k, v, log_decay, state, output[1] if return_state else None)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, do: Tensor | None, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, log_decay, state, final = ctx.saved_tensors
    if do is None:
        do = torch.zeros_like(v)
    if final is None:
        dfinal = None
    gate_grad = log_decay is not None and ctx.needs_input_grad[3]
    dq, dk, dv, dgate, dstate = linear_recurrence_backward(q, k, v, log_decay, state, do, final, dfinal, gate_grad)
    return dq, dk, dv, dgate if gate_grad else None, None if state is None else dstate, None


linear_recurrence.register_autograd(_backward, setup_context=_setup_context)


@linear_recurrence.register_vmap
def _(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Folded:
    return _unfolded(linear_recurrence(*_folded(info.batch_size, in_dims, args)), info.batch_size)


@linear_recurrence_backward.register_vmap
def _(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Folded:
    return _unfolded(linear_recurrence_backward(*_folded(info.batch_size, in_dims, args)), info.batch_size)


def _folded(size: int, in_dims: tuple[int | None, ...], args: tuple[Any, ...]) -> list[Any]:
    """Arguments whose first axis, the batch, contains the mapped axis."""
    folded = []
    for x, dim in zip(args, in_dims, strict=True):
        if not isinstance(x, Tensor):
            folded.append(x)
        else:
            first = x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
            folded.append(first.flatten(0, 1))
    return folded


def _unfolded(outputs: tuple[Tensor, ...], size: int) -> Folded:
    """Outputs with the mapped axis in front again; an absent one is empty and has no batch."""
    parts = tuple(x if x.ndim == 1 else x.unflatten(0, (size, -1)) for x in outputs)
    return parts, tuple(None if x.ndim == 1 else 0 for x in outputs)
