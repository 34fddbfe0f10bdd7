"""Diagonal plus rank one (RWKV-7) behind the dispatcher: its Triton form is the vector-gate delta rule on twice as many tokens.

    S_t = (Diag(decay_t) + a_t b_t^T) S_{t-1} + k_t v_t^T

A token becomes an erasure with the keys -b, which reads S_{t-1}, decays, and writes what it read under the key a; and then
a plain write of v under k, which q reads.

Shape legend: B batch, T time, H heads, K key, V value width.
"""

from __future__ import annotations

from torch import Tensor

from kernels import chunked, dispatch, reference
from kernels._arguments import check_arguments, check_axes, check_same, remembered
from kernels.step import is_step, recurrent_step
from kernels.vector_gates import dplr_op
from kernels.walks.walk import MAX_WIDTH

CHUNK = chunked.CHUNK
OPERATION = "dplr_recurrence"


def dplr_recurrence(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    a_BTHK: Tensor,
    b_BTHK: Tensor,
    *,
    log_decay_BTHK: Tensor,
    state_BHKV: Tensor | None = None,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor | None]:
    """The recurrence above with o_t = S_t^T q_t; see `kernels.reference.dplr_reference`.

    Args:
        q_BTHK: queries.
        k_BTHK: keys of the write.
        v_BTHV: values.
        a_BTHK: left vector of the rank-one transition.
        b_BTHK: right vector of the rank-one transition.
        log_decay_BTHK: natural log of the diagonal, <= 0 and finite.
        state_BHKV: S_0; None means "from zero, and return no state".
        chunk: longest chunk of the torch form, a power of two; the Triton form has its own.

    Returns:
        The outputs [B, T, H, V] in the dtype of v, and the final state [B, H, K, V] in that of the given one or None.

    Raises:
        ValueError: tensors that do not belong together, or a forced backend that cannot run them.
    """
    _check(q_BTHK, k_BTHK, v_BTHV, a_BTHK, b_BTHK, log_decay_BTHK, state_BHKV)
    if is_step(v_BTHV.shape[1], state_BHKV, q_BTHK, k_BTHK, v_BTHV, a_BTHK, b_BTHK, log_decay_BTHK):
        q, k, v, a, b, log_decay = (x[:, 0] for x in (q_BTHK, k_BTHK, v_BTHV, a_BTHK, b_BTHK, log_decay_BTHK))
        o, new = recurrent_step(q, k, v, state_BHKV, log_decay=log_decay, rank_one=(a, b))
        return o[:, None], new
    width = max(k_BTHK.shape[3], v_BTHV.shape[3])
    obstacle = f"head dim {width} is above {MAX_WIDTH}" if width > MAX_WIDTH else None
    backend = dispatch.pick(OPERATION, v_BTHV, obstacle=obstacle, tensor_cores=True)
    inputs = (q_BTHK, k_BTHK, v_BTHV, a_BTHK, b_BTHK)
    if backend == "triton":
        return _triton(*inputs, log_decay_BTHK, state_BHKV)
    if backend == "chunked":
        return chunked.dplr_recurrence(*inputs, log_decay_BTHK=log_decay_BTHK, state_BHKV=state_BHKV, chunk=chunk)
    o, final = reference.dplr_reference(*inputs, log_decay_BTHK=log_decay_BTHK, state_BHKV=state_BHKV)
    return o, None if state_BHKV is None else final


def _triton(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, log_decay: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The operator's fp32 states."""
    wide = None if state is None else state.float()
    o, final = dplr_op.dplr_recurrence(q, k, v, a, b, log_decay, wide, state is not None)
    return o, None if state is None else final.to(state.dtype)


@remembered
def _check(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, log_decay: Tensor, state: Tensor | None) -> None:
    """Refuses shapes, dtypes and devices that do not belong together, naming the argument."""
    check_axes("v", v, "B T H V")
    check_axes("q", q, "B T H K")
    check_same("k", k, "q", q)
    rows = (*v.shape[:3], q.shape[3])
    named = (("q", q), ("k", k), ("a", a), ("b", b), ("log_decay", log_decay))
    expected = {name: (x, rows) for name, x in named} | {"state": (state, (v.shape[0], *rows[2:], v.shape[3]))}
    check_arguments(v, expected, first="v")
