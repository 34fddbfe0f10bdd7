"""Linear attention with second-order Taylor features of exp, and its feature map (Arora et al. 2024, BASED, section 4).

phi(q) . phi(k) = 1 + s + s^2 / 2 with s = q . k / sqrt(K). The second-order features are symmetric in their two indices, so
each unordered pair is stored once: F = 1 + K + K (K + 1) / 2, where the public code of the paper stores all K^2 pairs.

Shape legend: B batch, T time, H heads, K width of q and k before the map, F features, V value width, R rows of the kernels'
sums (`kernels.taylor_features.taylor_triton`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import chunked, dispatch
from kernels._arguments import check_arguments, check_axes, check_same, remembered
from kernels.chunks.chunk_decay import Lift
from kernels.recurrence import linear_recurrence, normalized_recurrence
from kernels.reference import linear_recurrence_reference
from kernels.step import is_step

OPERATION = "taylor_attention"
CHUNK = 256
"""Tokens of a chunk of the torch form: many features cost more per token than a long quadratic chunk."""

Sums = tuple[Tensor, Tensor | None]


def n_features(k_dim: int) -> int:
    """F."""
    return 1 + k_dim + k_dim * (k_dim + 1) // 2


def features(x: Tensor) -> Tensor:
    """Phi of [..., K]: [..., F], in fp32 or better."""
    x = x.to(torch.promote_types(x.dtype, torch.float32)) * x.shape[-1] ** -0.25
    first, second = torch.triu_indices(x.shape[-1], x.shape[-1], device=x.device).unbind(0)
    weight = torch.ones_like(first, dtype=x.dtype).masked_fill(first == second, 0.5**0.5)
    return torch.cat((torch.ones_like(x[..., :1]), x, x[..., first] * x[..., second] * weight), dim=-1)


def scores(dots: Tensor, k_dim: int) -> Tensor:
    """phi(q) . phi(k) from q . k."""
    s = dots * k_dim**-0.5
    return 1 + s + 0.5 * s.square()


def taylor_attention(
    q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, *, eps: float | None, state: Sums | None = None
) -> tuple[Tensor, Sums | None]:
    """o_t = sum_(s <= t) w_ts v_s / (sum_(s <= t) w_ts + eps) with w_ts = phi(q_t) . phi(k_s).

    Args:
        q_BTHK: queries.
        k_BTHK: keys.
        v_BTHV: values.
        eps: what the sum of the weights is padded by; None for no division.
        state: sum phi(k) v^T [B, H, F, V] and sum phi(k) [B, H, F] of earlier tokens, the latter None without division; None
            means "from zero, and return no sums".

    Returns:
        The outputs [B, T, H, V] in the dtype of v, and the sums after the last token in those of `state`, or None.

    Raises:
        ValueError: tensors that do not belong together, or a forced backend that cannot run them.
    """
    _check(q_BTHK, k_BTHK, v_BTHV, state, eps)
    if state is not None and is_step(v_BTHV.shape[1], state[0], state[1], q_BTHK, k_BTHK, v_BTHV):
        return _step(q_BTHK, k_BTHK, v_BTHV, eps, state)
    backend = dispatch.pick(OPERATION, v_BTHV, obstacle=_obstacle(k_BTHK, v_BTHV), tensor_cores=True)
    if backend == "triton":
        return _triton(q_BTHK, k_BTHK, v_BTHV, eps, state)
    joined = None if state is None else state[0] if eps is None else torch.cat((state[0], state[1][..., None]), -1)
    # a column of ones sums up the weights; in fp32, because the quotient is the output
    v = v_BTHV.to(torch.promote_types(v_BTHV.dtype, torch.float32))
    v = v if eps is None else torch.cat((v, torch.ones_like(v[..., :1])), -1)
    if backend == "chunked":
        lift = Lift(features, lambda dots: scores(dots, k_BTHK.shape[-1]))
        o, sums = chunked.linear_recurrence(q_BTHK, k_BTHK, v, lift=lift, chunk=CHUNK, state_BHKV=joined)
    else:
        o, sums = linear_recurrence_reference(features(q_BTHK), features(k_BTHK), v, state_BHKV=joined)
    if eps is None:
        return o.to(v_BTHV.dtype), None if state is None else (sums.to(state[0].dtype), None)
    o = (o[..., :-1] / (o[..., -1:] + eps)).to(v_BTHV.dtype)
    return o, None if state is None else (sums[..., :-1].to(state[0].dtype), sums[..., -1].to(state[1].dtype))


def _step(q: Tensor, k: Tensor, v: Tensor, eps: float | None, state: Sums) -> tuple[Tensor, Sums]:
    """A single token: the recurrence's step on features, which are few beside the sums."""
    phi_q, phi_k, wide = features(q), features(k), v.to(torch.promote_types(v.dtype, torch.float32))
    if eps is None or state[1] is None:
        o, s = linear_recurrence(phi_q, phi_k, wide, state_BHKV=state[0])
        return o.to(v.dtype), (s, None)
    o, n, sums = normalized_recurrence(phi_q, phi_k, wide, state=(state[0], state[1]))
    return (o / (n + eps)).to(v.dtype), sums


def _triton(q: Tensor, k: Tensor, v: Tensor, eps: float | None, state: Sums | None) -> tuple[Tensor, Sums | None]:
    """The operator's sums are of monomials, in rows of its own."""
    from kernels.taylor_features import taylor_op

    norm, flags = eps is not None, (eps is not None, eps or 0.0, state is not None)
    if state is None:
        return taylor_op.taylor_attention(q, k, v, None, None, *flags)[0], None
    row_F, weight_F = _rows_of_features(k.shape[-1], v.device)
    feature_R = torch.argsort(row_F)  # for each row the feature of its monomial
    first = (state[0].float() / weight_F[:, None])[:, :, feature_R]
    first_norm = (state[1].float() / weight_F)[:, :, feature_R] if norm else None
    o, _, _, _, last, last_norm = taylor_op.taylor_attention(q, k, v, first, first_norm, *flags)
    sums = (last[:, :, row_F] * weight_F[:, None]).to(state[0].dtype)
    return o, (sums, (last_norm[:, :, row_F] * weight_F).to(state[1].dtype) if norm else None)


def _rows_of_features(k_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """For each feature a row of the kernels' sums that holds its monomial, and the weight of the monomial in the feature."""
    first, second = torch.triu_indices(k_dim, k_dim, device=device).unbind(0)
    shift = second - first
    wrapped = shift > k_dim // 2
    pair = torch.where(wrapped, k_dim - shift, shift) * k_dim + torch.where(wrapped, second, first) + k_dim
    linear = torch.arange(k_dim, device=device)
    row_F = torch.cat((torch.full_like(linear[:1], k_dim + k_dim * (k_dim + 1) // 2), linear, pair))
    weight = torch.where(first == second, 0.5**0.5, 1.0) * k_dim**-0.5
    ones = torch.ones(k_dim, device=device)
    return row_F, torch.cat((ones[:1], ones * k_dim**-0.25, weight))


def _obstacle(k: Tensor, v: Tensor) -> str | None:
    """What keeps a call from the Triton kernels."""
    from kernels.taylor_features.taylor_launch import MAX_KEY, MAX_VALUE

    if k.shape[-1] > MAX_KEY:
        return f"feature dim {k.shape[-1]} is above {MAX_KEY}"
    return f"head dim {v.shape[-1]} is above {MAX_VALUE}" if v.shape[-1] > MAX_VALUE else None


@remembered
def _check(q: Tensor, k: Tensor, v: Tensor, state: Sums | None, eps: float | None) -> None:
    """Refuses shapes, dtypes and devices that do not belong together, naming the argument."""
    check_axes("v", v, "B T H V")
    check_axes("q", q, "B T H K")
    check_same("k", k, "q", q)
    batch, length, heads, v_dim = v.shape
    rows, sums = (batch, length, heads, q.shape[3]), (batch, heads, n_features(q.shape[3]))
    first, norm = (None, None) if state is None else state
    for name, x, shape in (("state[0]", first, (*sums, v_dim)), ("state[1]", norm if eps is not None else first, sums)):
        if state is not None and x is None:
            raise ValueError(f"{name} is missing; with v of shape {tuple(v.shape)} it is {shape}")
    expected = {"q": (q, rows), "k": (k, rows), "state[0]": (first, (*sums, v_dim)), "state[1]": (norm, sums)}
    check_arguments(v, expected, first="v")
