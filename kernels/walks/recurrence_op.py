"""The Triton recurrence as torch operators: fake tensors, autograd, and vmap that folds its axis into the batch.

Shape legend: B batch, T time, H heads of v, G heads of q and k, K key, V value width, M rows of a constant decay.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from kernels._ahead import Sizes, other_sizes
from kernels._members import fold_members
from kernels._operator import operator
from kernels.walks import walk

STARTS = 5
"""Where the bounds of packed sequences are among the arguments of both operators."""
Folded = tuple[tuple[Tensor, ...], tuple[int | None, ...]]


@operator("mixer_bench::linear_recurrence")
def linear_recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    state: Tensor | None,
    starts: Tensor | None,
    return_state: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `kernels.walks.walk.forward`."""
    with torch.cuda.device_of(v):  # Triton launches on the current device
        return walk.forward(walk.Inputs(q, k, v, log_decay, state, starts), return_state=return_state)


@linear_recurrence.register_fake
def _(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    *tensors, return_state = args
    _, k, v, _, _, starts = inputs = walk.Inputs(*tensors)
    batch, heads, widths = v.shape[0], v.shape[2], (k.shape[3], v.shape[3])
    final = (batch if starts is None else batch * (starts.shape[0] - 1), heads, *widths) if return_state else (0,)
    return v.new_empty(v.shape), v.new_empty(final, dtype=torch.float32), walk.entering_like(inputs)


@operator("mixer_bench::linear_recurrence_backward")
def linear_recurrence_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    state: Tensor | None,
    starts: Tensor | None,
    entering: Tensor,
    do: Tensor,
    final: Tensor | None,
    dfinal: Tensor | None,
    gate_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `kernels.walks.walk.backward`."""
    with torch.cuda.device_of(v):
        inputs = walk.Inputs(q, k, v, log_decay, state, starts)
        return walk.backward(inputs, entering, walk.Gradients(do, final, dfinal), gate_grad=gate_grad)


@linear_recurrence_backward.register_fake
def _(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    q, k, v, log_decay, state, *_, gate_grad = args
    dgate = log_decay if gate_grad else None
    more = (v.new_empty(0 if x is None else x.shape, dtype=torch.float32) for x in (dgate, state))
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), *more


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    """Keeps the inputs, from which the backward walks recompute everything but the states between segments."""
    *tensors, return_state = inputs
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, output[2], output[1] if return_state else None)


def _differentiate(ctx: Any, do: Tensor | None, dfinal: Tensor | None, _entering: None) -> tuple[Tensor | None, ...]:
    *inputs, final = ctx.saved_tensors
    gate_grad = inputs[3] is not None and ctx.needs_input_grad[3]
    do = torch.zeros_like(inputs[2]) if do is None else do
    more = (None, None) if dfinal is None or final is None else (final, dfinal)
    dq, dk, dv, dgate, dstate = linear_recurrence_backward(*inputs, do, *more, gate_grad)
    return dq, dk, dv, dgate if gate_grad else None, None if inputs[4] is None else dstate, None, None


linear_recurrence.register_autograd(_differentiate, setup_context=_save)


@linear_recurrence.register_sizes
def _(q: Tensor, k: Tensor, v: Tensor, log_decay: Any, state: Any, starts: Any, return_state: bool) -> Iterator[tuple[Any, ...]]:
    """Long rows of few heads are walked in segments; so are heads that share keys, but for a few, which share nothing.

    Long rows of many narrow heads take the walks for Hopper.
    """
    if starts is not None:
        return
    more = [Sizes(1, length, 1, 1) for length in (64, 4096)] if k.shape[2] < v.shape[2] else [Sizes(8, 1024, 16, 16)]
    for other in (*other_sizes(k.shape[2], v.shape[2]), *more):
        keys = [other.of(x, "BTG") for x in (q, k)]
        yield *keys, other.of(v, "BTH"), decays_of(other, log_decay), other.of(state, "BH"), None, return_state


def decays_of(other: Sizes, log_decay: Tensor | None) -> Tensor | None:
    """Log decays of other sizes, constant ones in one row."""
    return other.of(log_decay, "1H" if log_decay is not None and log_decay.ndim == 2 else "BTH")


@linear_recurrence.register_vmap
def _(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Folded:
    return _unfolded(linear_recurrence(*_packed(info.batch_size, in_dims, args)), info.batch_size)


@linear_recurrence_backward.register_vmap
def _(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Folded:
    return _unfolded(linear_recurrence_backward(*_packed(info.batch_size, in_dims, args)), info.batch_size)


def _packed(members: int, in_dims: tuple[int | None, ...], args: tuple[Any, ...]) -> list[Any]:
    """`_folded`, but for the bounds of packed sequences, which all rows share."""
    if in_dims[STARTS] is not None:
        raise ValueError("linear_recurrence: cu_seqlens is mapped by vmap; all members must be packed alike")
    folded = _folded(members, in_dims, args)
    folded[STARTS] = args[STARTS]
    return folded


def _folded(members: int, in_dims: tuple[int | None, ...], args: tuple[Any, ...]) -> list[Any]:
    """Arguments whose batch contains the mapped axis; a constant decay gets a row for each member."""
    pairs = zip(args, in_dims, strict=True)
    return [fold_members(x, dim, members) if isinstance(x, Tensor) else x for x, dim in pairs]


def _unfolded(outputs: tuple[Tensor, ...], members: int) -> Folded:
    """Outputs with the mapped axis in front again; an absent one is empty and has no batch."""
    parts = tuple(x if x.ndim == 1 else x.unflatten(0, (members, -1)) for x in outputs)
    return parts, tuple(None if x.ndim == 1 else 0 for x in outputs)
