"""One decoded token of a sliding window with sinks in one launch: attention, and the storage of keys and values moved on.

In torch it takes some twenty small operations, and a step is bound by their number. The torch form below is the definition.

Shape legend: B batch, H heads of q, G heads of k and v (G divides H), L stored keys, P sinks, K width of q and k, V width of v.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels import dispatch
from kernels._arguments import INTEGERS, check_arguments, check_axes, check_rank
from kernels._members import fold_members
from kernels.attention import banded_attention
from kernels.operands import _dot_dtype, _precision, _triton_dtype, padded
from kernels.step import may_write

OPERATION = "window_step"
MAX_STORED = 1024
"""Stored keys of a head that one program walks; it should not take longer than the rest of a layer."""
MAX_GROUP = 64
TILES = {128: (64, 4), 256: (32, 8)}
"""By the larger of the widths of k and v: stored keys of a tile of 16-bit numbers, and warps."""


class Stored(NamedTuple):
    """What a window keeps between tokens.

    Args:
        k_BGLK: keys of the last L tokens in order of age, L below the window; those of negative positions are unfilled.
        v_BGLV: values.
        position_B: int64, position of the next token.
        sink_k_BGPK: keys of the first P tokens, visible once they have left the window; or None.
        sink_v_BGPV: values, or None.
    """

    k_BGLK: Tensor
    v_BGLV: Tensor
    position_B: Tensor
    sink_k_BGPK: Tensor | None = None
    sink_v_BGPV: Tensor | None = None


def window_obstacle(q: Tensor, k: Tensor, v: Tensor, stored: Stored) -> str | None:
    """What keeps a token from the kernels that walk a window."""
    if (length := stored.k_BGLK.shape[2]) > MAX_STORED:
        return f"a window of {length} stored keys is above {MAX_STORED}"
    limit = min(TILES) if q.dtype == torch.float32 else max(TILES)
    if (width := max(k.shape[-1], v.shape[-1])) > limit:
        return f"head dim {width} of {q.dtype} is above {limit}"
    if (group := q.shape[1] // k.shape[1]) > MAX_GROUP:
        return f"{group} query heads to a key head are above {MAX_GROUP}"
    dtype = stored.k_BGLK.dtype
    return None if dtype in dispatch.TRITON_DTYPES else f"keys are stored as {dtype}, not as float32, bfloat16 or float16"


def window_step(q_BHK: Tensor, k_BGK: Tensor, v_BGV: Tensor, stored: Stored, *, window: int) -> tuple[Tensor, Stored]:
    """One token's attention to the last `window` keys, its own included, and to the sinks that have left them.

    There is no gradient in one launch; where one is wanted, the band of `kernels.attention` is the function to call.

    Args:
        q_BHK: query.
        k_BGK: key.
        v_BGV: value.
        stored: what earlier tokens left.
        window: keys seen.

    Returns:
        The output [B, H, V] in the dtype of q, and the new storage: new tensors, or inside `kernels.step.states_in_place` the
        given ones, written over.

    Raises:
        ValueError: shapes or devices do not match.
    """
    check_window(q_BHK, k_BGK, v_BGV, stored)
    inputs = (q_BHK, k_BGK, v_BGV)
    if dispatch.pick(OPERATION, q_BHK, obstacle=window_obstacle(*inputs, stored)) != "triton":
        y, new = _torch_step(*inputs, stored, window)
        if not may_write():
            return y, new
        for old, x in zip(stored, new, strict=True):
            if old is not None and x is not None:
                old.copy_(x)
        return y, stored
    if may_write() and all(x is None or x.is_contiguous() for x in stored):
        return window_step_in_place(*inputs, *stored, window), stored
    y, k, v, position, sink_k, sink_v = window_step_operator(*inputs, *stored, window)
    return y, Stored(k, v, position) if stored.sink_k_BGPK is None else Stored(k, v, position, sink_k, sink_v)


def _torch_step(q: Tensor, k: Tensor, v: Tensor, stored: Stored, window: int) -> tuple[Tensor, Stored]:
    k_BGSK, v_BGSV = (torch.cat((old, x[:, :, None].to(old.dtype)), 2) for old, x in ((stored.k_BGLK, k), (stored.v_BGLV, v)))
    position, sink_k, sink_v = stored[2:]
    sink_kv = None if sink_k is None or sink_v is None else (sink_k.to(q.dtype), sink_v.to(q.dtype))
    given = {"window": window, "start_B": position, "sink_kv": sink_kv}
    y_BH1V = banded_attention(q[:, :, None], k_BGSK.to(q.dtype), v_BGSV.to(q.dtype), **given)
    if sink_k is not None and sink_v is not None:
        own_B1P1 = (torch.arange(sink_k.shape[2], device=q.device) == position[:, None])[:, None, :, None]
        sink_k, sink_v = (torch.where(own_B1P1, x[:, :, None].to(old.dtype), old) for old, x in ((sink_k, k), (sink_v, v)))
    return y_BH1V[:, :, 0], Stored(k_BGSK[:, :, 1:], v_BGSV[:, :, 1:], position + 1, sink_k, sink_v)


def check_window(q: Tensor, k: Tensor, v: Tensor, stored: Stored) -> None:
    """Raises ValueError if a token and a window's storage do not belong together."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_axes(name, x, "B heads width")
    check_rank("stored k", stored.k_BGLK, "B heads stored width")
    if stored.sink_k_BGPK is not None:
        check_rank("sink k", stored.sink_k_BGPK, "B heads sinks width")
    batch, groups, k_dim = k.shape
    sizes = (batch, groups, stored.k_BGLK.shape[2])
    sinks = (batch, groups, 0 if stored.sink_k_BGPK is None else stored.sink_k_BGPK.shape[2])
    expected = {
        "q": (q, (batch, q.shape[1], k_dim)),
        "v": (v, (batch, groups, v.shape[2])),
        "stored k": (stored.k_BGLK, (*sizes, k_dim)),
        "stored v": (stored.v_BGLV, (*sizes, v.shape[2])),
        "position": (stored.position_B, (batch,)),
        "sink k": (stored.sink_k_BGPK, (*sinks, k_dim)),
        "sink v": (stored.sink_v_BGPV, (*sinks, v.shape[2])),
    }
    check_arguments(k, expected, first="k", dtypes={"position": INTEGERS})
    if q.shape[1] % groups:
        raise ValueError(f"q has {q.shape[1]} heads and k {groups}; k's heads divide q's")


@torch.library.custom_op("mixer_bench::window_step_", mutates_args=("old_k", "old_v", "position", "sink_k", "sink_v"))
def window_step_in_place(
    q: Tensor, k: Tensor, v: Tensor, old_k: Tensor, old_v: Tensor, position: Tensor, sink_k: Tensor | None, sink_v: Tensor | None,
    window: int,
) -> Tensor:  # fmt: skip
    """`window_step` on dense storage that is written over; returns the output."""
    y = _launch(q, k, v, (old_k, old_v, sink_k, sink_v), (old_k, old_v, sink_k, sink_v), position, window)
    position += 1
    return y


@torch.library.custom_op("mixer_bench::window_step", mutates_args=())
def window_step_operator(
    q: Tensor, k: Tensor, v: Tensor, old_k: Tensor, old_v: Tensor, position: Tensor, sink_k: Tensor | None, sink_v: Tensor | None,
    window: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The output, and new storage in the order of `Stored`; sinks that a window does not have are empty."""
    old = tuple(None if x is None else x.contiguous() for x in (old_k, old_v, sink_k, sink_v))
    new_k, new_v, new_sink_k, new_sink_v = (_like(x, q) for x in old)
    y = _launch(q, k, v, old, (new_k, new_v, new_sink_k, new_sink_v), position, window)
    return y, new_k, new_v, position + 1, new_sink_k, new_sink_v


def _launch(
    q: Tensor, k: Tensor, v: Tensor, old: tuple[Tensor | None, ...], new: tuple[Tensor | None, ...], position: Tensor, window: int
) -> Tensor:
    from kernels.steps.window_step_triton import window_step_kernel

    q, k, v = (x if x.stride(2) == 1 or x.shape[2] == 1 else x.contiguous() for x in (q, k, v))
    groups, k_dim, v_dim = k.shape[1], k.shape[2], v.shape[2]
    group, sinks = q.shape[1] // groups, 0 if old[2] is None else old[2].shape[2]
    y, dot = q.new_empty(*q.shape[:2], v_dim), _dot_dtype(q, k, v)
    keys, warps = tile_of(max(k_dim, v_dim), dot)
    old_k, old_v, *old_sinks = (k if x is None else x for x in old)
    with torch.cuda.device_of(q):  # Triton launches on the current device
        window_step_kernel[(len(q) * groups,)](
            q, k, v, old_k, old_v, *old_sinks, position, *(k if x is None else x for x in new), y,
            *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], groups, group, old_k.shape[2], sinks, window,
            K=k_dim, V=v_dim, BK=padded(k_dim), BV=padded(v_dim), M=padded(group),
            N=keys, BP=padded(sinks) if sinks else 0, DOT=_triton_dtype(dot), PRECISION=_precision(dot), num_warps=warps,
        )  # fmt: skip
    return y


def tile_of(width: int, dtype: torch.dtype) -> tuple[int, int]:
    """Stored keys of a tile, and warps; products of fp32 take more registers."""
    keys, warps = next(tile for limit, tile in TILES.items() if width <= limit)
    return (keys // 4, 2 * warps) if dtype == torch.float32 else (keys, warps)


def _like(x: Tensor | None, sample: Tensor) -> Tensor:
    return sample.new_empty(0) if x is None else x.new_empty(x.shape)


@window_step_in_place.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    return q.new_empty(*q.shape[:2], v.shape[2])


@window_step_operator.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, old_k: Tensor, old_v: Tensor, position: Tensor, sink_k: Tensor | None, sink_v: Tensor | None,
    window: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    new = (_like(x, q) for x in (old_k, old_v, position, sink_k, sink_v))
    return q.new_empty(*q.shape[:2], v.shape[2]), *new


@window_step_operator.register_vmap
def _(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    folded = [fold_members(x, axis, info.batch_size) if isinstance(x, Tensor) else x for x, axis in zip(args, in_dims, strict=True)]
    outputs = window_step_operator(*folded)
    members = info.batch_size
    return tuple(x.unflatten(0, (members, -1)) if len(x) else x.new_empty(members, 0) for x in outputs), (0,) * len(outputs)
