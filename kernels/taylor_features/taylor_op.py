"""Taylor linear attention as torch operators: fake tensors, autograd, and vmap that folds its axis into the batch.

Shape legend: B batch, T time, H heads, K width of q and k, V width of v, N chunks, R rows of the sums.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from kernels._ahead import Sizes, other_sizes
from kernels._members import fold_members
from kernels._operator import operator
from kernels.taylor_features import taylor_launch

Folded = tuple[tuple[Tensor, ...], tuple[int | None, ...]]


@operator("mixer_bench::taylor_attention")
def taylor_attention(
    q: Tensor, k: Tensor, v: Tensor, first: Tensor | None, first_norm: Tensor | None, norm: bool, eps: float, last: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `kernels.taylor_features.taylor_launch.forward`."""
    with torch.cuda.device_of(v):  # Triton launches on the current device
        found: Any = taylor_launch.forward(q, k, v, first, first_norm, norm, eps, last)
    return found


@taylor_attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, first: Tensor | None, first_norm: Tensor | None, norm: bool, eps: float, last: bool
) -> tuple[Tensor, ...]:
    batch, length, heads, v_dim = v.shape
    chunk = taylor_launch.chunk_length(k.shape[3])
    chunks = (length + chunk - 1) // chunk
    states = not (chunks == 1 and first is None and not last)
    rows = taylor_launch.n_rows(k.shape[3])
    narrow = {q.dtype, k.dtype, v.dtype} - {torch.float32}

    def empty(wanted: bool, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return v.new_empty(shape if wanted else (0,), dtype=dtype)

    return (
        v.new_empty(v.shape),
        empty(norm, batch, length, heads),
        empty(states, batch, heads, chunks, rows, v_dim, dtype=torch.bfloat16 if narrow else torch.float32),
        empty(states and norm, batch, heads, chunks, rows),
        empty(last, batch, heads, rows, v_dim),
        empty(last and norm, batch, heads, rows),
    )


@operator("mixer_bench::taylor_attention_backward")
def taylor_attention_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    y: Tensor,
    scale: Tensor,
    entering: Tensor,
    entering_norm: Tensor,
    dy: Tensor,
    dlast: Tensor | None,
    dlast_norm: Tensor | None,
    norm: bool,
    first: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `kernels.taylor_features.taylor_launch.backward`."""
    with torch.cuda.device_of(v):
        found: Any = taylor_launch.backward(q, k, v, y, scale, entering, entering_norm, dy, dlast, dlast_norm, norm, first)
    return found


@taylor_attention_backward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    norm, first = rest[-2:]
    batch, _, heads, v_dim = v.shape
    rows = taylor_launch.n_rows(k.shape[3])
    sums = ((batch, heads, rows, v_dim) if first else (0,), (batch, heads, rows) if first and norm else (0,))
    return *(x.new_empty(x.shape) for x in (q, k, v)), *(v.new_empty(shape, dtype=torch.float32) for shape in sums)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Keeps inputs, outputs, normalisers and the sums that enter chunks."""
    q, k, v, first, _, norm, _, last = inputs
    ctx.mark_non_differentiable(*output[1:4])
    ctx.set_materialize_grads(False)
    ctx.flags, ctx.sums = (norm, first is not None, last), [x.shape for x in output[4:]]
    ctx.save_for_backward(q, k, v, *output[:4])


def _differentiate(
    ctx: Any, dy: Tensor | None, _scale: Any, _entering: Any, _norm: Any, dlast: Tensor | None, dlast_norm: Tensor | None
) -> tuple[Any, ...]:
    norm, first, last = ctx.flags
    saved = ctx.saved_tensors
    dy = torch.zeros_like(saved[3]) if dy is None else dy
    more = (dlast if last else None, dlast_norm if last and norm else None)
    if norm and (more[0] is None) != (more[1] is None):
        more = tuple(dy.new_zeros(size, dtype=torch.float32) if x is None else x for x, size in zip(more, ctx.sums, strict=True))
    dq, dk, dv, dfirst, dfirst_norm = taylor_attention_backward(*saved, dy, *more, norm, first)
    sums = (dfirst if first else None, dfirst_norm if first and norm else None)
    return dq, dk, dv, *sums, None, None, None


taylor_attention.register_autograd(_differentiate, setup_context=_save)


@taylor_attention.register_sizes
def _(
    q: Tensor, k: Tensor, v: Tensor, first: Any, first_norm: Any, norm: bool, eps: float, last: bool
) -> Iterator[tuple[Any, ...]]:
    """Rows of more than a chunk have sums that enter chunks; as many long ones as multiprocessors are walked whole."""
    walked = Sizes(taylor_launch.MULTIPROCESSORS, taylor_launch.WALKED_FROM, 1, 1)
    for other in (*other_sizes(v.shape[2], v.shape[2]), walked):
        rows, sums = [other.of(x, "BTH") for x in (q, k, v)], [other.of(x, "BH") for x in (first, first_norm)]
        yield *rows, *sums, norm, eps, last


@taylor_attention.register_vmap
def _(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Folded:
    return _unfolded(taylor_attention(*_folded(info.batch_size, in_dims, args)), info.batch_size)


@taylor_attention_backward.register_vmap
def _(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Folded:
    return _unfolded(taylor_attention_backward(*_folded(info.batch_size, in_dims, args)), info.batch_size)


def _folded(members: int, in_dims: tuple[int | None, ...], args: tuple[Any, ...]) -> list[Any]:
    """Arguments whose batch contains the mapped axis; an absent tensor is empty and has no batch."""
    pairs = zip(args, in_dims, strict=True)
    return [fold_members(x, axis, members) if isinstance(x, Tensor) and x.ndim > 1 else x for x, axis in pairs]


def _unfolded(outputs: tuple[Tensor, ...], members: int) -> Folded:
    """Outputs with the mapped axis in front again; an absent one is empty and has no batch."""
    parts = tuple(x if x.ndim == 1 else x.unflatten(0, (members, -1)) for x in outputs)
    return parts, tuple(None if x.ndim == 1 else 0 for x in outputs)
