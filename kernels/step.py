"""One token of the recurrence: the state is read once, written once, and in place where the caller allows it.

Decoding with a state of constant size is bound by the state's bytes, 2 H K V of them a sequence, so nothing else may touch it.

Shape legend: B batch, H heads of v and of the state, G heads of q and k (G divides H), K key, V value width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from kernels import dispatch
from kernels._arguments import check_arguments, check_axes, check_same
from kernels.steps.step_operator import MAX_KEYS, STATE_DTYPES, step_in_place, step_operator

OPERATION = "recurrent_step"
_in_place = False


@contextmanager
def states_in_place() -> Iterator[None]:
    """Inside the block, and without gradients, a step may write over the state that it is given.

    For decoding loops that hold their states in fixed buffers: the state that comes back is then the given tensor.
    """
    global _in_place  # noqa: PLW0603 - one switch for the process, like torch's own backend switches
    before, _in_place = _in_place, True
    try:
        yield
    finally:
        _in_place = before


def may_write() -> bool:
    """Whether `states_in_place` holds and no gradient is to come."""
    return _in_place and not torch.is_grad_enabled()


def is_step(length: int, state: Tensor | None, *inputs: Tensor | None) -> bool:
    """Whether a call of a recurrence is a decoding step: one token after a state, with no gradient to come."""
    tracked = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (state, *inputs))
    return length == 1 and state is not None and not tracked


def recurrent_step(
    q_BGK: Tensor,
    k_BGK: Tensor,
    v_BHV: Tensor,
    state_BHKV: Tensor,
    *,
    log_decay: Tensor | None = None,
    beta_BH: Tensor | None = None,
    rank_one: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """S' = (I - beta k k^T) decay S + beta k v^T, o = S'^T q, for one token; see `kernels.reference`.

    Products and sums are made in fp32. There is no gradient: `kernels.recurrence` takes its other forms where one is needed.

    Args:
        q_BGK: query; fewer heads than v (G < H) are shared by groups.
        k_BGK: key.
        v_BHV: value.
        state_BHKV: S, in fp32, bf16 or fp16; read in that dtype and rounded to it.
        log_decay: natural log of the decay, <= 0: None, [H], [B, H] or [B, H, K].
        beta_BH: write strength of the delta rule, or None for no erasure and unit writes.
        rank_one: a and b, [B, H, K] each; adds a b^T S to S' (RWKV-7).

    Returns:
        The output [B, H, V] in the dtype of v, and S' in that of S: a new tensor, or S itself inside `states_in_place`.

    Raises:
        ValueError: shapes or devices do not match.
    """
    a_BHK, b_BHK = rank_one or (None, None)
    inputs = (q_BGK, k_BGK, v_BHV, log_decay, beta_BH, a_BHK, b_BHK)
    _check(*inputs, state_BHKV)
    if log_decay is not None and log_decay.ndim == 1:
        inputs = (*inputs[:3], log_decay.expand(v_BHV.shape[:2]), *inputs[4:])
    if dispatch.pick(OPERATION, v_BHV, obstacle=step_obstacle(state_BHKV)) != "triton":
        o_BHV, new_BHKV = recurrent_step_reference(*inputs, state_BHKV)
        return o_BHV, state_BHKV.copy_(new_BHKV) if may_write() else new_BHKV
    if may_write() and state_BHKV.is_contiguous():
        return step_in_place(*inputs, state_BHKV), state_BHKV
    return step_operator(*inputs, state_BHKV)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    state: Tensor,
) -> None:
    """Refuses shapes and devices that do not belong together, naming the argument."""
    check_axes("v", v, "B H V")
    check_axes("k", k, "B G K")
    check_same("k", k, "q", q)
    batch, heads, v_dim = v.shape
    groups, k_dim = k.shape[1:]
    if heads % groups:
        raise ValueError(f"k has {groups} heads and v {heads}; the heads of v must be a multiple of those of k")
    gate = {1: (heads,), 2: (batch, heads)}.get(0 if log_decay is None else log_decay.ndim, (batch, heads, k_dim))
    expected: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        "q": (q, (batch, groups, k_dim)),
        "k": (k, (batch, groups, k_dim)),
        "state": (state, (batch, heads, k_dim, v_dim)),
        "beta": (beta, (batch, heads)),
        "log_decay": (log_decay, gate),
        "a": (a, (batch, heads, k_dim)),
        "b": (b, (batch, heads, k_dim)),
    }
    check_arguments(v, expected, first="v")


def step_obstacle(state_BHKV: Tensor) -> str | None:
    """What keeps a step from its Triton kernel."""
    if (k_dim := state_BHKV.shape[2]) > MAX_KEYS:
        return f"key width {k_dim} is above {MAX_KEYS}"
    return None if state_BHKV.dtype in STATE_DTYPES else f"the state's dtype {state_BHKV.dtype} is not float32, bfloat16 or float16"


def recurrent_step_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    state: Tensor,
) -> tuple[Tensor, Tensor]:
    """The torch form, in fp32 or better."""
    wide = torch.promote_types(v.dtype, torch.float32)
    repeats = v.shape[1] // k.shape[1]
    q_BHK, k_BHK = (x.to(wide).repeat_interleave(repeats, dim=1) for x in (q, k))
    s_BHKV, u_BHV, turned_BHKV = state.to(wide), v.to(wide), None
    if a is not None and b is not None:
        turned_BHKV = a.to(wide)[..., None] * (b.to(wide)[..., None] * s_BHKV).sum(-2, keepdim=True)
    if log_decay is not None:
        decay = log_decay.to(wide).exp()
        s_BHKV = s_BHKV * (decay[..., None, None] if decay.ndim == 2 else decay[..., None])
    if beta is not None:
        u_BHV = beta.to(wide)[..., None] * (u_BHV - (k_BHK[..., None] * s_BHKV).sum(-2))
    s_BHKV = s_BHKV + k_BHK[..., None] * u_BHV[..., None, :]
    if turned_BHKV is not None:
        s_BHKV = s_BHKV + turned_BHKV
    return (q_BHK[..., None] * s_BHKV).sum(-2).to(v.dtype), s_BHKV.to(state.dtype)
