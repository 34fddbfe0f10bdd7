"""Cases of a window's fused decoding step, for the interpreter and for a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.attention import attention_reference, share_heads
from kernels.dispatch import use_backend
from kernels.step import states_in_place
from kernels.window_step import Stored, window_step
from tests.kernels.oracle import SINGLE, SIXTEEN_BIT, poisoned, require_close

SHAPES = (
    # batch, heads of q, heads of k and v, stored keys, sinks, K, V
    (2, 4, 2, 20, 3, 16, 16),
    (1, 3, 1, 70, 0, 20, 33),
    (3, 1, 1, 33, 17, 8, 72),
    (1, 17, 1, 1, 1, 64, 5),
    (2, 2, 2, 0, 2, 16, 16),
)


def draw(shape: tuple[int, ...], *, device: str, dtype: torch.dtype, stored_dtype: torch.dtype | None = None) -> tuple:
    """Query, key and value as slices of projections, and storage of sequences that have read little, some and much."""
    batch, heads, groups, length, sinks, k_dim, v_dim = shape
    row = torch.randn(batch, heads * k_dim + groups * (k_dim + v_dim) + 3, device=device).to(dtype)
    q, k, v, _ = row.split((heads * k_dim, groups * k_dim, groups * v_dim, 3), -1)
    sizes = [(batch, groups, n, width) for n in (length, sinks) for width in (k_dim, v_dim)]
    held = [torch.randn(size, device=device).to(stored_dtype or dtype) for size in sizes]
    position = torch.tensor([0, length // 2, 3 * length + 40], device=device).repeat(batch)[-batch:]
    stored = Stored(held[0], held[1], position, *(held[2:] if sinks else (None, None)))
    return q.unflatten(1, (heads, -1)), k.unflatten(1, (groups, -1)), v.unflatten(1, (groups, -1)), stored


def definition(q: Tensor, k: Tensor, v: Tensor, stored: Stored, window: int) -> tuple[Tensor, Stored]:
    """In fp64, a sequence at a time: attention to the keys that are there and in sight."""
    outputs, new_sinks = [], [None if x is None else x.clone() for x in stored[3:]]
    new = [torch.cat((old, x[:, :, None].to(old.dtype)), 2) for old, x in zip(stored[:2], (k, v), strict=True)]
    for b, position in enumerate(stored.position_B.tolist()):
        length = stored.k_BGLK.shape[2]
        there = torch.arange(position - length, position + 1, device=q.device)
        keys, values = ([x[b, :, (there >= 0) & (position - there < window)]] for x in new)
        for parts, sinks in zip((keys, values), stored[3:], strict=True):
            if sinks is not None:
                parts.append(sinks[b, :, position - torch.arange(sinks.shape[2], device=q.device) >= window])
        exact = [torch.cat(parts, 1)[None].double() for parts in (keys, values)]
        outputs.append(attention_reference(q[b : b + 1, :, None].double(), *(share_heads(x, q.shape[1]) for x in exact))[:, :, 0])
        for sinks, x in zip(new_sinks, (k, v), strict=True):
            if sinks is not None and position < sinks.shape[2]:
                sinks[b, :, position] = x[b].to(sinks.dtype)
    return torch.cat(outputs), Stored(*(x[:, :, 1:] for x in new), stored.position_B + 1, *new_sinks)


def check(
    shape: tuple[int, ...], device: str, dtype: torch.dtype, *, stored_dtype: torch.dtype | None = None, backend: str = "triton"
) -> None:
    """Output against fp64 and storage to the bit, as new tensors and in place; only the latter changes what is given."""
    q, k, v, stored = draw(shape, device=device, dtype=dtype, stored_dtype=stored_dtype)
    for window in {stored.k_BGLK.shape[2] + 1, stored.k_BGLK.shape[2] + 4}:
        y, wanted = definition(q, k, v, stored, window)
        before = [None if x is None else x.clone() for x in stored]
        with use_backend(backend), poisoned():
            found, new = window_step(q, k, v, stored, window=window)
            with torch.no_grad(), states_in_place():
                held = Stored(*(None if x is None else x.clone() for x in stored))
                again, same = window_step(q, k, v, held, window=window)
        require_close({"y": found}, {"y": y}, SINGLE if dtype == torch.float32 else SIXTEEN_BIT)
        assert torch.equal(found, again)
        for old, given, a, b, c in zip(before, stored, new, held, wanted, strict=True):
            assert old is None or (torch.equal(old, given) and torch.equal(a, c) and torch.equal(b, c))
        assert all(x is y for x, y in zip(same, held, strict=True))
