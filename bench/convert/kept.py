"""Softmax over a window and the best keys that have left it, in room for a fixed number: a learned score says which to keep.

The score sees a layer's input at a token and estimates how much attention the token's key will ever draw from beyond the
window (Locret, Huang et al. 2024, trains such scores; ours is fitted to log-probabilities of the teacher's attention).

Shape legend: B batch, T new tokens, R keys of the window and the new tokens, P kept keys, S sinks, D width, H query heads,
G key heads (G divides H), K head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.attention import attention
from kernels.chosen_keys import seen, top_keys
from kernels.kept_step import Kept, kept_step
from kernels.step import is_step
from kernels.window_step import Stored
from mixers import State
from mixers._cache import STORED, fill_sinks, repeat_heads, window_cache
from mixers._layers import widen

HIDDEN = 64
"""Width of the score's hidden layer."""
GRID = 256.0
"""Scores are compared on a grid of 1 / GRID nats: equal tokens of the first layer have equal scores however they are summed, and
the newer key wins."""
PIECE = 2048
"""Tokens that are mixed at once where no gradient is wanted: which key each query still sees is a matrix of queries by keys."""
KEPT = ("kept_k", "kept_v", "kept_score", "score")
"""Names of what is stored beside the window, in the order of `Kept`."""
FLOOR = -9.0
"""Log-probability below which attention counts as none."""


class KeptKeys(nn.Module):
    """Attention of some key heads to their last keys, the first ones, and those of the rest that score best.

    Args:
        n_kv_heads: G.
        head_dim: K.
        d_model: D.
        window: newest keys, which every query sees, its own included.
        kept: P, keys that stay of those that have left the window. One that was dropped never returns.
        sinks: first tokens that stay visible.
    """

    def __init__(self, n_kv_heads: int, head_dim: int, d_model: int, *, window: int, kept: int, sinks: int) -> None:
        super().__init__()
        self.n_kv_heads, self.head_dim, self.window, self.kept, self.sinks = n_kv_heads, head_dim, window, kept, sinks
        self.hidden, self.score = nn.Linear(d_model, HIDDEN), nn.Linear(HIDDEN, n_kv_heads)

    def scores(self, x_BTD: Tensor) -> Tensor:
        """The score of every token's keys, [B, G, T], in fp32: a rounded score would keep another key."""
        with torch.autocast(x_BTD.device.type, enabled=False):
            hidden = F.linear(widen(x_BTD), widen(self.hidden.weight), widen(self.hidden.bias))
            return F.linear(F.gelu(hidden), widen(self.score.weight), widen(self.score.bias)).transpose(1, 2)

    def forward(
        self, q_BHTK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor, state: State | None, x_BTD: Tensor
    ) -> tuple[Tensor, State | None]:
        """Mixes a segment: [B, H, T, K] and the new state."""
        sizes = {"device": q_BHTK.device, "dtype": q_BHTK.dtype}
        if q_BHTK.shape[2] > PIECE and not torch.is_grad_enabled():
            running: State | None = self.init_state(len(q_BHTK), **sizes) if state is None else state
            outputs: list[Tensor] = []
            for q, k, v, x in zip(*(a.split(PIECE, 2) for a in (q_BHTK, k_BGTK, v_BGTK)), x_BTD.split(PIECE, 1), strict=True):
                o, running = self(q, k, v, running, x)
                outputs.append(o)
            return torch.cat(outputs, 2), None if state is None else running
        if state is not None and is_step(q_BHTK.shape[2], state["k"], q_BHTK, k_BGTK, v_BGTK):
            return self._step(q_BHTK, k_BGTK, v_BGTK, state, x_BTD)
        given = self._empty(len(q_BHTK), 0, **sizes) if state is None else state
        new = {"k": k_BGTK, "v": v_BGTK, "score": self._on_grid(x_BTD)}
        near = {name: torch.cat((given[name], a.to(given[name].dtype)), 2) for name, a in new.items()}
        held = near | {name: given[name] for name in ("kept_k", "kept_v", "kept_score")} | fill_sinks(given, k_BGTK, v_BGTK)
        visible_BGTN = self._visible(held, given["position"], q_BHTK.shape[2])
        k, v = (
            repeat_heads(torch.cat([held[part + name] for part in ("sink_", "kept_", "")], 2).to(q_BHTK.dtype), q_BHTK)
            for name in ("k", "v")
        )
        o_BHTK = attention(q_BHTK, k, v, mask_TS=visible_BGTN.repeat_interleave(q_BHTK.shape[1] // self.n_kv_heads, 1))
        return o_BHTK, None if state is None else self._stored(held, given["position"], q_BHTK.shape[2])

    def _on_grid(self, x_BTD: Tensor) -> Tensor:
        return (self.scores(x_BTD).detach() * GRID).round()

    def _step(self, q_BH1K: Tensor, k_BG1K: Tensor, v_BG1K: Tensor, state: State, x_B1D: Tensor) -> tuple[Tensor, State]:
        """One decoded token."""
        sinks = [state[f"sink_{a}"] if self.sinks else None for a in ("k", "v")]
        stored = Stored(state["k"], state["v"], state["position"], *sinks)
        kept = Kept(*(state[name] for name in KEPT))
        token = (q_BH1K[:, :, 0], k_BG1K[:, :, 0], v_BG1K[:, :, 0], self._on_grid(x_B1D)[:, :, 0])
        y_BHK, stored, kept = kept_step(*token, stored, kept)
        named = dict(zip((*STORED, *KEPT), (*stored, *kept), strict=True))
        return y_BHK[:, :, None], {name: state[name] if a is None else a for name, a in named.items()}

    def loss(self, q_BHTK: Tensor, k_BGTK: Tensor, x_BTD: Tensor) -> Tensor:
        """Mean squared error of the scores against the largest log-probability that a key draws from beyond the window."""
        length = q_BHTK.shape[2]
        index = torch.arange(length, device=q_BHTK.device)
        age_TT = index[:, None] - index
        with torch.no_grad():
            q_BGRTK = q_BHTK.unflatten(1, (self.n_kv_heads, -1))
            logits = widen(q_BGRTK @ k_BGTK[:, :, None].mT) * self.head_dim**-0.5
            log_p = logits.masked_fill(age_TT < 0, float("-inf")).log_softmax(-1)
            drawn_BGT = log_p.masked_fill(age_TT < self.window, FLOOR).clamp(min=FLOOR).amax((2, 3))
        leaves_T = (index >= self.sinks) & (index < length - self.window)
        error = (self.scores(x_BTD) - drawn_BGT).square() * leaves_T
        return error.sum() / (leaves_T.sum().clamp(min=1) * drawn_BGT[:, :, 0].numel())

    def init_state(self, batch: int, *, device: torch.device | str, dtype: torch.dtype) -> State:
        """The storage before the first token."""
        return self._empty(batch, self.kept, device=device, dtype=dtype)

    def _empty(self, batch: int, kept: int, *, device: torch.device | str, dtype: torch.dtype) -> State:
        length, named = max(self.window - 1, self.sinks), {"device": device, "dtype": dtype}
        near = window_cache(batch, self.n_kv_heads, length, self.head_dim, window=self.window, sinks=self.sinks, **named)
        room = (batch, self.n_kv_heads, kept)
        none = torch.zeros(batch, self.n_kv_heads, 0, self.head_dim, **named)
        return (
            {"sink_k": none, "sink_v": none}
            | near
            | {
                "score": torch.zeros(*room[:2], self.window - 1, device=device),
                "kept_k": torch.zeros(*room, self.head_dim, **named),
                "kept_v": torch.zeros(*room, self.head_dim, **named),
                "kept_score": torch.full(room, float("-inf"), device=device),
            }
        )

    def _visible(self, held: State, start_B: Tensor, n_new: int) -> Tensor:
        """Which sinks, kept keys and keys of window and segment each query sees: [B, G, T, S + P + R]."""
        n_near, device = held["k"].shape[2], start_B.device
        query_T1, near_R = torch.arange(n_new, device=device)[:, None], torch.arange(n_near, device=device)
        filled_BR = start_B[:, None] - (self.window - 1) + near_R >= self.sinks
        in_window_BTR = (near_R >= query_T1) & (near_R < query_T1 + self.window) & filled_BR[:, None]
        sink_S = torch.arange(held["sink_k"].shape[2], device=device)
        sink_BTS = sink_S <= start_B[:, None, None] + query_T1
        kept_BGTP, left_BGTR = self._older(held, filled_BR, n_new)
        heads = (-1, self.n_kv_heads, -1, -1)
        return torch.cat((sink_BTS[:, None].expand(heads), kept_BGTP, in_window_BTR[:, None] | left_BGTR), -1)

    def _older(self, held: State, filled_BR: Tensor, n_new: int) -> tuple[Tensor, Tensor]:
        """Which of the kept keys, and of those that leave the window meanwhile, are still among the best at each query.

        The i-th key of window and segment leaves with the i-th new token, so it competes from the next query on: one empty
        place is put before those that leave.
        """
        kept_BGP, leaving_BGT = held["kept_score"], held["score"][:, :, : n_new - 1]
        empty = torch.full_like(held["score"][:, :, :1], float("-inf"))
        filled_BGT = filled_BR[:, None, : n_new - 1].expand_as(leaving_BGT)
        filled = torch.cat((kept_BGP > float("-inf"), empty > 0, filled_BGT), 2).flatten(0, 1)
        score = torch.cat((kept_BGP, empty, leaving_BGT), 2).flatten(0, 1)
        best = top_keys(score, filled, seen(n_new, filled), self.kept).unflatten(0, held["k"].shape[:2])
        n_kept = kept_BGP.shape[2]
        return best[..., :n_kept], F.pad(best[..., n_kept + 1 :], (0, held["k"].shape[2] - n_new + 1))

    def _stored(self, held: State, start_B: Tensor, n_new: int) -> State:
        """The storage after a segment: the last keys, and the best of the kept ones and those that left the window."""
        index_T = torch.arange(n_new, device=start_B.device)
        leaves_BT = start_B[:, None] - (self.window - 1) + index_T >= self.sinks
        leaving_BGT = held["score"][:, :, :n_new].masked_fill(~leaves_BT[:, None], float("-inf"))
        score = torch.cat((held["kept_score"], leaving_BGT), 2)
        # Of equal scores the newer key wins, as it does in `top_keys`, so kept keys stay in order of age.
        newest_first = score.flip(2).argsort(dim=2, descending=True, stable=True)[:, :, : self.kept]
        order = (score.shape[2] - 1 - newest_first).sort(2).values
        rows = order[..., None].expand(*order.shape, self.head_dim)
        kept = {f"kept_{a}": torch.cat((held[f"kept_{a}"], held[a][:, :, :n_new]), 2).gather(2, rows) for a in ("k", "v")}
        near = {name: held[name][:, :, n_new:] for name in ("k", "v", "score")}
        sinks = {name: held[name] for name in ("sink_k", "sink_v")}
        return near | sinks | kept | {"kept_score": score.gather(2, order), "position": start_B + n_new}
