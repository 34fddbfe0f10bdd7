"""Gated linear attention (Yang et al. 2024): a matrix state whose rows decay by a gate of their own.

    S_t = Diag(alpha_t) S_{t-1} + k_t v_t^T,    o_t = S_t^T q_t,    alpha_t = sigmoid(x_t W_1 W_2 + b)^(1/16)

Shape legend: B batch, T time, D width, H heads, K key width of a head, V value width of a head, P conv taps - 1.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.layer_step import Packed, layer_step
from kernels.recurrence import linear_recurrence
from kernels.rows import pick_rows
from kernels.step_form import StepForm
from mixers._base import Mixer, State, heads, mixer
from mixers._fused import conv_of, is_fused, next_state
from mixers._layers import LowRank, RMSNorm, ShortConv, refuse_context, widen


@mixer("gla")
class GLA(Mixer):
    """GLA as in section 4.4 of the paper, with the two heads of Zoology's figures.

    Args:
        n_heads: number of heads.
        expand_k: key width over all heads as a multiple of D.
        expand_v: value width over all heads as a multiple of D.
        gate_rank: rank of the decay gate.
        gate_temperature: tau; the gate is sigmoid(.)^(1/tau).
        conv: taps of a short convolution with SiLU on q, k and v; 0 for none, as in the paper.
    """

    variants = ({}, {"conv": 4, "expand_k": 1.0, "n_heads": 1}, {"gate_temperature": 0.1})
    input_maps = ("decay_gate", "g_proj")

    def __init__(
        self,
        d_model: int,
        *,
        layer: int = 0,
        pattern: str = "causal_self",
        n_heads: int = 2,
        expand_k: float = 0.5,
        expand_v: float = 1.0,
        gate_rank: int = 16,
        gate_temperature: float = 16.0,
        conv: int = 0,
    ) -> None:
        super().__init__(d_model, pattern=pattern)
        d_key, d_value = int(expand_k * d_model), int(expand_v * d_model)
        self.n_heads, self.gate_temperature = n_heads, gate_temperature
        self.k_dim = heads(d_key, n_heads, what="expand_k * d_model")
        self.v_dim = heads(d_value, n_heads, what="expand_v * d_model")
        self.qkv_proj = nn.Linear(d_model, 2 * d_key + d_value, bias=False)
        self.conv = ShortConv(2 * d_key + d_value, conv, silu=conv > 0)
        self.decay_gate = LowRank(d_model, gate_rank, d_key)
        self.g_proj = nn.Linear(d_model, d_value)
        self.norm = RMSNorm(self.v_dim)
        self.o_proj = nn.Linear(d_value, d_model, bias=False)

    def forward(
        self, x_BTD: Tensor, state: State | None = None, *, context_BSD: Tensor | None = None
    ) -> tuple[Tensor, State | None]:
        """See `Mixer.forward`."""
        refuse_context(self, context_BSD)
        o_BTE, state = self.mix(self.qkv_proj(x_BTD), x_BTD, state)
        return self.o_proj(o_BTE), state

    def mix(self, qkv_BTE: Tensor, x_BTD: Tensor, state: State | None = None) -> tuple[Tensor, State | None]:
        """See `Mixer.mix`."""
        if is_fused(self, x_BTD, state, taps=self.conv.taps):
            o_BE, state = self._fused(qkv_BTE[:, 0], x_BTD[:, 0], state)
            return o_BE[:, None], state
        o_BTHV, s_BHKV, tail_BPD = self._recur(qkv_BTE, x_BTD, state)
        return self._output(o_BTHV, x_BTD), None if state is None else {"s": s_BHKV, "conv": tail_BPD}

    def at_rows(self, x_BTD: Tensor, rows_BM: Tensor, x_BMD: Tensor) -> Tensor:
        """See `Mixer.at_rows`: what follows the recurrence is left out elsewhere."""
        o_BTHV, _, _ = self._recur(self.qkv_proj(x_BTD), x_BTD, None)
        o_BMHV = pick_rows(o_BTHV.flatten(-2), rows_BM).unflatten(-1, (self.n_heads, self.v_dim))
        return self.o_proj(self._output(o_BMHV, x_BMD))

    def step(self, x_BD: Tensor, state: State) -> tuple[Tensor, State]:
        """See `Mixer.step`."""
        if is_fused(self, x_BD, state, taps=self.conv.taps):
            o_BE, state = self._fused(self.qkv_proj(x_BD), x_BD, state)
            return self.o_proj(o_BE), state
        qkv, tail_BPD = self.conv.step(self.qkv_proj(x_BD), state["conv"])
        q_BHK, k_BHK, v_BHV = self._split(qkv)
        alpha_BHK = self._log_decay(x_BD).exp()
        s_BHKV = alpha_BHK[..., None] * state["s"] + k_BHK[..., None] * v_BHV[..., None, :]
        o_BHV = (q_BHK[..., None] * s_BHKV).sum(-2)
        return self.o_proj(self._output(o_BHV, x_BD)), {"s": s_BHKV.to(state["s"].dtype), "conv": tail_BPD}

    def init_state(
        self, batch: int, max_len: int, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> State:
        """See `Mixer.init_state`."""
        return {
            "s": torch.zeros(batch, self.n_heads, self.k_dim, self.v_dim, device=device, dtype=dtype),
            "conv": self.conv.init_tail(batch, device=device, dtype=dtype),
        }

    def published_elements(self, seq_len: int) -> int:
        """See `Mixer.published_elements`: the matrix state, without convolution tails (Arora et al. 2024, figure 2)."""
        return self.n_heads * self.k_dim * self.v_dim

    def _fused(self, qkv_BE: Tensor, x_BD: Tensor, state: State) -> tuple[Tensor, State]:
        """One token in one launch, without the projections: the heads' outputs and the state."""
        d_key = self.n_heads * self.k_dim
        done = layer_step(
            Packed(qkv_BE, (0, d_key, 2 * d_key)),
            state["s"],
            StepForm(
                silu=self.conv.silu,
                scale=self.k_dim**-0.5,
                decay="sigmoid",
                temperature=self.gate_temperature,
                norm="rms",
                eps=self.norm.eps,
                gate="silu",
            ),
            conv=conv_of(self.conv, state),
            decay=self.decay_gate(x_BD).unflatten(-1, (self.n_heads, -1)),
            norm_weight=self.norm.weight,
            gate_BE=self.g_proj(x_BD),
        )
        return done.y_BE.to(x_BD.dtype), next_state(state, done.state_BHKV, done.tail_BPC)

    def _recur(self, qkv_BTE: Tensor, x_BTD: Tensor, state: State | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The recurrence's outputs [B, T, H, V], its state, and the convolution's tail."""
        qkv, tail_BPD = self.conv(qkv_BTE, None if state is None else state["conv"])
        q_BTHK, k_BTHK, v_BTHV = self._split(qkv)
        o_BTHV, s_BHKV = linear_recurrence(
            q_BTHK, k_BTHK, v_BTHV, log_decay=self._log_decay(x_BTD), state_BHKV=None if state is None else state["s"]
        )
        return o_BTHV, s_BHKV, tail_BPD

    def _split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of each head, [..., H, K or V]."""
        d_key, d_value = self.n_heads * self.k_dim, self.n_heads * self.v_dim
        q, k, v = (x.unflatten(-1, (self.n_heads, -1)) for x in qkv.split((d_key, d_key, d_value), dim=-1))
        return q * self.k_dim**-0.5, k, v

    def _log_decay(self, x: Tensor) -> Tensor:
        """Log of alpha, [..., H, K]."""
        gate = F.logsigmoid(widen(self.decay_gate(x))) / self.gate_temperature
        return gate.unflatten(-1, (self.n_heads, -1))

    def _output(self, o: Tensor, x: Tensor) -> Tensor:
        return self.norm(o).flatten(-2).to(x.dtype) * F.silu(self.g_proj(x))
