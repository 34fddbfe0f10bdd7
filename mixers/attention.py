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
from mixers._cache import append_kv, attend_cache, kv_cache, merge_heads, new_positions, split_heads
from mixers._rotary import POSITIONS, check_positions, rotary
from mixers._rows import attend_rows, few_rows


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
        if positions != "none":
            self.caps = replace(self.caps, patterns=frozenset({"causal_self", "noncausal_self"}))
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
            y = attention(q, k, v, causal=self.pattern == "causal_self")
            return self.out_proj(merge_heads(y)), None
        if self.pattern != "causal_self":
            raise ValueError(f"pattern {self.pattern!r} sees the future and so cannot continue a state; pass state=None")
        return self._continue(x_BTD, state)

    def at_rows(self, x_BTD: Tensor, rows_BM: Tensor, x_BMD: Tensor) -> Tensor:
        """See `Mixer.at_rows`: without making keys and values, unless they are rotated or many heads make them cheaper."""
        if self.positions != "none" or self.pattern != "causal_self" or not few_rows(x_BTD, rows_BM, self.n_heads):
            return super().at_rows(x_BTD, rows_BM, x_BMD)
        y_BMD = attend_rows(x_BTD, rows_BM, x_BMD, self.qkv_proj, self.n_heads, self.head_dim)
        return self.out_proj(y_BMD)

    def step(self, x_BD: Tensor, state: State) -> tuple[Tensor, State]:
        """See `Mixer.step`: append the token's key and value, read all of them."""
        y_B1D, state = self.forward(x_BD[:, None], state)
        return y_B1D[:, 0], state

    def init_state(
        self, batch: int, max_len: int, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> State:
        """See `Mixer.init_state`: the key-value cache, and how much of it is filled."""
        return kv_cache(batch, self.n_heads, max_len, self.head_dim, device=device, dtype=dtype)

    def published_elements(self, seq_len: int) -> int:
        """See `Mixer.published_elements`: keys and values without the fill count (Arora et al. 2024, figure 2)."""
        return 2 * self.d_model * seq_len

    def _qkv(self, x_BTD: Tensor, position: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [B, H, T, K] of tokens at `position`, [T] or [B, T]."""
        if self.positions == "learned":
            if x_BTD.shape[1] > self.max_len:
                raise ValueError(f"{x_BTD.shape[1]} tokens, but only max_len={self.max_len} learned positions; raise max_len")
            x_BTD = x_BTD + self.position_embedding(position)
        q, k, v = split_heads(self.qkv_proj(x_BTD), 3, self.n_heads)
        if self.positions == "rotary":
            q, k = rotary(q, position), rotary(k, position)
        return q, k, v

    def _continue(self, x_BTD: Tensor, state: State) -> tuple[Tensor, State]:
        """Appends the segment to the cache and attends to all that is filled."""
        position_BT = new_positions(state, x_BTD)
        q, k, v = self._qkv(x_BTD, position_BT)
        state = append_kv(state, k, v, position_BT)
        visible_BTS = torch.arange(state["k"].shape[2], device=q.device) <= position_BT[..., None]
        return self.out_proj(merge_heads(attend_cache(q, state, visible_BTS[:, None]))), state

    def _cross(self, x_BTD: Tensor, state: State | None, context_BSD: Tensor | None) -> tuple[Tensor, State | None]:
        """Reads the given context, or the one that the state holds."""
        sizes = (self.d_model, 2 * self.d_model)
        q_weight, kv_weight = self.qkv_proj.weight.split(sizes)
        q_bias, kv_bias = (None, None) if self.qkv_proj.bias is None else self.qkv_proj.bias.split(sizes)
        (q,) = split_heads(F.linear(x_BTD, q_weight, q_bias), 1, self.n_heads)
        if context_BSD is not None:
            k, v = split_heads(F.linear(context_BSD, kv_weight, kv_bias), 2, self.n_heads)
            y = attention(q, k, v)
            if state is not None:
                position_S = torch.arange(k.shape[2], device=k.device)
                state = append_kv(state, k, v, position_S.expand(k.shape[0], -1))
        elif state is None:
            raise ValueError(f"pattern {self.pattern!r} needs context_BSD, the [B, S, D] tensor that it reads")
        else:
            filled_BS = torch.arange(state["k"].shape[2], device=q.device) < state["position"][:, None]
            y = attention(q, state["k"].to(q.dtype), state["v"].to(q.dtype), mask_TS=filled_BS[:, None, None])
            state = dict(state)
        return self.out_proj(merge_heads(y)), state
