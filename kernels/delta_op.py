"""The Triton delta rule as torch operators: fake tensors, autograd, and vmap that folds its axis into the batch.

Shape legend: B batch, T time, H heads of v, G heads of q and k, K key, V value width, M rows of a constant decay.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._functorch.autograd_function import enable_single_level_autograd_function
from torch.autograd.function import _SingleLevelFunction

from kernels import delta
from kernels.recurrence_op import Folded, _folded, _unfolded

FORWARD, BACKWARD = "mixer_bench::delta_rule", "mixer_bench::delta_rule_backward"
Six = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]

torch.library.define(
    FORWARD,
    "(Tensor q, Tensor k, Tensor v, Tensor beta, Tensor? log_decay, Tensor? state, bool return_state, bool keep)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
torch.library.define(
    BACKWARD,
    "(Tensor q, Tensor k, Tensor beta, Tensor? log_decay, Tensor? state, Tensor couplings, Tensor decays, Tensor errors,"
    " Tensor states, Tensor do, Tensor? dfinal, bool gate_grad) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
_delta_rule = torch.ops.mixer_bench.delta_rule.default
_delta_rule_backward = torch.ops.mixer_bench.delta_rule_backward.default


def delta_rule(
    q_BTGK: Tensor,
    k_BTGK: Tensor,
    v_BTHV: Tensor,
    beta_BTH: Tensor,
    log_decay: Tensor | None,
    state_BHKV: Tensor | None,
    return_state: bool,
) -> tuple[Tensor, Tensor]:
    """See `kernels.delta.forward`; whether a backward pass needs more is found out by autograd."""
    return _delta_rule(q_BTGK, k_BTGK, v_BTHV, beta_BTH, log_decay, state_BHKV, return_state, False)[:2]


# Types are those of the schemas above.
@torch.library.impl(FORWARD, ("cpu", "cuda"))
def _(q, k, v, beta, log_decay, state, return_state, keep) -> Six:
    with torch.cuda.device_of(v):  # Triton launches on the current device
        o, final, kept = delta.forward(q, k, v, beta, log_decay, state, return_state=return_state, keep=keep)
    return o, final, *kept


@torch.library.register_fake(FORWARD)
def _(q, k, v, beta, log_decay, state, return_state, keep) -> Six:
    final = (v.shape[0], v.shape[2], k.shape[3], v.shape[3]) if return_state else (0,)
    kept = delta.kept_like(q, k, v, log_decay, keep=keep)
    return v.new_empty(v.shape), v.new_empty(final, dtype=torch.float32), *kept


@torch.library.impl(BACKWARD, ("cpu", "cuda"))
def _(q, k, beta, log_decay, state, couplings, decays, errors, states, do, dfinal, gate_grad) -> Six:
    kept = delta.Kept(couplings, decays, errors, states)
    with torch.cuda.device_of(do):
        return delta.backward(q, k, beta, log_decay, state, kept, do, dfinal, gate_grad=gate_grad)


@torch.library.register_fake(BACKWARD)
def _(q, k, beta, log_decay, state, couplings, decays, errors, states, do, dfinal, gate_grad) -> Six:
    dgate = log_decay if gate_grad else None
    more = (do.new_empty(0 if x is None else x.shape, dtype=torch.float32) for x in (dgate, state))
    dq, dk, dv, dbeta = (x.new_empty(x.shape) for x in (q, k, do, beta))
    return dq, dk, dv, dbeta, *more


class DeltaRule(_SingleLevelFunction):
    """The operator's gradient at one level of `torch.func`, like `kernels.recurrence_op.LinearRecurrence`."""

    @staticmethod
    def forward(
        q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None, state: Tensor | None, return_state: bool
    ) -> Six:
        """See `kernels.delta.forward`."""
        with torch._C._AutoDispatchBelowAutograd():
            return _delta_rule(q, k, v, beta, log_decay, state, return_state, True)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Six) -> None:
        """Keeps what the forward pass kept; the errors stand for the values."""
        q, k, v, beta, log_decay, state, _ = inputs
        ctx.shape, ctx.dtype = v.shape, v.dtype
        ctx.mark_non_differentiable(*output[2:])
        ctx.set_materialize_grads(False)  # zeros for what is kept would be most of the memory that is written
        ctx.save_for_backward(q, k, beta, log_decay, state, *output[2:])

    @staticmethod
    def backward(ctx: Any, do: Tensor | None, dfinal: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        """See `kernels.delta.backward`."""
        q, k, beta, log_decay, state, *kept = ctx.saved_tensors
        gate_grad = log_decay is not None and ctx.needs_input_grad[4]
        if do is None:
            do = q.new_zeros(ctx.shape, dtype=ctx.dtype)
        dq, dk, dv, dbeta, dgate, dstate = _delta_rule_backward(q, k, beta, log_decay, state, *kept, do, dfinal, gate_grad)
        return dq, dk, dv, dbeta, dgate if gate_grad else None, None if state is None else dstate, None


@torch.library.impl(FORWARD, "Autograd")
def _(*args: Any) -> Six:
    *tensors, return_state, _ = args
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        with enable_single_level_autograd_function():
            return DeltaRule.apply(*tensors, return_state)
    with torch._C._AutoDispatchBelowAutograd():
        return _delta_rule(*args)


@torch.library.register_vmap(FORWARD)
def _(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Folded:
    return _unfolded(_delta_rule(*_folded(info.batch_size, in_dims, args)), info.batch_size)


@torch.library.register_vmap(BACKWARD)
def _(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Folded:
    return _unfolded(_delta_rule_backward(*_folded(info.batch_size, in_dims, args)), info.batch_size)
