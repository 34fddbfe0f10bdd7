"""The Triton delta rule as torch operators: fake tensors, autograd, and vmap that folds its axis into the batch.

Shape legend: B batch, T time, H heads of v, G heads of q and k, K key, V value width, M rows of a constant decay.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from kernels._ahead import other_sizes
from kernels._operator import operator
from kernels.delta_rule import delta
from kernels.walks.recurrence_op import Folded, _folded, _unfolded, decays_of

Six = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def delta_rule(
    q_BTGK: Tensor,
    k_BTGK: Tensor,
    v_BTHV: Tensor,
    beta_BTH: Tensor,
    log_decay: Tensor | None,
    state_BHKV: Tensor | None,
    return_state: bool,
) -> tuple[Tensor, Tensor]:
    """See `kernels.delta_rule.delta.forward`; whether a backward pass needs more is found out by autograd."""
    return _delta_rule(q_BTGK, k_BTGK, v_BTHV, beta_BTH, log_decay, state_BHKV, return_state, False)[:2]


@operator("mixer_bench::delta_rule")
def _delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    state: Tensor | None,
    return_state: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `kernels.delta_rule.delta.forward`."""
    with torch.cuda.device_of(v):  # Triton launches on the current device
        o, final, kept = delta.forward(q, k, v, beta, log_decay, state, return_state=return_state, keep=keep)
    return o, final, kept.memory


@_delta_rule.register_fake
def _(q, k, v, beta, log_decay, state, return_state, keep) -> tuple[Tensor, Tensor, Tensor]:
    final = (v.shape[0], v.shape[2], k.shape[3], v.shape[3]) if return_state else (0,)
    memory = delta.kept_memory(q, k, v, log_decay, keep=keep)
    return v.new_empty(v.shape), v.new_empty(final, dtype=torch.float32), memory


@operator("mixer_bench::delta_rule_backward")
def _delta_rule_backward(
    q: Tensor,
    k: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    state: Tensor | None,
    memory: Tensor,
    do: Tensor,
    dfinal: Tensor | None,
    gate_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `kernels.delta_rule.delta.backward`."""
    with torch.cuda.device_of(do):
        kept = delta.kept_in(memory, q, k, do, log_decay, keep=True)
        return delta.backward(q, k, beta, log_decay, state, kept, do, dfinal, gate_grad=gate_grad)


@_delta_rule_backward.register_fake
def _(q, k, beta, log_decay, state, memory, do, dfinal, gate_grad) -> Six:
    dgate = log_decay if gate_grad else None
    more = (do.new_empty(0 if x is None else x.shape, dtype=torch.float32) for x in (dgate, state))
    dq, dk, dv, dbeta = (x.new_empty(x.shape) for x in (q, k, do, beta))
    return dq, dk, dv, dbeta, *more


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    """Keeps what the forward pass kept; the errors stand for the values."""
    q, k, v, beta, log_decay, state, *_ = inputs
    ctx.shape, ctx.dtype = v.shape, v.dtype
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)  # zeros for what is kept would be most of the memory that is written
    ctx.save_for_backward(q, k, beta, log_decay, state, output[2])


def _differentiate(ctx: Any, do: Tensor | None, dfinal: Tensor | None, _memory: None) -> tuple[Tensor | None, ...]:
    q, k, beta, log_decay, state, memory = ctx.saved_tensors
    gate_grad = log_decay is not None and ctx.needs_input_grad[4]
    if do is None:
        do = q.new_zeros(ctx.shape, dtype=ctx.dtype)
    dq, dk, dv, dbeta, dgate, dstate = _delta_rule_backward(q, k, beta, log_decay, state, memory, do, dfinal, gate_grad)
    return dq, dk, dv, dbeta, dgate if gate_grad else None, None if state is None else dstate, None, None


_delta_rule.register_autograd(_differentiate, setup_context=_save, keep=True)


@_delta_rule.register_sizes
def _(q, k, v, beta, log_decay, state, return_state, keep) -> Iterator[tuple[Any, ...]]:
    """How many heads there are for the multiprocessors decides on tiles and segments."""
    for other in other_sizes(k.shape[2], v.shape[2]):
        rows = [other.of(x, axes) for x, axes in ((q, "BTG"), (k, "BTG"), (v, "BTH"), (beta, "BTH"))]
        yield *rows, decays_of(other, log_decay), other.of(state, "BH"), return_state, keep


@_delta_rule.register_vmap
def _(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Folded:
    return _unfolded(_delta_rule(*_folded(info.batch_size, in_dims, args)), info.batch_size)


@_delta_rule_backward.register_vmap
def _(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Folded:
    return _unfolded(_delta_rule_backward(*_folded(info.batch_size, in_dims, args)), info.batch_size)
