"""Linear attention (Katharopoulos et al. 2020): exp(q . k) becomes phi(q) . phi(k), so that keys can be summed up.

    S_t = S_{t-1} + phi(k_t) v_t^T,    z_t = z_{t-1} + phi(k_t),    o_t = S_t^T phi(q_t) / z_t . phi(q_t)

Shape legend: B batch, T time, S context length, D width, H heads, K query width of a head, F features, V value width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.layer_step import Apart, layer_step
from kernels.recurrence import linear_recurrence, normalized_recurrence
from kernels.step_form import StepForm
from kernels.taylor import taylor_attention
from mixers._base import PATTERNS, Caps, Mixer, State, heads, mixer
from mixers._feature_maps import Taylor2, make_feature_map
from mixers._fused import is_fused, next_state
from mixers._layers import refuse_context, widen
from mixers._rows import attend_rows, few_rows

EPS = 1e-6
"""Keeps the quotient finite where all weights are zero, as ReLU features can make them."""


@mixer("linear_attention")
class LinearAttention(Mixer):
    """Linear attention with a choice of feature maps; `taylor2` with one head is the linear half of BASED.

    Args:
        feature_map: elu, relu, t2r, hedgehog, taylor2 or identity; learned maps differ between q and k.
        n_heads: number of heads.
        feature_dim: width of q and k in a head before the map; None means D / H.
        map_columns: columns of Hedgehog's matrix, half as many as its features; None means as many as rows.
        normalize: divide by the sum of the weights; needs a map that keeps it positive, which identity does not.
    """

    caps = Caps(patterns=frozenset(PATTERNS))
    variants = (
        {},
        {"feature_map": "relu", "n_heads": 2},
        {"feature_map": "t2r", "n_heads": 2},
        {"feature_map": "hedgehog", "n_heads": 2},
        {"feature_map": "hedgehog", "map_columns": 3},
        {"feature_map": "taylor2", "feature_dim": 4},
        {"feature_map": "identity", "normalize": False},
        {"feature_map": "elu", "normalize": False, "feature_dim": 3, "n_heads": 4},
    )

    def __init__(
        self,
        d_model: int,
        *,
        layer: int = 0,
        pattern: str = "causal_self",
        feature_map: str = "elu",
        n_heads: int = 1,
        feature_dim: int | None = None,
        map_columns: int | None = None,
        normalize: bool = True,
    ) -> None:
        super().__init__(d_model, pattern=pattern)
        if feature_map == "identity" and normalize:
            raise ValueError("the feature map 'identity' gives weights of either sign; set normalize=False")
        self.n_heads, self.v_dim, self.normalize = n_heads, heads(d_model, n_heads), normalize
        self.k_dim = self.v_dim if feature_dim is None else feature_dim
        self.phi_q = make_feature_map(feature_map, n_heads, self.k_dim, columns=map_columns)
        self.phi_k = make_feature_map(feature_map, n_heads, self.k_dim, columns=map_columns)
        self.qkv_proj = nn.Linear(d_model, 2 * n_heads * self.k_dim + d_model, bias=False)
        self.out_proj = nn.Linear(d_model, d_model, bias=False)

    def forward(
        self, x_BTD: Tensor, state: State | None = None, *, context_BSD: Tensor | None = None
    ) -> tuple[Tensor, State | None]:
        """See `Mixer.forward`; a cross pattern with a state reads the context once and then from the state."""
        if self.pattern.endswith("cross"):
            return self._cross(x_BTD, state, context_BSD)
        refuse_context(self, context_BSD)
        o_BTE, state = self.mix(self.qkv_proj(x_BTD), x_BTD, state)
        return self.out_proj(o_BTE), state

    def at_rows(self, x_BTD: Tensor, rows_BM: Tensor, x_BMD: Tensor) -> Tensor:
        """See `Mixer.at_rows`: for Taylor features, whose products are a polynomial of scores, as in `Attention.at_rows`."""
        taylor = isinstance(self.phi_k, Taylor2) and self.pattern == "causal_self"
        if not taylor or not few_rows(x_BTD, rows_BM, self.n_heads):
            return super().at_rows(x_BTD, rows_BM, x_BMD)
        eps = EPS if self.normalize else None
        y_BMD = attend_rows(x_BTD, rows_BM, x_BMD, self.qkv_proj, self.n_heads, self.k_dim, weights="taylor", eps=eps)
        return self.out_proj(y_BMD)

    def mix(self, qkv_BTE: Tensor, x_BTD: Tensor, state: State | None = None) -> tuple[Tensor, State | None]:
        """See `Mixer.mix`; a pattern that sees the future takes no state."""
        if self._is_fused(x_BTD, state):
            o_BE, state = self._fused(qkv_BTE[:, 0], x_BTD[:, 0], state)
            return o_BE[:, None], state
        q, k, v = self._split(qkv_BTE)
        if self.pattern == "causal_self":
            causal = self._taylor if isinstance(self.phi_k, Taylor2) else self._causal
            return causal(q, k, v, state, x_BTD.dtype)
        if state is not None:
            raise ValueError(f"pattern {self.pattern!r} sees the future and so cannot continue a state; pass state=None")
        return self._output(self._read(q, self._sums(k, v)), x_BTD.dtype), None

    def matrix(self, qkv_BTE: Tensor) -> Tensor:
        """The causal matrix of attention weights, [B, H, T, T]; its rows sum to one if normalised."""
        q, k, _ = self._split(qkv_BTE)
        weights = (widen(self.phi_q(q)).transpose(1, 2) @ widen(self.phi_k(k)).permute(0, 2, 3, 1)).tril()
        return weights / (weights.sum(-1, keepdim=True) + EPS) if self.normalize else weights

    def step(self, x_BD: Tensor, state: State) -> tuple[Tensor, State]:
        """See `Mixer.step`; a cross pattern reads the sums over its context, which stay as they are."""
        if self._is_fused(x_BD, state):
            o_BE, state = self._fused(self.qkv_proj(x_BD), x_BD, state)
            return self.out_proj(o_BE), state
        q_BHK, k_BHK, v_BHV = self._split(self.qkv_proj(x_BD))
        q_BHF = widen(self.phi_q(q_BHK))
        state = dict(state)
        if not self.pattern.endswith("cross"):
            k_BHF = widen(self.phi_k(k_BHK))
            state["s"] = (state["s"] + k_BHF[..., None] * v_BHV[..., None, :]).to(state["s"].dtype)
            if self.normalize:
                state["z"] = (state["z"] + k_BHF).to(state["z"].dtype)
        o_BHV = (q_BHF[..., None] * state["s"]).sum(-2)
        if self.normalize:
            o_BHV = o_BHV / ((q_BHF * state["z"]).sum(-1, keepdim=True) + EPS)
        return self.out_proj(o_BHV.flatten(-2).to(x_BD.dtype)), state

    def init_state(
        self, batch: int, max_len: int, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> State:
        """See `Mixer.init_state`."""
        shape = (batch, self.n_heads, self.phi_k.features)
        state = {"s": torch.zeros(*shape, self.v_dim, device=device, dtype=dtype)}
        return state | {"z": torch.zeros(shape, device=device, dtype=dtype)} if self.normalize else state

    def _is_fused(self, x: Tensor, state: State | None) -> bool:
        return self.pattern == "causal_self" and is_fused(self, x, state)

    def _fused(self, qkv_BE: Tensor, x_BD: Tensor, state: State) -> tuple[Tensor, State]:
        """One token's recurrence, sums and quotient in one launch, after the features."""
        q_BHK, k_BHK, v_BHV = self._split(qkv_BE)
        form = StepForm(norm="sums", eps=EPS) if self.normalize else StepForm()
        qkv = Apart(widen(self.phi_q(q_BHK)), widen(self.phi_k(k_BHK)), v_BHV)
        done = layer_step(qkv, state["s"], form, sums_BHK=state.get("z"))
        return done.y_BE.to(x_BD.dtype), next_state(state, done.state_BHKV, None, done.sums_BHK)

    def _causal(self, q: Tensor, k: Tensor, v: Tensor, state: State | None, dtype: torch.dtype) -> tuple[Tensor, State | None]:
        q, k, v = self.phi_q(q), self.phi_k(k), widen(v)
        if not self.normalize:
            o, s = linear_recurrence(q, k, v, state_BHKV=None if state is None else state["s"])
            return o.flatten(-2).to(dtype), None if s is None else {"s": s}
        o, n, sums = normalized_recurrence(q, k, v, state=None if state is None else (state["s"], state["z"]))
        return (o / (n + EPS)).flatten(-2).to(dtype), None if sums is None else {"s": sums[0], "z": sums[1]}

    def _taylor(self, q: Tensor, k: Tensor, v: Tensor, state: State | None, dtype: torch.dtype) -> tuple[Tensor, State | None]:
        """As `_causal`; features and the division are the kernels' matter."""
        sums = None if state is None else (state["s"], state.get("z"))
        o, sums = taylor_attention(q, k, v, eps=EPS if self.normalize else None, state=sums)
        y = o.flatten(-2).to(dtype)
        return y, None if sums is None else {"s": sums[0]} | ({"z": sums[1]} if self.normalize else {})

    def _cross(self, x_BTD: Tensor, state: State | None, context_BSD: Tensor | None) -> tuple[Tensor, State | None]:
        """Reads the given context, or the one that the state sums up."""
        if context_BSD is None and state is None:
            raise ValueError(f"pattern {self.pattern!r} needs context_BSD, the [B, S, D] tensor that it reads")
        d_query = self.n_heads * self.k_dim
        q_weight, kv_weight = self.qkv_proj.weight.split((d_query, d_query + self.d_model))
        q = F.linear(x_BTD, q_weight).unflatten(-1, (self.n_heads, -1))
        if context_BSD is None:
            return self.out_proj(self._output(self._read(q, self._join(state)), x_BTD.dtype)), dict(state)
        k, v = F.linear(context_BSD, kv_weight).split((d_query, self.d_model), dim=-1)
        sums = self._sums(k.unflatten(-1, (self.n_heads, -1)), v.unflatten(-1, (self.n_heads, -1)))
        y = self.out_proj(self._output(self._read(q, sums), x_BTD.dtype))
        return y, None if state is None else self._part(sums, state)

    def _split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys [..., H, K], values [..., H, V]."""
        d_query = self.n_heads * self.k_dim
        q, k, v = (x.unflatten(-1, (self.n_heads, -1)) for x in qkv.split((d_query, d_query, self.d_model), dim=-1))
        return q, k, v

    def _with_ones(self, v: Tensor) -> Tensor:
        """Values with a column of ones, whose mix is the normaliser; in fp32, because their quotient is the output."""
        v = widen(v)
        return torch.cat((v, torch.ones_like(v[..., :1])), dim=-1) if self.normalize else v

    def _sums(self, k: Tensor, v: Tensor) -> Tensor:
        """sum_s phi(k_s) [v_s, 1]^T over a whole sequence, [B, H, F, V + 1]."""
        return widen(self.phi_k(k)).permute(0, 2, 3, 1) @ self._with_ones(v).transpose(1, 2)

    def _read(self, q: Tensor, sums: Tensor) -> Tensor:
        return (widen(self.phi_q(q)).transpose(1, 2) @ sums).transpose(1, 2)

    def _join(self, state: State) -> Tensor:
        return torch.cat((state["s"], state["z"][..., None]), dim=-1) if self.normalize else state["s"]

    def _part(self, sums: Tensor, like: State) -> State:
        sums = sums.to(like["s"].dtype)
        return {"s": sums[..., : self.v_dim], "z": sums[..., -1]} if self.normalize else {"s": sums}

    def _output(self, o: Tensor, dtype: torch.dtype) -> Tensor:
        """[B, T, H, V + 1] to [B, T, D]."""
        if self.normalize:
            o = o[..., :-1] / (o[..., -1:] + EPS)
        return o.flatten(-2).to(dtype)
