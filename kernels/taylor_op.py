"""Taylor linear attention as torch operators: fake tensors, autograd, and vmap that folds its axis into the batch.

Shape legend: B batch, T time, H heads, K width of q and k, V width of v, N chunks, R rows of the sums.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._functorch.autograd_function import enable_single_level_autograd_function
from torch.autograd.function import _SingleLevelFunction

from kernels import taylor_launch
from kernels._members import fold_members

Folded = tuple[tuple[Tensor, ...], tuple[int | None, ...]]

FORWARD, BACKWARD = "mixer_bench::taylor_attention", "mixer_bench::taylor_attention_backward"

torch.library.define(
    FORWARD,
    "(Tensor q, Tensor k, Tensor v, Tensor? first, Tensor? first_norm, bool norm, float eps, bool last)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
torch.library.define(
    BACKWARD,
    "(Tensor q, Tensor k, Tensor v, Tensor y, Tensor scale, Tensor entering, Tensor entering_norm, Tensor dy, Tensor? dlast,"
    " Tensor? dlast_norm, bool norm, bool first) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
taylor_attention = torch.ops.mixer_bench.taylor_attention.default
taylor_attention_backward = torch.ops.mixer_bench.taylor_attention_backward.default


@torch.library.impl(FORWARD, ("cpu", "cuda"))
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    with torch.cuda.device_of(v):  # Triton launches on the current device
        return taylor_launch.forward(q, k, v, *rest)


@torch.library.impl(BACKWARD, ("cpu", "cuda"))
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    with torch.cuda.device_of(v):
        return taylor_launch.backward(q, k, v, *rest)


@torch.library.register_fake(FORWARD)
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


@torch.library.register_fake(BACKWARD)
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    norm, first = rest[-2:]
    batch, _, heads, v_dim = v.shape
    rows = taylor_launch.n_rows(k.shape[3])
    sums = ((batch, heads, rows, v_dim) if first else (0,), (batch, heads, rows) if first and norm else (0,))
    return *(x.new_empty(x.shape) for x in (q, k, v)), *(v.new_empty(shape, dtype=torch.float32) for shape in sums)


class TaylorAttention(_SingleLevelFunction):
    """The operator's gradient at one level of `torch.func`; see `kernels.recurrence_op.LinearRecurrence`."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        """See `kernels.taylor_launch.forward`."""
        with torch._C._AutoDispatchBelowAutograd():
            return taylor_attention(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Keeps inputs, outputs, normalisers and the sums that enter chunks."""
        q, k, v, first, _, norm, _, last = inputs
        ctx.mark_non_differentiable(*output[1:4])
        ctx.flags = (norm, first is not None, last)
        ctx.save_for_backward(q, k, v, *output[:4])

    @staticmethod
    def backward(
        ctx: Any, dy: Tensor, _scale: Any, _entering: Any, _norm: Any, dlast: Tensor, dlast_norm: Tensor
    ) -> tuple[Any, ...]:
        """See `kernels.taylor_launch.backward`."""
        norm, first, last = ctx.flags
        more = (dlast if last else None, dlast_norm if last and norm else None)
        dq, dk, dv, dfirst, dfirst_norm = taylor_attention_backward(*ctx.saved_tensors, dy, *more, norm, first)
        sums = (dfirst if first else None, dfirst_norm if first and norm else None)
        return dq, dk, dv, *sums, None, None, None


@torch.library.impl(FORWARD, "Autograd")
def _(*args: Any) -> tuple[Tensor, ...]:
    with enable_single_level_autograd_function():
        return TaylorAttention.apply(*args)


@torch.library.register_vmap(FORWARD)
def _(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Folded:
    return _unfolded(taylor_attention(*_folded(info.batch_size, in_dims, args)), info.batch_size)


@torch.library.register_vmap(BACKWARD)
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
