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
_KEPT = ", ".join(f"Tensor {name}" for name in vector_gate.Kept._fields)

torch.library.define(FORWARD, f"({_INPUTS}, bool return_state, bool keep) -> ({', '.join(['Tensor'] * 11)})")
torch.library.define(
    BACKWARD, f"({_INPUTS}, {_KEPT}, Tensor do, Tensor? dfinal) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_recurrence = torch.ops.mixer_bench.vector_gate_recurrence.default
_recurrence_backward = torch.ops.mixer_bench.vector_gate_recurrence_backward.default


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
    """See `kernels.vector_gate.forward`; whether a backward pass needs more is found out by autograd."""
    return _recurrence(q_BTHK, k_BTHK, v_BTHV, log_decay_BTHK, beta_BTH, erase_BTHK, state_BHKV, return_state, False)[:2]


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
    keep: bool,
) -> tuple[Tensor, ...]:
    with torch.cuda.device_of(v):  # Triton launches on the current device
        o, final, kept = vector_gate.forward(q, k, v, log_decay, beta, erase, state, return_state=return_state, keep=keep)
    return o, final, *kept


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
    keep: bool,
) -> tuple[Tensor, ...]:
    final = (v.shape[0], v.shape[2], k.shape[3], v.shape[3]) if return_state else (0,)
    kept = vector_gate.kept_like(q, k, v, delta=beta is not None, keep=keep)
    return v.new_empty(v.shape), v.new_empty(final, dtype=torch.float32), *kept


@torch.library.impl(BACKWARD, ("cpu", "cuda"))
def _(*args: Any) -> tuple[Tensor, ...]:
    inputs, kept, (do, dfinal) = args[:7], vector_gate.Kept(*args[7:-2]), args[-2:]
    with torch.cuda.device_of(do):
        return vector_gate.backward(*inputs, kept, do, dfinal)


@torch.library.register_fake(BACKWARD)
def _(*args: Any) -> tuple[Tensor, ...]:
    q, k, v, log_decay, beta, erase, state = args[:7]
    nothing = v.new_empty(0, dtype=torch.float32)
    more = (nothing if x is None else x.new_empty(x.shape) for x in (beta, erase, state))
    return *(x.new_empty(x.shape) for x in (q, k, v, log_decay)), *more


class VectorGateRecurrence(_SingleLevelFunction):
    """The operator's gradient at one level of `torch.func`; see `kernels.recurrence_op.LinearRecurrence`."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        """See `kernels.vector_gate.forward`."""
        with torch._C._AutoDispatchBelowAutograd():
            return _recurrence(*args, True)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Keeps the inputs, and what the forward pass kept."""
        ctx.mark_non_differentiable(*output[2:])
        ctx.set_materialize_grads(False)  # zeros for what is kept would be most of the memory that is written
        ctx.save_for_backward(*inputs[:-1], *output[2:])

    @staticmethod
    def backward(ctx: Any, do: Tensor | None, dfinal: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        """See `kernels.vector_gate.backward`."""
        saved = ctx.saved_tensors
        found = _recurrence_backward(*saved, torch.zeros_like(saved[2]) if do is None else do, dfinal)
        return *(None if x is None else dx for x, dx in zip(saved[:7], found, strict=True)), None


@torch.library.impl(FORWARD, "Autograd")
def _(*args: Any) -> tuple[Tensor, ...]:
    *inputs, _ = args
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in inputs):
        with enable_single_level_autograd_function():
            return VectorGateRecurrence.apply(*inputs)
    with torch._C._AutoDispatchBelowAutograd():
        return _recurrence(*args)


@torch.library.register_vmap(FORWARD)
def _(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Folded:
    return _unfolded(_recurrence(*_folded(info.batch_size, in_dims, args)), info.batch_size)


@torch.library.register_vmap(BACKWARD)
def _(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Folded:
    return _unfolded(_recurrence_backward(*_folded(info.batch_size, in_dims, args)), info.batch_size)
