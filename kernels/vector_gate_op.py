"""The vector-gate kernels as torch operators: fake tensors, autograd, and vmap that folds its axis into the batch.

Shape legend: B batch, T time, H heads, K key, V value width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._functorch.autograd_function import enable_single_level_autograd_function
from torch.autograd.function import _SingleLevelFunction

from kernels import vector_gate
from kernels.recurrence_op import Folded, _folded, _unfolded

FORWARD, BACKWARD = "mixer_bench::vector_gate_recurrence", "mixer_bench::vector_gate_recurrence_backward"
_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor log_decay, Tensor? beta, Tensor? erase, Tensor? state"

torch.library.define(FORWARD, f"({_INPUTS}, bool return_state) -> (Tensor, Tensor)")
torch.library.define(
    BACKWARD, f"({_INPUTS}, Tensor do, Tensor? dfinal) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
vector_gate_recurrence = torch.ops.mixer_bench.vector_gate_recurrence.default
vector_gate_recurrence_backward = torch.ops.mixer_bench.vector_gate_recurrence_backward.default


@torch.library.impl(FORWARD, ("cpu", "cuda"))
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor | None,
    erase: Tensor | None,
    state: Tensor | None,
    return_state: bool,
) -> tuple[Tensor, Tensor]:
    with torch.cuda.device_of(v):  # Triton launches on the current device
        return vector_gate.forward(q, k, v, log_decay, beta, erase, state, return_state=return_state)


@torch.library.register_fake(FORWARD)
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor | None,
    erase: Tensor | None,
    state: Tensor | None,
    return_state: bool,
) -> tuple[Tensor, Tensor]:
    final = (v.shape[0], v.shape[2], k.shape[3], v.shape[3]) if return_state else (0,)
    return v.new_empty(v.shape), v.new_empty(final, dtype=torch.float32)


@torch.library.impl(BACKWARD, ("cpu", "cuda"))
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor | None,
    erase: Tensor | None,
    state: Tensor | None,
    do: Tensor,
    dfinal: Tensor | None,
) -> tuple[Tensor, ...]:
    with torch.cuda.device_of(v):
        return vector_gate.backward(q, k, v, log_decay, beta, erase, state, do, dfinal)


@torch.library.register_fake(BACKWARD)
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor | None,
    erase: Tensor | None,
    state: Tensor | None,
    do: Tensor,
    dfinal: Tensor | None,
) -> tuple[Tensor, ...]:
    nothing = v.new_empty(0, dtype=torch.float32)
    more = (nothing if x is None else x.new_empty(x.shape) for x in (beta, erase, state))
    return *(x.new_empty(x.shape) for x in (q, k, v, log_decay)), *more


class VectorGateRecurrence(_SingleLevelFunction):
    """The operator's gradient at one level of `torch.func`; see `kernels.recurrence_op.LinearRecurrence`."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        """See `kernels.vector_gate.forward`."""
        with torch._C._AutoDispatchBelowAutograd():
            return vector_gate_recurrence(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        """Keeps the inputs, from which the backward walks recompute everything."""
        *tensors, ctx.return_state = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, do: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
        """See `kernels.vector_gate.backward`."""
        inputs = ctx.saved_tensors
        found = vector_gate_recurrence_backward(*inputs, do, dfinal if ctx.return_state else None)
        return *(None if x is None else dx for x, dx in zip(inputs, found, strict=True)), None


@torch.library.impl(FORWARD, "Autograd")
def _(*args: Any) -> tuple[Tensor, Tensor]:
    with enable_single_level_autograd_function():
        return VectorGateRecurrence.apply(*args)


@torch.library.register_vmap(FORWARD)
def _(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Folded:
    return _unfolded(vector_gate_recurrence(*_folded(info.batch_size, in_dims, args)), info.batch_size)


@torch.library.register_vmap(BACKWARD)
def _(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Folded:
    return _unfolded(vector_gate_recurrence_backward(*_folded(info.batch_size, in_dims, args)), info.batch_size)
