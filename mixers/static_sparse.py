"""Softmax attention under a fixed sparse pattern: who sees whom depends on positions alone (`kernels.sparse_masks`).

Shape legend: B batch, T time, S stored keys, D width, H heads, K head width.
"""

from __future__ import annotations

import inspect

import torch
from torch import Tensor, nn

from kernels.attention import banded_attention
from kernels.indexed_attention import sparse_attention
from kernels.sparse_masks import MASKS
from mixers._base import Caps, Mixer, State, heads, mixer
from mixers._cache import append_kv, attend_cache, attend_window, kv_cache, merge_heads, new_positions, split_heads, window_cache


@mixer("static_sparse")
class StaticSparse(Mixer):
    """Dilated, strided, Longformer, BigBird, PowerAttention or sink-window attention, without positions of its own.

    All but sink_window must keep the whole key-value cache, since a later query may see any of it; what they save is
    reading (`read_elements`). Options that the chosen mask does not use are ignored.

    Args:
        mask: one of `kernels.sparse_masks.MASKS`.
        n_heads: number of heads.
        window: recent keys seen, the own one included; for dilated windows the number of keys, not their span.
        sinks: first tokens that every query sees.
        stride: period of the strided pattern.
        dilation: period of the dilated windows.
        n_random: random keys of a BigBird query.
        seed: of those random keys.
        bias: whether the projections have biases.
    """

    caps = Caps(patterns=frozenset({"causal_self"}))
    variants = (
        {"mask": "dilated", "window": 4, "dilation": 3, "n_heads": 2},
        {"mask": "strided", "stride": 6},
        {"mask": "longformer", "window": 4, "dilation": 2, "sinks": 2},
        {"mask": "bigbird", "window": 4, "sinks": 2, "n_random": 2},
        {"mask": "power", "window": 4, "sinks": 1, "bias": False},
        {"mask": "sink_window", "window": 6, "sinks": 2},
    )

    def __init__(
        self,
        d_model: int,
        *,
        layer: int = 0,
        pattern: str = "causal_self",
        mask: str = "power",
        n_heads: int = 1,
        window: int = 16,
        sinks: int = 4,
        stride: int = 16,
        dilation: int = 4,
        n_random: int = 4,
        seed: int = 0,
        bias: bool = True,
    ) -> None:
        super().__init__(d_model, pattern=pattern)
        if mask not in MASKS:
            raise ValueError(f"mask={mask!r} is not known; choose one of {', '.join(MASKS)}")
        if min(window, stride, dilation) < 1 or min(sinks, n_random) < 0:
            raise ValueError("window, stride and dilation must be at least 1, sinks and n_random at least 0")
        self.n_heads, self.head_dim = n_heads, heads(d_model, n_heads)
        self.mask, self.window, self.sinks = mask, window, sinks
        given = {
            "window": window,
            "sinks": sinks,
            "stride": stride,
            "dilation": dilation,
            "n_random": n_random,
            "seed": seed,
        }
        self.mask_options = {name: given[name] for name in inspect.signature(MASKS[mask]).parameters if name in given}
        self.qkv_proj = nn.Linear(d_model, 3 * d_model, bias=bias)
        self.out_proj = nn.Linear(d_model, d_model, bias=bias)

    def forward(
        self, x_BTD: Tensor, state: State | None = None, *, context_BSD: Tensor | None = None
    ) -> tuple[Tensor, State | None]:
        """See `Mixer.forward`."""
        if context_BSD is not None:
            raise ValueError("static_sparse reads its own input only; context_BSD belongs to the cross patterns")
        q, k, v = split_heads(self.qkv_proj(x_BTD), 3, self.n_heads)
        if self.mask == "sink_window":
            y, state = self._sink_window(q, k, v, state)
        elif state is None:
            y = sparse_attention(q, k, v, pattern=self.mask, **self.mask_options)
        else:
            position_BT = new_positions(state, x_BTD)
            state = append_kv(state, k, v, position_BT)
            stored_S = torch.arange(state["k"].shape[2], device=q.device)
            visible_BTS = self._visible(position_BT[..., None], stored_S)
            y = attend_cache(q, state, visible_BTS[:, None])
        return self.out_proj(merge_heads(y)), state

    def step(self, x_BD: Tensor, state: State) -> tuple[Tensor, State]:
        """See `Mixer.step`: append the token's key and value, read what the pattern allows."""
        y_B1D, state = self.forward(x_BD[:, None], state)
        return y_B1D[:, 0], state

    def init_state(
        self, batch: int, max_len: int, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> State:
        """See `Mixer.init_state`: the key-value cache, or the window and the sinks alone for sink_window."""
        sizes = (batch, self.n_heads, max_len, self.head_dim)
        if self.mask == "sink_window":
            return window_cache(*sizes, window=self.window, sinks=self.sinks, device=device, dtype=dtype)
        return kv_cache(*sizes, device=device, dtype=dtype)

    def read_elements(self, seq_len: int) -> int:
        """See `Mixer.read_elements`: keys and values that the last of `seq_len` tokens sees."""
        last, stored_S = torch.tensor(seq_len - 1), torch.arange(seq_len)
        return 2 * self.d_model * int(self._visible(last, stored_S).sum())

    def _visible(self, query: Tensor, key: Tensor) -> Tensor:
        return MASKS[self.mask](query, key, **self.mask_options)

    def _sink_window(self, q_BHTK: Tensor, k_BHTK: Tensor, v_BHTK: Tensor, state: State | None) -> tuple[Tensor, State | None]:
        """The one pattern with a bounded state."""
        if state is not None:
            return attend_window(q_BHTK, k_BHTK, v_BHTK, state, window=self.window)
        sinks = (k_BHTK[:, :, : self.sinks], v_BHTK[:, :, : self.sinks]) if self.sinks else None
        return banded_attention(q_BHTK, k_BHTK, v_BHTK, window=self.window, sink_kv=sinks), None
