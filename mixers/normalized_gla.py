"""Gated linear attention with a denominator: the recurrent branch of Lizard (Nguyen et al. 2025) and of LAWCAT (Liu et al. 2025).

    S_t = gamma_t S_{t-1} + phi(k_t) v_t^T,    z_t = gamma_t z_{t-1} + phi(k_t),    o_t = S_t^T phi(q_t) / z_t . phi(q_t)
    gamma_t = sigmoid(x_t W + b)

Shape legend: B batch, T time, D width, H heads, K query width of a head, F features, V value width, P conv taps - 1.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.layer_step import Apart, layer_step
from kernels.recurrence import normalized_recurrence
from kernels.step_form import StepForm
from mixers._base import Mixer, State, heads, mixer
from mixers._feature_maps import make_feature_map
from mixers._fused import is_fused, next_state
from mixers._layers import ShortConv, refuse_context, widen

EPS = 1e-6
"""Keeps the quotient finite where all weights vanish."""
GATE_BIAS = 6.0
"""Initial gate 0.9975, a memory of about 400 tokens: a pretrained layer should not start by forgetting."""


@mixer("normalized_gla")
class NormalizedGLA(Mixer):
    """Linear attention on a learned positive map, with one forget gate per head and token and normalised rows.

    Args:
        n_heads: number of heads.
        feature_map: hedgehog, t2r, elu or relu; learned maps differ between q and k.
        conv: taps of a causal depthwise convolution on q and k that starts as the identity (LAWCAT uses 4); 0 for none.
        head_dim: width of a head; None means D / H.
    """

    variants = ({}, {"conv": 4, "n_heads": 1}, {"feature_map": "elu", "head_dim": 3})
    input_maps = ("gate_proj",)

    def __init__(
        self,
        d_model: int,
        *,
        layer: int = 0,
        pattern: str = "causal_self",
        n_heads: int = 2,
        feature_map: str = "hedgehog",
        conv: int = 0,
        head_dim: int | None = None,
    ) -> None:
        super().__init__(d_model, pattern=pattern)
        if feature_map in ("identity", "taylor2"):
            raise ValueError(f"normalized_gla needs a positive pointwise or learned map such as hedgehog, not {feature_map!r}")
        self.n_heads, self.head_dim = n_heads, heads(d_model, n_heads) if head_dim is None else head_dim
        width = self.n_heads * self.head_dim
        self.phi_q = make_feature_map(feature_map, n_heads, self.head_dim)
        self.phi_k = make_feature_map(feature_map, n_heads, self.head_dim)
        self.qkv_proj = nn.Linear(d_model, 3 * width, bias=False)
        self.conv = ShortConv(2 * width, conv, silu=False)
        self.gate_proj = nn.Linear(d_model, n_heads)
        self.o_proj = nn.Linear(width, d_model, bias=False)
        with torch.no_grad():
            self.gate_proj.bias.fill_(GATE_BIAS)
            if conv:
                self.conv.weight.zero_()[:, -1] = 1.0

    def forward(
        self, x_BTD: Tensor, state: State | None = None, *, context_BSD: Tensor | None = None
    ) -> tuple[Tensor, State | None]:
        """See `Mixer.forward`."""
        refuse_context(self, context_BSD)
        o_BTE, state = self.mix(self.qkv_proj(x_BTD), x_BTD, state)
        return self.o_proj(o_BTE), state

    def mix(self, qkv_BTE: Tensor, x_BTD: Tensor, state: State | None = None) -> tuple[Tensor, State | None]:
        """See `Mixer.mix`."""
        if is_fused(self, x_BTD, state):
            o_BE, state = self._fused(qkv_BTE[:, 0], x_BTD[:, 0], state)
            return o_BE[:, None], state
        qk, v = self._parts(qkv_BTE)
        qk, tail_BPD = self.conv(qk, None if state is None else state["conv"])
        q_BTHF, k_BTHF = self._features(qk)
        sums = None if state is None else (state["s"], state["z"])
        o, n, sums = normalized_recurrence(q_BTHF, k_BTHF, widen(v), log_decay=self._log_gate(x_BTD), state=sums)
        y = (o / (n + EPS)).flatten(-2).to(qkv_BTE.dtype)
        return y, None if sums is None else {"s": sums[0], "z": sums[1], "conv": tail_BPD}

    def step(self, x_BD: Tensor, state: State) -> tuple[Tensor, State]:
        """See `Mixer.step`."""
        if is_fused(self, x_BD, state):
            o_BE, state = self._fused(self.qkv_proj(x_BD), x_BD, state)
            return self.o_proj(o_BE), state
        qk, v_BHV = self._parts(self.qkv_proj(x_BD))
        qk, tail_BPD = self.conv.step(qk, state["conv"])
        q_BHF, k_BHF = self._features(qk)
        gamma_BH = self._log_gate(x_BD).exp()
        s_BHFV = gamma_BH[..., None, None] * state["s"] + k_BHF[..., None] * v_BHV[..., None, :]
        z_BHF = gamma_BH[..., None] * state["z"] + k_BHF
        o_BHV = (q_BHF[..., None] * s_BHFV).sum(-2) / ((q_BHF * z_BHF).sum(-1, keepdim=True) + EPS)
        new = {"s": s_BHFV.to(state["s"].dtype), "z": z_BHF.to(state["z"].dtype), "conv": tail_BPD}
        return self.o_proj(o_BHV.flatten(-2).to(x_BD.dtype)), new

    def init_state(
        self, batch: int, max_len: int, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> State:
        """See `Mixer.init_state`."""
        shape = (batch, self.n_heads, self.phi_k.features)
        return {
            "s": torch.zeros(*shape, self.head_dim, device=device, dtype=dtype),
            "z": torch.zeros(shape, device=device, dtype=dtype),
            "conv": self.conv.init_tail(batch, device=device, dtype=dtype),
        }

    def _fused(self, qkv_BE: Tensor, x_BD: Tensor, state: State) -> tuple[Tensor, State]:
        """One token's recurrence, sums and quotient in one launch, after the convolution and the features."""
        qk_BE, v_BHV = self._parts(qkv_BE)
        qk_BE, tail_BPD = self.conv.step(qk_BE, state["conv"])
        q_BHF, k_BHF = self._features(qk_BE)
        form = StepForm(decay="sigmoid", norm="sums", eps=EPS)
        done = layer_step(Apart(q_BHF, k_BHF, v_BHV), state["s"], form, decay=self.gate_proj(x_BD), sums_BHK=state["z"])
        return done.y_BE.to(x_BD.dtype), next_state(state, done.state_BHKV, tail_BPD, done.sums_BHK)

    def _parts(self, qkv: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys together [..., 2 H K], and values [..., H, V]."""
        width = self.n_heads * self.head_dim
        qk, v = qkv.split((2 * width, width), dim=-1)
        return qk, v.unflatten(-1, (self.n_heads, self.head_dim))

    def _features(self, qk: Tensor) -> tuple[Tensor, Tensor]:
        """Features of queries and keys, [..., H, F] each."""
        q, k = (a.unflatten(-1, (self.n_heads, self.head_dim)) for a in qk.chunk(2, dim=-1))
        return widen(self.phi_q(q)), widen(self.phi_k(k))

    def _log_gate(self, x: Tensor) -> Tensor:
        """Log of gamma, [..., H]."""
        return F.logsigmoid(widen(self.gate_proj(x)))
