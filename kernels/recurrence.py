"""The recurrences behind one door: arguments are checked, then `kernels.dispatch` picks the form that runs.

Shape legend: B batch, T time, H heads of v and of the state, G heads of q and k (G divides H), K key, V value width.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from kernels import chunked, dispatch, reference
from kernels._arguments import check_arguments, check_axes, check_same, remembered
from kernels.delta_rule import delta_op
from kernels.packing import check_packing, run_padded
from kernels.step import is_step, recurrent_step
from kernels.vector_gates import vector_gate_op
from kernels.walks import recurrence_op
from kernels.walks.walk import MAX_WIDTH

CHUNK = chunked.CHUNK
NARROW = 128
"""Widest heads of the delta rule's 16-bit walks; wider ones are computed in fp32, which takes some twenty times as long."""
OPERATION = "linear_recurrence"


def linear_recurrence(
    q_BTGK: Tensor,
    k_BTGK: Tensor,
    v_BTHV: Tensor,
    *,
    log_decay: Tensor | None = None,
    beta_BTH: Tensor | None = None,
    state_BHKV: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor | None]:
    """S_t = decay_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T, o_t = S_t^T q_t; see `kernels.reference`.

    Args:
        q_BTGK: queries; fewer heads than v (G < H) are shared by groups, without decay or with a scalar one.
        k_BTGK: keys.
        v_BTHV: values.
        log_decay: natural log of the decay, <= 0 and finite: None, [H], [B, T, H] or [B, T, H, K].
        beta_BTH: write strength of the delta rule, or None for no erasure and unit writes. beta |k|^2 of at most 2 is assumed, as
            keys of unit length have it: what erases more grows from token to token, and some forms solve without decays.
        state_BHKV: S_0; None means "from zero, and return no state", as for `Mixer.forward`.
        cu_seqlens: where each of N sequences that are packed into one row starts, and the end of the last, [N + 1] in int32 or
            int64; B is 1 then, and states are [N, H, K, V]. The kernels without the delta rule and with at most a scalar decay
            start anew at each bound; all other forms run the sequences as a padded batch (`kernels.packing`).
        chunk: longest chunk of the torch form, a power of two; the Triton form has its own.

    Returns:
        The outputs [B, T, H, V] in the dtype of v, and the final state [B, H, K, V] in that of the given one or None.

    Raises:
        ValueError: tensors that do not belong together, or a forced backend that cannot run them.
    """
    if chunk < 1 or chunk & (chunk - 1):
        raise ValueError(f"chunk={chunk}; it must be a power of two")
    if cu_seqlens is not None:
        _check_packed(q_BTGK, k_BTGK, v_BTHV, log_decay, beta_BTH, state_BHKV, cu_seqlens)
        return _packed(q_BTGK, k_BTGK, v_BTHV, log_decay, beta_BTH, state_BHKV, cu_seqlens, chunk)
    _check(q_BTGK, k_BTGK, v_BTHV, log_decay, beta_BTH, state_BHKV, None)
    if is_step(v_BTHV.shape[1], state_BHKV, q_BTGK, k_BTGK, v_BTHV, log_decay, beta_BTH):
        return _step(q_BTGK, k_BTGK, v_BTHV, log_decay, beta_BTH, state_BHKV)
    backend = dispatch.pick(OPERATION, v_BTHV, obstacle=_obstacle(k_BTGK, v_BTHV), tensor_cores=True)
    if backend == "triton" and log_decay is not None and log_decay.ndim == 4:
        return _vector_gate(q_BTGK, k_BTGK, v_BTHV, log_decay, beta_BTH, state_BHKV)
    if backend == "triton":
        return _triton(q_BTGK, k_BTGK, v_BTHV, log_decay, beta_BTH, state_BHKV, None)
    named = {"log_decay": log_decay, "beta_BTH": beta_BTH, "state_BHKV": state_BHKV}
    if backend == "chunked":
        return chunked.linear_recurrence(q_BTGK, k_BTGK, v_BTHV, chunk=chunk, **named)
    o, final = reference.linear_recurrence_reference(q_BTGK, k_BTGK, v_BTHV, **named)
    return o, None if state_BHKV is None else final


def _packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor,
    chunk: int,
) -> tuple[Tensor, Tensor | None]:
    """Packed sequences: by kernels that know them, else as a padded batch."""
    if beta is None and (log_decay is None or log_decay.ndim != 4):
        backend = dispatch.pick(OPERATION, v, obstacle=_obstacle(k, v), tensor_cores=True)
        if backend == "triton":
            return _triton(q, k, v, log_decay, None, state, cu_seqlens)
    named = {"log_decay": log_decay, "beta_BTH": beta, "state_BHKV": state}
    return run_padded(partial(linear_recurrence, chunk=chunk), cu_seqlens, q, k, v, **named)


def normalized_recurrence(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    *,
    log_decay: Tensor | None = None,
    state: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
    """Numerators and denominators of normalised linear attention: the recurrence of v, and of a column of ones.

    Args:
        q_BTHK: queries.
        k_BTHK: keys.
        v_BTHV: values; in fp32 if the quotient is to be exact.
        log_decay: as for `linear_recurrence`.
        state: sums of k v^T [B, H, K, V] and of k [B, H, K] so far; None means "from zero, and return none".

    Returns:
        [B, T, H, V], [B, T, H, 1], and the sums after the last token in the dtype of those given, or None.

    Raises:
        ValueError: tensors that do not belong together, or a forced backend that cannot run them.
    """
    _check(q_BTHK, k_BTHK, v_BTHV, log_decay, None, None, None)
    if state is not None:
        (batch, _, heads, v_dim), k_dim = v_BTHV.shape, k_BTHK.shape[3]
        shapes = ((batch, heads, k_dim, v_dim), (batch, heads, k_dim))
        check_arguments(v_BTHV, {f"state[{i}]": (x, shapes[i]) for i, x in enumerate(state)}, first="v")
    ones_BTH1 = torch.ones_like(v_BTHV[..., :1])
    if state is not None and is_step(v_BTHV.shape[1], state[0], state[1], q_BTHK, k_BTHK, v_BTHV, log_decay):
        # Joined, a single token would copy the whole state twice.
        o, s = linear_recurrence(q_BTHK, k_BTHK, v_BTHV, log_decay=log_decay, state_BHKV=state[0])
        n, z = linear_recurrence(q_BTHK, k_BTHK, ones_BTH1, log_decay=log_decay, state_BHKV=state[1][..., None])
        assert s is not None and z is not None
        return o, n, (s, z[..., 0])
    joined = None if state is None else torch.cat((state[0], state[1][..., None]), -1)
    v1 = torch.cat((v_BTHV, ones_BTH1), -1)
    o, sums = linear_recurrence(q_BTHK, k_BTHK, v1, log_decay=log_decay, state_BHKV=joined)
    return o[..., :-1], o[..., -1:], None if sums is None else (sums[..., :-1], sums[..., -1])


def _step(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, beta: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
    """A single token, with the time axis taken off and put back."""
    log_decay = log_decay if log_decay is None or log_decay.ndim == 1 else log_decay[:, 0]
    o, new = recurrent_step(q[:, 0], k[:, 0], v[:, 0], state, log_decay=log_decay, beta_BH=None if beta is None else beta[:, 0])
    return o[:, None], new


def _triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """The operators' fp32 decays, with an axis of rows for a constant one, and fp32 states."""
    if log_decay is not None:
        log_decay = (log_decay[None] if log_decay.ndim == 1 else log_decay).float()
    wide = None if state is None else state.float()
    if beta is not None:
        o, final = _delta_rule(q, k, v, beta, log_decay, wide, state is not None)
    else:
        o, final, _ = recurrence_op.linear_recurrence(q, k, v, log_decay, wide, cu_seqlens, state is not None)
    return o, None if state is None else final.to(state.dtype)


def _delta_rule(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None, state: Tensor | None, return_state: bool
) -> tuple[Tensor, Tensor]:
    """`delta_op.delta_rule`, with values that are too wide for its 16-bit walks in parts.

    Columns of the state have nothing to do with each other, so the parts are heads that share queries, keys, betas and decays.
    """
    heads, width = v.shape[2:]
    parts = -(-width // NARROW)
    if parts == 1 or width % parts or k.shape[3] > NARROW or q.dtype == k.dtype == v.dtype == torch.float32:
        return delta_op.delta_rule(q, k, v, beta, log_decay, state, return_state)
    each = v.unflatten(3, (parts, -1)).flatten(2, 3)
    betas, decays = (None if x is None else x[..., None].expand(*x.shape, parts).flatten(-2) for x in (beta, log_decay))
    first = None if state is None else state.unflatten(3, (parts, -1)).movedim(3, 2).flatten(1, 2)
    o, final = delta_op.delta_rule(q, k, each, betas, decays, first, return_state)
    if return_state:
        final = final.unflatten(1, (heads, parts)).movedim(2, 3).flatten(3)
    return o.unflatten(2, (heads, parts)).flatten(3), final


def _vector_gate(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor | None, state: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The operator's fp32 states."""
    wide = None if state is None else state.float()
    o, final = vector_gate_op.vector_gate_recurrence(q, k, v, log_decay, beta, None, wide, state is not None)
    return o, None if state is None else final.to(state.dtype)


def _obstacle(k: Tensor, v: Tensor) -> str | None:
    """What keeps a call from the Triton kernels."""
    if (width := max(k.shape[3], v.shape[3])) > MAX_WIDTH:
        return f"head dim {width} is above {MAX_WIDTH}"
    return None


def _check_packed(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, beta: Tensor | None, state: Tensor | None, cu_seqlens: Tensor
) -> None:
    """The same of packed sequences, whose bounds are values."""
    check_axes("v", v, "B T heads width")
    check_packing(cu_seqlens, v)
    _check(q, k, v, log_decay, beta, state, cu_seqlens.shape[0] - 1)


@remembered
def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    state: Tensor | None,
    sequences: int | None,
) -> None:
    """Refuses shapes, dtypes and devices that do not belong together, naming the argument; states are those of `sequences`."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_axes(name, x, "B T heads width")
    check_same("k", k, "q", q)
    batch, length, heads, v_dim = v.shape
    groups, k_dim = k.shape[2:]
    if heads % groups:
        raise ValueError(f"k has shape {tuple(k.shape)} and v {tuple(v.shape)}; the heads of v must be a multiple of those of k")
    decays = {1: (heads,), 3: (batch, length, heads)}.get(0 if log_decay is None else log_decay.ndim, (batch, length, heads, k_dim))
    expected = {
        "k": (k, (batch, length, groups, k_dim)),
        "q": (q, (batch, length, groups, k_dim)),
        "log_decay": (log_decay, decays),
        "beta": (beta, (batch, length, heads)),
        "state": (state, (batch if sequences is None else sequences, heads, k_dim, v_dim)),
    }
    check_arguments(v, expected, first="v")
    if log_decay is not None and log_decay.ndim == 4 and groups != heads:
        raise ValueError(
            f"q and k have {groups} heads and v {heads}; under a decay per key channel they must agree, so repeat q and k"
        )
