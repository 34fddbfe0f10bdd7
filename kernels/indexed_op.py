"""Attention over an index as torch operators: fake tensors, autograd, and vmap that folds its axis into the batch.

The index travels flat, as a name and numbers: "band" with window, sinks, front and past (`kernels.indexed_launch.Band`); "listed"
with the keys of a block, beside `words` and `tiles` (`kernels.sparse_index.Listed`); or a pattern of `kernels.sparse_masks` with
its options in order, whose list is made and kept below the operator.

Shape legend: B batch, H heads of q, G heads of k and v, T queries, S keys, K width of q and k, V width of v.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._functorch.autograd_function import enable_single_level_autograd_function
from torch.autograd.function import _SingleLevelFunction

from kernels import indexed_launch
from kernels._members import fold_members
from kernels.indexed_launch import Band
from kernels.sparse_index import Listed, static_index

FORWARD, BACKWARD = "mixer_bench::indexed_attention", "mixer_bench::indexed_attention_backward"

torch.library.define(
    FORWARD,
    "(Tensor q, Tensor k, Tensor v, Tensor? start, Tensor? words, Tensor? tiles, str index, int[] numbers) -> (Tensor, Tensor)",
)
torch.library.define(
    BACKWARD,
    "(Tensor q, Tensor k, Tensor v, Tensor? start, Tensor? words, Tensor? tiles, Tensor y, Tensor lse, Tensor dy, str index,"
    " int[] numbers) -> (Tensor, Tensor, Tensor)",
)
indexed_attention = torch.ops.mixer_bench.indexed_attention.default
indexed_attention_backward = torch.ops.mixer_bench.indexed_attention_backward.default


def _index(
    q: Tensor, k: Tensor, v: Tensor, words: Tensor | None, tiles: Tensor | None, name: str, numbers: list[int]
) -> Band | Listed:
    if name == "band":
        return Band(*numbers)
    if name == "listed":
        assert words is not None and tiles is not None
        return Listed(words, tiles, *numbers)
    return static_index(name, tuple(numbers), q.shape[2], indexed_launch.list_tile(q, k, v), q.device)


@torch.library.impl(FORWARD, ("cpu", "cuda"))
def _(
    q: Tensor, k: Tensor, v: Tensor, start: Tensor | None, words: Tensor | None, tiles: Tensor | None, name: str, numbers: list[int]
) -> tuple[Tensor, Tensor]:
    with torch.cuda.device_of(v):  # Triton launches on the current device
        return indexed_launch.forward(q, k, v, start, _index(q, k, v, words, tiles, name, numbers))


@torch.library.register_fake(FORWARD)
def _(q: Tensor, k: Tensor, v: Tensor, *index: Any) -> tuple[Tensor, Tensor]:
    batch, heads, length = q.shape[:3]
    y = q.new_empty(batch, length, heads, v.shape[3]).transpose(1, 2)
    return y, q.new_empty(batch, heads, length, dtype=torch.float32)


@torch.library.impl(BACKWARD, ("cpu", "cuda"))
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: Tensor | None,
    words: Tensor | None,
    tiles: Tensor | None,
    y: Tensor,
    lse: Tensor,
    dy: Tensor,
    name: str,
    numbers: list[int],
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.cuda.device_of(v):
        index = _index(q, k, v, words, tiles, name, numbers)
        return indexed_launch.backward(q, k, v, start, index, y, lse.contiguous(), dy)


@torch.library.register_fake(BACKWARD)
def _(q: Tensor, k: Tensor, v: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (x.new_empty(x.transpose(1, 2).shape).transpose(1, 2) for x in (q, k, v))
    return dq, dk, dv


class IndexedAttention(_SingleLevelFunction):
    """The operator's gradient at one level of `torch.func`; see `kernels.recurrence_op.LinearRecurrence`."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        """See `kernels.indexed_launch.forward`."""
        with torch._C._AutoDispatchBelowAutograd():
            return indexed_attention(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        """Keeps inputs, outputs and the log-sum-exp."""
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*inputs[:6], *output)
        ctx.index = inputs[6:]

    @staticmethod
    def backward(ctx: Any, dy: Tensor, _lse: Any) -> tuple[Tensor | None, ...]:
        """See `kernels.indexed_launch.backward`."""
        return *indexed_attention_backward(*ctx.saved_tensors, dy, *ctx.index), None, None, None, None, None


@torch.library.impl(FORWARD, "Autograd")
def _(*args: Any) -> tuple[Tensor, Tensor]:
    with enable_single_level_autograd_function():
        return IndexedAttention.apply(*args)


@torch.library.register_vmap(FORWARD)
def _(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    outputs = indexed_attention(*_folded(info.batch_size, in_dims, args))
    return tuple(x.unflatten(0, (info.batch_size, -1)) for x in outputs), (0, 0)


@torch.library.register_vmap(BACKWARD)
def _(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    outputs = indexed_attention_backward(*_folded(info.batch_size, in_dims, args))
    return tuple(x.unflatten(0, (info.batch_size, -1)) for x in outputs), (0, 0, 0)


def _folded(members: int, in_dims: tuple[Any, ...], args: tuple[Any, ...]) -> list[Any]:
    """Arguments whose batch contains the mapped axis; an index of one row that no member has for itself stays one row."""

    def shared(position: int, x: Any) -> bool:
        return position in (4, 5) and in_dims[position] is None and x.shape[0] == 1

    return [
        x if not isinstance(x, Tensor) or shared(position, x) else fold_members(x, in_dims[position], members)
        for position, x in enumerate(args)
    ]
