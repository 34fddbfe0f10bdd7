"""Attention over an index as torch operators: fake tensors, autograd, and vmap that folds its axis into the batch.

The index travels flat, as a name and numbers: "band" with window, sinks, front and past (`indexed_launch.Band`); "chosen"
with the keys of a block and the most blocks of a token, beside the choice (`kernels.indexed.chosen_launch.Chosen`); or a pattern of
`kernels.sparse_masks` with its options in order, whose list is made and kept below the operator.

Shape legend: B batch, H heads of q, G heads of k and v, T queries, S keys, K width of q and k, V width of v.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from kernels._members import fold_members
from kernels._operator import operator
from kernels.indexed import chosen_launch, indexed_launch
from kernels.indexed.chosen_launch import Chosen
from kernels.indexed.indexed_launch import Band
from kernels.indexed.sparse_index import Listed, static_index

CHOSEN = 4
"""Place of the choice among the arguments of both operators."""


def _index(q: Tensor, k: Tensor, v: Tensor, name: str, numbers: list[int]) -> Band | Listed:
    if name == "band":
        return Band(*numbers)
    return static_index(name, tuple(numbers), q.shape[2], indexed_launch.list_tile(q, k, v), q.device)


@operator("mixer_bench::indexed_attention")
def indexed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: Tensor | None,
    chosen: Tensor | None,
    index: str,
    numbers: list[int],
) -> tuple[Tensor, Tensor]:
    """See `kernels.indexed.indexed_launch.forward`, and `kernels.indexed.chosen_launch.forward` for a choice."""
    with torch.cuda.device_of(v):  # Triton launches on the current device
        if chosen is not None:
            return chosen_launch.forward(q, k, v, Chosen(chosen, *numbers))
        return indexed_launch.forward(q, k, v, start, _index(q, k, v, index, numbers))


@indexed_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *index: Any) -> tuple[Tensor, Tensor]:
    batch, heads, length = q.shape[:3]
    y = q.new_empty(batch, length, heads, v.shape[3]).transpose(1, 2)
    return y, q.new_empty(batch, heads, length, dtype=torch.float32)


@indexed_attention.register_sizes
def _(
    q: Tensor, k: Tensor, v: Tensor, start: Tensor | None, chosen: Tensor | None, index: str, numbers: list[int]
) -> Iterator[tuple[Any, ...]]:
    """Few and many blocks to choose one from, whose gradients are walked by query and by key."""
    if chosen is not None:
        for n_blocks in (1, chosen_launch.BY_KEY_FROM):
            length = n_blocks * numbers[0]
            sized = (x.new_empty(1, x.shape[1], length, x.shape[3]).requires_grad_(x.requires_grad) for x in (q, k, v))
            yield *sized, None, chosen.new_empty(k.shape[1], length, n_blocks), index, [numbers[0], 1]


@operator("mixer_bench::indexed_attention_backward")
def indexed_attention_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: Tensor | None,
    chosen: Tensor | None,
    y: Tensor,
    lse: Tensor,
    dy: Tensor,
    index: str,
    numbers: list[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """See `kernels.indexed.indexed_launch.backward`, and `kernels.indexed.chosen_launch.backward` for a choice."""
    with torch.cuda.device_of(v):
        if chosen is not None:
            return chosen_launch.backward(q, k, v, Chosen(chosen, *numbers), y, lse.contiguous(), dy)
        return indexed_launch.backward(q, k, v, start, _index(q, k, v, index, numbers), y, lse.contiguous(), dy)


@indexed_attention_backward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (x.new_empty(x.transpose(1, 2).shape).transpose(1, 2) for x in (q, k, v))
    return dq, dk, dv


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Keeps inputs, outputs and the log-sum-exp."""
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:5], *output)
    ctx.index = inputs[5:]


def _differentiate(ctx: Any, dy: Tensor, _lse: Any) -> tuple[Tensor | None, ...]:
    return *indexed_attention_backward(*ctx.saved_tensors, dy, *ctx.index), None, None, None, None


indexed_attention.register_autograd(_differentiate, setup_context=_save)


@indexed_attention.register_vmap
def _(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    outputs = indexed_attention(*_folded(info.batch_size, in_dims, args))
    return tuple(x.unflatten(0, (info.batch_size, -1)) for x in outputs), (0, 0)


@indexed_attention_backward.register_vmap
def _(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    outputs = indexed_attention_backward(*_folded(info.batch_size, in_dims, args))
    return tuple(x.unflatten(0, (info.batch_size, -1)) for x in outputs), (0, 0, 0)


def _folded(members: int, in_dims: tuple[Any, ...], args: tuple[Any, ...]) -> list[Any]:
    """Arguments whose batch contains the mapped axis; a choice of one row that no member has for itself stays one row."""

    def shared(position: int, x: Any) -> bool:
        return position == CHOSEN and in_dims[position] is None and x.shape[0] == 1

    return [
        x if not isinstance(x, Tensor) or shared(position, x) else fold_members(x, in_dims[position], members)
        for position, x in enumerate(args)
    ]
