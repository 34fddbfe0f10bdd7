"""The two branches of a converted layer that read the teacher's queries, keys and values: a softmax window and a mixer.

Each branch maps queries, keys and values, and a state or None, to heads' outputs before the output projection and the
new state. Shape legend: B batch, T time, D width, H query heads, G key heads (G divides H), K head width, F features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.convert.fit import LONG
from kernels.attention import banded_attention
from kernels.banded_sums import banded_attention_sums
from kernels.recurrence import linear_recurrence
from mixers import Mixer, State
from mixers._cache import attend_window, fill_sinks, repeat_heads, window_cache
from mixers._layers import widen
from mixers.linear_attention import LinearAttention

Rope = tuple[Tensor, Tensor]
"""Cosines and sines of rotary position embedding, [B or 1, T, K] each, half-split layout."""
ALIGNED = 8
"""Width of a product of 16-bit numbers whose rows all begin where tensor cores can load them."""
EPS = 1e-6
"""Keeps the quotient finite where no token is older than the window."""


class WindowBranch(nn.Module):
    """Softmax over the last tokens and the first ones (Xiao et al. 2023), on rotated queries and keys.

    Args:
        n_kv_heads: G.
        head_dim: K.
        window: keys seen, the own one included.
        sinks: first tokens that stay visible.
        null_shape: [H, n] of learned scores without values, which only enter the normaliser, or None.
    """

    def __init__(
        self, n_kv_heads: int, head_dim: int, *, window: int, sinks: int, null_shape: tuple[int, int] | None = None
    ) -> None:
        super().__init__()
        self.n_kv_heads, self.head_dim, self.window, self.sinks = n_kv_heads, head_dim, window, sinks
        self.null_logits = None if null_shape is None else nn.Parameter(torch.zeros(null_shape))

    def forward(
        self, q_BHTK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor, state: State | None, x_BTD: Tensor | None = None
    ) -> tuple[Tensor, State | None]:
        """Mixes a segment: [B, H, T, K] and the new state; `x_BTD` is for branches that score keys, this one does not read it."""
        if self.null_logits is not None:
            near, near_sum, stored = self.sums(q_BHTK, k_BGTK, v_BGTK, state)
            return (near / near_sum).to(q_BHTK.dtype), None if state is None else stored
        if state is not None:
            return attend_window(q_BHTK, k_BGTK, v_BGTK, state, window=self.window)
        sinks = (k_BGTK[:, :, : self.sinks], v_BGTK[:, :, : self.sinks]) if self.sinks else None
        return banded_attention(q_BHTK, k_BGTK, v_BGTK, window=self.window, sink_kv=sinks), None

    def sums(self, q_BHTK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor, state: State | None) -> tuple[Tensor, Tensor, State]:
        """The numerator [B, H, T, K] and denominator [B, H, T, 1] of the same, and the new storage."""
        given = self.init_state(len(q_BHTK), device=q_BHTK.device, dtype=q_BHTK.dtype) if state is None else state
        n_new, start_B = q_BHTK.shape[2], given["position"]
        k, v = (torch.cat((given[name], new.to(given[name].dtype)), 2) for name, new in (("k", k_BGTK), ("v", v_BGTK)))
        stored = {"k": k[:, :, n_new:], "v": v[:, :, n_new:], "position": start_B + n_new}
        sinks = None
        if self.sinks:
            stored |= fill_sinks(given, k_BGTK, v_BGTK)
            sinks = tuple(repeat_heads(stored[name].to(q_BHTK.dtype), q_BHTK) for name in ("sink_k", "sink_v"))
        k, v = (repeat_heads(a.to(q_BHTK.dtype), q_BHTK) for a in (k, v))
        null_H = None if self.null_logits is None else widen(self.null_logits).logsumexp(-1)
        named = {"window": self.window, "start_B": start_B, "sink_kv": cast(Any, sinks), "null_logit_H": null_H}
        return *banded_attention_sums(q_BHTK, k, v, **named), stored

    def init_state(self, batch: int, *, device: torch.device | str, dtype: torch.dtype) -> State:
        """The storage before the first token, keys and values of G heads."""
        length = max(self.window - 1, self.sinks)
        sizes = (batch, self.n_kv_heads, length, self.head_dim)
        return window_cache(*sizes, window=self.window, sinks=self.sinks, device=device, dtype=dtype)


class SharedDenominator(nn.Module):
    """Softmax in a window and linear attention to all older tokens, under one normaliser (LoLCATs, Zhang et al. 2025).

    y_t = (gamma sum_window e^(q.k - m) v + sum_older phi(q).phi(k) v) / (gamma sum_window e^(q.k - m) + sum_older phi(q).phi(k))

    with m the largest score in the window and one learned gamma in (0, 1) per head. A token belongs to the older ones
    once it has left the window; a sink never does.

    Args:
        mixer: linear attention, whose feature maps phi are used; they must be positive.
        window: the branch whose sums are shared.
        gamma: initial weight of the window.
    """

    def __init__(self, mixer: LinearAttention, window: WindowBranch, *, gamma: float = 0.1) -> None:
        super().__init__()
        self.phi_q, self.phi_k, self.window = mixer.phi_q, mixer.phi_k, window
        self.n_heads, self.features = mixer.n_heads, cast(int, mixer.phi_k.features)
        self.gamma_logit = nn.Parameter(torch.full((mixer.n_heads,), math.log(gamma / (1 - gamma))))

    def forward(
        self, q_BHTK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor, state: State | None, ablation: str = "both"
    ) -> tuple[Tensor, State | None]:
        """Mixes a segment: [B, H, T, K] and the new state; an ablation leaves one share out of both sums."""
        given = self.init_state(len(q_BHTK), device=q_BHTK.device, dtype=q_BHTK.dtype) if state is None else state
        near, near_sum, stored = self.window.sums(q_BHTK, k_BGTK, v_BGTK, given)
        # As many keys leave the window as are new: the oldest of those stored and new.
        n_new = q_BHTK.shape[2]
        k, v = (torch.cat((given[name], new.to(given[name].dtype)), 2) for name, new in (("k", k_BGTK), ("v", v_BGTK)))
        older, sums = self._older(q_BHTK, k[:, :, :n_new], v[:, :, :n_new], given)
        gamma = torch.sigmoid(widen(self.gamma_logit))[:, None, None]
        shares = {"window": (gamma * near, gamma * near_sum), "mixer": (older[..., :-1], older[..., -1:] + EPS)}
        named = list(shares.values()) if ablation == "both" else [shares[ablation]]
        y = torch.stack([part for part, _ in named]).sum(0) / torch.stack([part for _, part in named]).sum(0)
        return y.to(q_BHTK.dtype), None if state is None else stored | {"s": sums}

    def init_state(self, batch: int, *, device: torch.device | str, dtype: torch.dtype) -> State:
        """The window's storage, and the sums over older tokens (the normaliser is their last column), in fp32 or better."""
        shape = (batch, self.n_heads, self.features, self.window.head_dim + 1)
        wide = torch.promote_types(dtype, torch.float32)
        window = self.window.init_state(batch, device=device, dtype=dtype)
        return window | {"s": torch.zeros(shape, device=device, dtype=wide)}

    def _older(self, q_BHTK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor, given: State) -> tuple[Tensor, Tensor]:
        """Linear attention to what leaves the window: [B, H, T, K + 1] of numerator and denominator, and the new sums.

        The i-th given key leaves the window after the i-th new token and so is seen from the next one on.
        """
        index_BT = given["position"][:, None] - (self.window.window - 1) + torch.arange(k_BGTK.shape[2], device=k_BGTK.device)
        leaves_B1T1 = (index_BT >= self.window.sinks)[:, None, :, None]
        k_BTHF = widen(self.phi_k(_tokens_first(repeat_heads(k_BGTK, q_BHTK).to(q_BHTK.dtype)))) * leaves_B1T1.transpose(1, 2)
        v_BTHK = widen(_tokens_first(repeat_heads(v_BGTK, q_BHTK)))
        v1_BTHV = torch.cat((v_BTHK, torch.ones_like(v_BTHK[..., :1])), -1)
        q_BTHF = widen(self.phi_q(_tokens_first(q_BHTK)))
        seen_k, seen_v = (torch.cat((torch.zeros_like(a[:, :1]), a[:, :-1]), 1) for a in (k_BTHF, v1_BTHV))
        o_BTHV, sums = linear_recurrence(q_BTHF, seen_k, seen_v, state_BHKV=given["s"])
        assert sums is not None
        return o_BTHV.transpose(1, 2), sums + k_BTHF[:, -1, :, :, None] * v1_BTHV[:, -1, :, None, :]


class MixerBranch(nn.Module):
    """A mixer that reads the teacher's heads; its own projections are taken away.

    Args:
        mixer: one that offers `mix`.
        readers: query heads that read one state. The state depends on keys, values and the layer's input alone, so it is the
            same for all of them: each reads it as a row of a larger batch, and one of the equal states is kept. What the
            mixer makes of the layer's input it makes once; only the result, a few numbers a head, is repeated.
    """

    def __init__(self, mixer: Mixer, *, readers: int = 1) -> None:
        super().__init__()
        for name in ("qkv_proj", "o_proj", "out_proj"):
            if hasattr(mixer, name):
                delattr(mixer, name)
        self.mixer, self.readers = mixer, readers
        for name in mixer.input_maps if readers > 1 else ():
            if (part := getattr(mixer, name)) is not None:
                part.register_forward_hook(lambda _, args, output: output.repeat_interleave(readers, 0))

    def forward(
        self,
        q_BHTK: Tensor,
        k_BGTK: Tensor,
        v_BGTK: Tensor,
        x_BTD: Tensor,
        state: State | None,
        rope: Rope | None = None,
    ) -> tuple[Tensor, State | None]:
        """Mixes a segment: [B, H, T, K] and the new state; `rope` is for a mixer that rotates its features."""
        n_heads, batch = q_BHTK.shape[1], len(x_BTD)
        if self.readers > 1:
            q_BHTK = q_BHTK.unflatten(1, (-1, self.readers)).transpose(1, 2).flatten(0, 1)
            k_BGTK, v_BGTK = (a.repeat_interleave(self.readers, 0) for a in (k_BGTK, v_BGTK))
            state = None if state is None else {name: a.repeat_interleave(self.readers, 0) for name, a in state.items()}
        named = {} if rope is None else {"rotate": self._rotation(rope)}
        o_BTE, state = self.mixer.mix(_joined(q_BHTK, k_BGTK, v_BGTK), x_BTD, state, **named)
        if self.readers > 1:
            o_BTE = o_BTE.unflatten(0, (batch, self.readers)).unflatten(-1, (n_heads // self.readers, -1))
            o_BTE = o_BTE.permute(0, 2, 3, 1, 4).flatten(2)
            state = None if state is None else {name: a[:: self.readers] for name, a in state.items()}
        return o_BTE.unflatten(-1, (n_heads, -1)).transpose(1, 2), state

    def _rotation(self, rope: Rope) -> Callable[[Tensor], Tensor]:
        """Rotates features [B, T, H, K] of all readers."""
        own = tuple(part.repeat_interleave(self.readers, 0) for part in rope)
        return lambda a_BTHK: rotate(_tokens_first(a_BTHK), (own[0], own[1])).transpose(1, 2)

    def matrix(self, q_BHTK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor) -> Tensor:
        """The causal matrix of linear attention, [B, H, T, T]."""
        return cast(LinearAttention, self.mixer).matrix(_joined(q_BHTK, k_BGTK, v_BGTK))

    def init_state(self, batch: int, *, device: torch.device | str, dtype: torch.dtype) -> State:
        """The mixer's state before the first token, in fp32 or better."""
        return self.mixer.init_state(batch, LONG, device=device, dtype=torch.promote_types(dtype, torch.float32))


def rotate(a_BHTK: Tensor, rope: Rope) -> Tensor:
    """Rotary position embedding in the half-split layout (Su et al. 2021)."""
    cos, sin = (part[:, None].to(a_BHTK.dtype) for part in rope)
    first, second = a_BHTK.chunk(2, -1)
    return a_BHTK * cos + torch.cat((-second, first), -1) * sin


def projected(x_BTD: Tensor, maps: Sequence[nn.Module]) -> tuple[Tensor, ...]:
    """What each map makes of the same input, [B, T, E] each.

    In training plain maps are one product: their input is read once, and its gradient written once. Elsewhere joining the
    weights would cost more than it saves.
    """
    if not torch.is_grad_enabled() or any(type(each) is not nn.Linear for each in maps):
        return tuple(each(x_BTD) for each in maps)
    linear = cast("Sequence[nn.Linear]", maps)
    widths = [each.out_features for each in linear]
    spare = linear[0].weight.new_zeros(-sum(widths) % ALIGNED, linear[0].in_features)
    y_BTE = F.linear(x_BTD, torch.cat([*(each.weight for each in linear), spare]))
    parts = y_BTE.split([*widths, len(spare)], -1)
    return tuple(y if each.bias is None else y + each.bias.to(y.dtype) for y, each in zip(parts, linear, strict=False))


def _tokens_first(a_BHTK: Tensor) -> Tensor:
    return a_BHTK.transpose(1, 2)


def _joined(q_BHTK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor) -> Tensor:
    """Queries, keys and values of all heads along the last axis, as `Mixer.mix` takes them."""
    repeated = (q_BHTK, repeat_heads(k_BGTK, q_BHTK), repeat_heads(v_BGTK, q_BHTK))
    return torch.cat([_tokens_first(a).flatten(2) for a in repeated], -1)
