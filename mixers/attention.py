"""Softmax attention (Vaswani et al. 2017), the mixer that all others are measured against.

Shape legend: B batch, T time, S keys, D width, H heads, K head width.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.attention import attention
from mixers._base import PATTERNS, Caps, Mixer, State, heads, mixer
from mixers._rotary import POSITIONS, check_positions, rotary


@mixer("attention")
class Attention(Mixer):
    """Multi-head softmax attention; Zoology's figures use one head, biases, and no positions of its own.

    Zoology Figure 2 also drops 10 % of the attention weights in training; there is no such option here.

    Args:
        n_heads: number of heads.
        positions: none; rotary on queries and keys; or learned vectors added to the input. Cross patterns have none,
            since queries and context are not aligned.
        max_len: number of learned positions.
        bias: whether the projections have biases.
    """

    caps = Caps(patterns=frozenset(PATTERNS))
    variants = (
        {},
        {"n_heads": 4, "positions": "rotary"},
        {"n_heads": 2, "positions": "learned", "max_len": 80, "bias": False},
    )

    def __init__(
        self,
        d_model: int,
        *,
        layer: int = 0,
        pattern: str = "causal_self",
        n_heads: int = 1,
        positions: str = "none",
        max_len: int = 1024,
        bias: bool = True,
    ) -> None:
        super().__init__(d_model, pattern=pattern)
        self.n_heads, self.head_dim = n_heads, heads(d_model, n_heads)
        self.cross = pattern.endswith("cross")
        check_positions(positions, self.head_dim, ("none",) if self.cross else POSITIONS)
        self.positions, self.max_len = positions, max_len
        self.qkv_proj = nn.Linear(d_model, 3 * d_model, bias=bias)
        self.out_proj = nn.Linear(d_model, d_model, bias=bias)
        if positions == "learned":
            self.caps = replace(self.caps, max_len=max_len)
            self.position_embedding = nn.Embedding(max_len, d_model)

    def forward(
        self, x_BTD: Tensor, state: State | None = None, *, context_BSD: Tensor | None = None
    ) -> tuple[Tensor, State | None]:
        """See `Mixer.forward`; a cross pattern with a state reads the context once and then from the state."""
        if self.cross:
            return self._cross(x_BTD, state, context_BSD)
        if context_BSD is not None:
            raise ValueError(f"pattern {self.pattern!r} reads its own input only; context_BSD belongs to the cross patterns")
        if state is None:
            position_T = torch.arange(x_BTD.shape[1], device=x_BTD.device)
            q, k, v = self._qkv(x_BTD, position_T)
            return self._merge(attention(q, k, v, causal=self.pattern == "causal_self")), None
        if self.pattern != "causal_self":
            raise ValueError(f"pattern {self.pattern!r} sees the future and so cannot continue a state; pass state=None")
        return self._continue(x_BTD, state)

    def step(self, x_BD: Tensor, state: State) -> tuple[Tensor, State]:
        """See `Mixer.step`: append the token's key and value, read all of them."""
        y_B1D, state = self.forward(x_BD[:, None], state)
        return y_B1D[:, 0], state

    def init_state(
        self, batch: int, max_len: int, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> State:
        """See `Mixer.init_state`: the key-value cache, and how much of it is filled."""
        shape = (batch, self.n_heads, max_len, self.head_dim)
        return {
            "k": torch.zeros(shape, device=device, dtype=dtype),
            "v": torch.zeros(shape, device=device, dtype=dtype),
            "position": torch.zeros(batch, device=device, dtype=torch.long),
        }

    def published_elements(self, seq_len: int) -> int:
        """See `Mixer.published_elements`: keys and values without the fill count (Arora et al. 2024, figure 2)."""
        return 2 * self.d_model * seq_len

    def _qkv(self, x_BTD: Tensor, position: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [B, H, T, K] of tokens at `position`, [T] or [B, T]."""
        if self.positions == "learned":
            x_BTD = x_BTD + self.position_embedding(position)
        q, k, v = self.qkv_proj(x_BTD).unflatten(-1, (3, self.n_heads, self.head_dim)).unbind(-3)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if self.positions == "rotary":
            q, k = rotary(q, position), rotary(k, position)
        return q, k, v

    def _continue(self, x_BTD: Tensor, state: State) -> tuple[Tensor, State]:
        """Appends the segment to the cache and attends to all that is filled."""
        n_new, size = x_BTD.shape[1], state["k"].shape[2]
        position_BT = state["position"][:, None] + torch.arange(n_new, device=x_BTD.device)
        q, k_new, v_new = self._qkv(x_BTD, position_BT)
        k = append(state["k"], k_new, position_BT)
        v = append(state["v"], v_new, position_BT)
        visible_BTS = torch.arange(size, device=x_BTD.device) <= position_BT[..., None]
        y = attention(q, k.to(q.dtype), v.to(q.dtype), mask_TS=visible_BTS[:, None])
        return self._merge(y), {"k": k, "v": v, "position": state["position"] + n_new}

    def _cross(self, x_BTD: Tensor, state: State | None, context_BSD: Tensor | None) -> tuple[Tensor, State | None]:
        """Reads the given context, or the one that the state holds."""
        q_weight, kv_weight = self.qkv_proj.weight.split((self.d_model, 2 * self.d_model))
        q_bias, kv_bias = (
            (None, None) if self.qkv_proj.bias is None else self.qkv_proj.bias.split((self.d_model, 2 * self.d_model))
        )
        q = F.linear(x_BTD, q_weight, q_bias).unflatten(-1, (self.n_heads, self.head_dim)).transpose(1, 2)
        if context_BSD is None:
            if state is None:
                raise ValueError(f"pattern {self.pattern!r} needs context_BSD, the [B, S, D] tensor that it reads")
            filled_BS = torch.arange(state["k"].shape[2], device=q.device) < state["position"][:, None]
            y = attention(q, state["k"].to(q.dtype), state["v"].to(q.dtype), mask_TS=filled_BS[:, None, None])
            return self._merge(y), dict(state)
        kv = F.linear(context_BSD, kv_weight, kv_bias).unflatten(-1, (2, self.n_heads, self.head_dim))
        k, v = (a.transpose(1, 2) for a in kv.unbind(-3))
        y = self._merge(attention(q, k, v))
        if state is None:
            return y, None
        position_S = torch.arange(k.shape[2], device=k.device)
        position_BS = position_S.expand(k.shape[0], -1)
        filled = torch.full_like(state["position"], k.shape[2])
        return y, {"k": append(state["k"], k, position_BS), "v": append(state["v"], v, position_BS), "position": filled}

    def _merge(self, y_BHTK: Tensor) -> Tensor:
        return self.out_proj(y_BHTK.transpose(1, 2).flatten(-2))


def append(cache_BHSK: Tensor, new_BHTK: Tensor, position_BT: Tensor) -> Tensor:
    """A copy of the cache with the new rows written at their positions.

    Raises:
        ValueError: the segment alone is longer than the cache.
    """
    n_new, size = new_BHTK.shape[2], cache_BHSK.shape[2]
    if n_new > size:
        raise ValueError(f"{n_new} tokens do not fit a state made for max_len={size}; make it with a larger max_len")
    index = position_BT[:, None, :, None].expand_as(new_BHTK)
    return cache_BHSK.scatter(2, index, new_BHTK.to(cache_BHSK.dtype))
