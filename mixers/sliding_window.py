"""Sliding-window softmax attention, optionally with attention sinks (Child et al. 2019; Xiao et al. 2023, StreamingLLM).

Shape legend: B batch, T time, D width, H heads, K head width, W stored window, P sinks.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kernels.attention import banded_attention
from mixers._base import Caps, Mixer, State, heads, mixer
from mixers._cache import attend_window, merge_heads, new_positions, split_heads, window_cache
from mixers._rotary import check_positions, rotary
from mixers._rows import attend_rows, few_rows


@mixer("sliding_window")
class SlidingWindow(Mixer):
    """Softmax attention to the last `window` tokens and, if wished, to the first `sinks` tokens.

    `window` counts the keys that a query really sees, its own included; decoding the next token therefore needs
    window - 1 stored keys, and that is the state. Zoology's "window w" sees w + 1 keys and is charged 2 d w elements:
    it is window = w + 1 here, and both counts agree.

    Args:
        n_heads: number of heads.
        window: number of keys seen, the own one included.
        sinks: number of first tokens that stay visible for ever.
        positions: none, or rotary on queries and keys by absolute position.
        bias: whether the projections have biases.
    """

    caps = Caps(patterns=frozenset({"causal_self"}))
    variants = (
        {"window": 8},
        {"window": 8, "sinks": 3, "n_heads": 2, "positions": "rotary", "bias": False},
        {"window": 1, "sinks": 1},
        {"window": 128},
    )

    def __init__(
        self,
        d_model: int,
        *,
        layer: int = 0,
        pattern: str = "causal_self",
        n_heads: int = 1,
        window: int = 64,
        sinks: int = 0,
        positions: str = "none",
        bias: bool = True,
    ) -> None:
        super().__init__(d_model, pattern=pattern)
        if window < 1 or sinks < 0:
            raise ValueError(f"window={window}, sinks={sinks}: a query sees at least itself (window >= 1), and sinks >= 0")
        self.n_heads, self.head_dim = n_heads, heads(d_model, n_heads)
        check_positions(positions, self.head_dim, ("none", "rotary"))
        self.window, self.sinks, self.positions = window, sinks, positions
        self.qkv_proj = nn.Linear(d_model, 3 * d_model, bias=bias)
        self.out_proj = nn.Linear(d_model, d_model, bias=bias)

    def forward(
        self, x_BTD: Tensor, state: State | None = None, *, context_BSD: Tensor | None = None
    ) -> tuple[Tensor, State | None]:
        """See `Mixer.forward`."""
        if context_BSD is not None:
            raise ValueError("sliding_window reads its own input only; context_BSD belongs to the cross patterns")
        if state is None:
            q, k, v = self._qkv(x_BTD, torch.arange(x_BTD.shape[1], device=x_BTD.device))
            sinks = (k[:, :, : self.sinks], v[:, :, : self.sinks]) if self.sinks else None
            y = banded_attention(q, k, v, window=self.window, sink_kv=sinks)
        else:
            q, k, v = self._qkv(x_BTD, new_positions(state, x_BTD))
            y, state = attend_window(q, k, v, state, window=self.window)
        return self.out_proj(merge_heads(y)), state

    def at_rows(self, x_BTD: Tensor, rows_BM: Tensor, x_BMD: Tensor) -> Tensor:
        """See `Mixer.at_rows`: as in `Attention.at_rows`."""
        if self.positions != "none" or self.sinks or not few_rows(x_BTD, rows_BM, self.n_heads):
            return super().at_rows(x_BTD, rows_BM, x_BMD)
        y_BMD = attend_rows(x_BTD, rows_BM, x_BMD, self.qkv_proj, self.n_heads, self.head_dim, window=self.window)
        return self.out_proj(y_BMD)

    def step(self, x_BD: Tensor, state: State) -> tuple[Tensor, State]:
        """See `Mixer.step`: attend to the stored keys and the own one, then drop the oldest."""
        y_B1D, state = self.forward(x_BD[:, None], state)
        return y_B1D[:, 0], state

    def init_state(
        self, batch: int, max_len: int, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> State:
        """See `Mixer.init_state`: the last keys and values in order of age, the sinks, and the number of tokens seen."""
        sizes = (batch, self.n_heads, max_len, self.head_dim)
        return window_cache(*sizes, window=self.window, sinks=self.sinks, device=device, dtype=dtype)

    def published_elements(self, seq_len: int) -> int:
        """See `Mixer.published_elements`: 2 d w with w = window - 1 (Zoology), plus sinks; whatever the length."""
        return 2 * self.d_model * (self.window - 1 + self.sinks)

    def _qkv(self, x_BTD: Tensor, position: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [B, H, T, K] of tokens at `position`, [T] or [B, T]."""
        q, k, v = split_heads(self.qkv_proj(x_BTD), 3, self.n_heads)
        if self.positions == "rotary":
            q, k = rotary(q, position), rotary(k, position)
        return q, k, v
