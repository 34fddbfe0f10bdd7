"""The Triton recurrence as torch operators: fake tensors, autograd, and vmap that folds its axis into the batch.

Shape legend: B batch, T time, H heads of v, G heads of q and k, K key, V value width, M rows of a constant decay.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._functorch.autograd_function import enable_single_level_autograd_function
from torch.autograd.function import _SingleLevelFunction

from kernels import walk
from kernels._members import fold_members

STARTS = 5
"""Where the bounds of packed sequences are among the arguments of both operators."""
Folded = tuple[tuple[Tensor, ...], tuple[int | None, ...]]


FORWARD, BACKWARD = "mixer_bench::linear_recurrence", "mixer_bench::linear_recurrence_backward"

torch.library.define(
    FORWARD,
    "(Tensor q, Tensor k, Tensor v, Tensor? log_decay, Tensor? state, Tensor? starts, bool return_state)"
    " -> (Tensor, Tensor, Tensor)",
)
torch.library.define(
    BACKWARD,
    "(Tensor q, Tensor k, Tensor v, Tensor? log_decay, Tensor? state, Tensor? starts, Tensor entering, Tensor do, Tensor? final,"
    " Tensor? dfinal, bool gate_grad) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
linear_recurrence = torch.ops.mixer_bench.linear_recurrence.default
linear_recurrence_backward = torch.ops.mixer_bench.linear_recurrence_backward.default


@torch.library.impl(FORWARD, ("cpu", "cuda"))
def _(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    *tensors, return_state = args
    inputs = walk.Inputs(*tensors)
    with torch.cuda.device_of(inputs.v):  # Triton launches on the current device
        return walk.forward(inputs, return_state=return_state)


@torch.library.register_fake(FORWARD)
def _(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    *tensors, return_state = args
    _, k, v, _, _, starts = inputs = walk.Inputs(*tensors)
    batch, heads, widths = v.shape[0], v.shape[2], (k.shape[3], v.shape[3])
    final = (batch if starts is None else batch * (starts.shape[0] - 1), heads, *widths) if return_state else (0,)
    return v.new_empty(v.shape), v.new_empty(final, dtype=torch.float32), walk.entering_like(inputs)


@torch.library.impl(BACKWARD, ("cpu", "cuda"))
def _(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    inputs, entering, gradients, gate_grad = _backward_arguments(*args)
    with torch.cuda.device_of(inputs.v):
        return walk.backward(inputs, entering, gradients, gate_grad=gate_grad)


@torch.library.register_fake(BACKWARD)
def _(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    (q, k, v, log_decay, state, _), _, _, gate_grad = _backward_arguments(*args)
    dgate = log_decay if gate_grad else None
    more = (v.new_empty(0 if x is None else x.shape, dtype=torch.float32) for x in (dgate, state))
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), *more


def _backward_arguments(*args: Any) -> tuple[walk.Inputs, Tensor, walk.Gradients, bool]:
    """The arguments of the operator's schema as `kernels.walk` takes them."""
    *tensors, entering, do, final, dfinal, gate_grad = args
    return walk.Inputs(*tensors), entering, walk.Gradients(do, final, dfinal), gate_grad


class LinearRecurrence(_SingleLevelFunction):
    """The operator's gradient at one level of `torch.func`, which is what a kernel at the Autograd key sees.

    `torch.library.register_autograd` builds an ordinary Function there, and `torch.func.grad` refuses that.
    """

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
        """See `kernels.walk.forward`."""
        with torch._C._AutoDispatchBelowAutograd():
            return linear_recurrence(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        """Keeps the inputs, from which the backward walks recompute everything but the states between segments."""
        q, k, v, log_decay, state, starts, return_state = inputs
        ctx.mark_non_differentiable(output[2])
        ctx.save_for_backward(q, k, v, log_decay, state, starts, output[2], output[1] if return_state else None)

    @staticmethod
    def backward(ctx: Any, do: Tensor, dfinal: Tensor, _entering: None) -> tuple[Tensor | None, ...]:
        """See `kernels.walk.backward`."""
        *inputs, final = ctx.saved_tensors
        gate_grad = inputs[3] is not None and ctx.needs_input_grad[3]
        more = (None, None) if final is None else (final, dfinal)
        dq, dk, dv, dgate, dstate = linear_recurrence_backward(*inputs, do, *more, gate_grad)
        return dq, dk, dv, dgate if gate_grad else None, None if inputs[4] is None else dstate, None, None


@torch.library.impl(FORWARD, "Autograd")
def _(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    with enable_single_level_autograd_function():
        return LinearRecurrence.apply(*args)


@torch.library.register_vmap(FORWARD)
def _(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Folded:
    return _unfolded(linear_recurrence(*_packed(info.batch_size, in_dims, args)), info.batch_size)


@torch.library.register_vmap(BACKWARD)
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
