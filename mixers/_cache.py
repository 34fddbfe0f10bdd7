"""Heads, and the key-value storage of attention mixers: a cache that grows, and a window with sinks that does not.

Shape legend: B batch, T new tokens, S stored keys, D width, H heads, K head width, W stored window, P sinks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.attention import attention, banded_attention, share_heads
from kernels.indexed_attention import decode_attention
from kernels.step import is_step, may_write
from kernels.window_step import Stored, window_step
from mixers._base import State

STORED = ("k", "v", "position", "sink_k", "sink_v")
"""Names of a window's storage, in the order of `Stored`."""


def split_heads(x_BTD: Tensor, n_parts: int, n_heads: int) -> list[Tensor]:
    """Cuts a joint projection [B, T, n_parts D] into n_parts tensors [B, H, T, K]."""
    return [part.transpose(1, 2) for part in x_BTD.unflatten(-1, (n_parts, n_heads, -1)).unbind(-3)]


def merge_heads(y_BHTK: Tensor) -> Tensor:
    """[B, H, T, K] to [B, T, D]."""
    return y_BHTK.transpose(1, 2).flatten(-2)


def new_positions(state: State, x_BTD: Tensor) -> Tensor:
    """Absolute positions [B, T] of a segment that follows the state."""
    return state["position"][:, None] + torch.arange(x_BTD.shape[1], device=x_BTD.device)


def kv_cache(batch: int, n_heads: int, max_len: int, head_dim: int, *, device: torch.device | str, dtype: torch.dtype) -> State:
    """An empty cache for `max_len` tokens, and how much of it is filled in each sequence."""
    shape = (batch, n_heads, max_len, head_dim)
    return {
        "k": torch.zeros(shape, device=device, dtype=dtype),
        "v": torch.zeros(shape, device=device, dtype=dtype),
        "position": torch.zeros(batch, device=device, dtype=torch.long),
    }


def append_kv(state: State, k_BHTK: Tensor, v_BHTK: Tensor, position_BT: Tensor) -> State:
    """The cache with the segment's keys and values written at their positions: a copy, but in place inside `states_in_place`.

    Raises:
        ValueError: the segment alone is longer than the cache.
    """
    n_new, size = k_BHTK.shape[2], state["k"].shape[2]
    if n_new > size:
        raise ValueError(f"{n_new} tokens do not fit a state made for max_len={size}; make it with a larger max_len")
    index = position_BT[:, None, :, None].expand_as(k_BHTK)
    write = Tensor.scatter_ if may_write() else Tensor.scatter
    return {
        "k": write(state["k"], 2, index, k_BHTK.to(state["k"].dtype)),
        "v": write(state["v"], 2, index, v_BHTK.to(state["v"].dtype)),
        "position": position_BT[:, -1] + 1,
    }


def attend_cache(q_BHTK: Tensor, state: State, visible: Tensor) -> Tensor:
    """Attends to the stored keys where `visible`, [B, 1 or H, T, S], is True: [B, H, T, K]."""
    if q_BHTK.shape[2] == 1:
        return decode_attention(q_BHTK[:, :, 0], state["k"], state["v"], visible[:, :, 0])[:, :, None]
    return attention(q_BHTK, state["k"].to(q_BHTK.dtype), state["v"].to(q_BHTK.dtype), mask_TS=visible)


def window_cache(
    batch: int,
    n_heads: int,
    max_len: int,
    head_dim: int,
    *,
    window: int,
    sinks: int,
    device: torch.device | str,
    dtype: torch.dtype,
) -> State:
    """Empty storage for the window - 1 keys before the next token, in order of age, and for the first `sinks` keys."""

    def zeros(length: int) -> Tensor:
        return torch.zeros(batch, n_heads, min(length, max_len), head_dim, device=device, dtype=dtype)

    state = {"k": zeros(window - 1), "v": zeros(window - 1)}
    if sinks:
        state |= {"sink_k": zeros(sinks), "sink_v": zeros(sinks)}
    return state | {"position": torch.zeros(batch, device=device, dtype=torch.long)}


def attend_window(q_BHTK: Tensor, k_BHTK: Tensor, v_BHTK: Tensor, state: State, *, window: int) -> tuple[Tensor, State]:
    """Attends to the stored window, the sinks and the segment itself; stores the last keys and values.

    Keys and values may have fewer heads than queries (grouped-query attention); they are stored as they come.

    Returns:
        The output [B, H, T, K] and the new storage.
    """
    if is_step(q_BHTK.shape[2], state["k"], state["v"], q_BHTK, k_BHTK, v_BHTK):
        stored = Stored(state["k"], state["v"], state["position"], state.get("sink_k"), state.get("sink_v"))
        y_BHK, stored = window_step(q_BHTK[:, :, 0], k_BHTK[:, :, 0], v_BHTK[:, :, 0], stored, window=window)
        return y_BHK[:, :, None], {name: x for name, x in zip(STORED, stored, strict=True) if x is not None}
    n_new, start_B = q_BHTK.shape[2], state["position"]
    k = torch.cat((state["k"], k_BHTK.to(state["k"].dtype)), 2)
    v = torch.cat((state["v"], v_BHTK.to(state["v"].dtype)), 2)
    new_state = {"k": k[:, :, n_new:], "v": v[:, :, n_new:], "position": start_B + n_new}
    sinks = None
    if "sink_k" in state:
        new_state |= fill_sinks(state, k_BHTK, v_BHTK)
        sinks = (new_state["sink_k"].to(q_BHTK.dtype), new_state["sink_v"].to(q_BHTK.dtype))
    k, v = k.to(q_BHTK.dtype), v.to(q_BHTK.dtype)
    return banded_attention(q_BHTK, k, v, window=window, start_B=start_B, sink_kv=sinks), new_state


def repeat_heads(a_BGTK: Tensor, q_BHTK: Tensor) -> Tensor:
    """Keys or values repeated to the number of query heads, each serving H / G neighbouring heads."""
    return share_heads(a_BGTK, q_BHTK.shape[1])


def fill_sinks(state: State, k_BHTK: Tensor, v_BHTK: Tensor) -> State:
    """The sinks of a window's storage after new tokens, the first of which is at `position`: token j < P belongs in row j."""
    n_new, n_sinks = k_BHTK.shape[2], state["sink_k"].shape[2]
    source_BP = torch.arange(n_sinks, device=k_BHTK.device) - state["position"][:, None]
    inside_BP = source_BP.clamp(0, n_new - 1)
    is_new, index = ((source_BP == inside_BP)[:, None, :, None], inside_BP[:, None, :, None])
    return {
        name: torch.where(is_new, new.gather(2, index.expand_as(state[name])).to(state[name].dtype), state[name])
        for name, new in (("sink_k", k_BHTK), ("sink_v", v_BHTK))
    }
