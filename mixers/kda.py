"""Kimi Delta Attention (Kimi Linear 2025): the delta rule on a state whose rows decay by gates of their own.

    S_t = (I - beta_t k_t k_t^T) Diag(alpha_t) S_{t-1} + beta_t k_t v_t^T,    o_t = S_t^T q_t,    |q_t| = |k_t| = 1
    alpha_t = exp(-exp(A) softplus(x_t W_1 W_2 + b))

Shape legend: B batch, T time, D width, H heads, K key width of a head, V value width of a head, P conv taps - 1.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.layer_step import Packed, layer_step
from kernels.recurrence import linear_recurrence
from kernels.step_form import StepForm
from mixers._base import Mixer, State, heads, mixer
from mixers._fused import conv_of, is_fused, next_state
from mixers._layers import LowRank, RMSNorm, ShortConv, l2_normalize, log_rates, refuse_context, time_step_bias, widen


@mixer("kda")
class KDA(Mixer):
    """The KDA layer of the paper's section 4, except that heads are D / H wide rather than 128.

    Args:
        n_heads: number of heads.
        expand_v: value width over all heads as a multiple of D.
        gate_rank: rank of the decay and output gates; None means the key width of a head, as in the paper.
        conv: taps of the short convolutions on q, k and v, which SiLU follows; 0 for none.
        silu: apply that SiLU, without a convolution too; a pretrained attention's values have no such kink.
        memory: factor on the time until the initial state has faded: 1 is 2 to 1,000 tokens.
    """

    variants = ({}, {"conv": 0, "n_heads": 1, "gate_rank": 4}, {"expand_v": 2.0})
    input_maps = ("beta_proj", "decay_gate", "output_gate")

    def __init__(
        self,
        d_model: int,
        *,
        layer: int = 0,
        pattern: str = "causal_self",
        n_heads: int = 2,
        expand_v: float = 1.0,
        gate_rank: int | None = None,
        conv: int = 4,
        silu: bool = True,
        memory: float = 1.0,
    ) -> None:
        super().__init__(d_model, pattern=pattern)
        d_value = int(expand_v * d_model)
        self.n_heads, self.k_dim = n_heads, heads(d_model, n_heads)
        self.v_dim = heads(d_value, n_heads, what="expand_v * d_model")
        rank = self.k_dim if gate_rank is None else gate_rank
        self.qkv_proj = nn.Linear(d_model, 2 * d_model + d_value, bias=False)
        self.conv = ShortConv(2 * d_model + d_value, conv, silu=silu)
        self.beta_proj = nn.Linear(d_model, n_heads, bias=False)
        self.decay_gate = LowRank(d_model, rank, d_model, bias=False)
        self.decay_bias = time_step_bias(d_model, 1e-3 / memory, 1e-1 / memory)
        self.log_rate = log_rates(n_heads)
        self.output_gate = LowRank(d_model, rank, d_value)
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
        qkv, tail_BPD = self.conv(qkv_BTE, None if state is None else state["conv"])
        q_BTHK, k_BTHK, v_BTHV = self._split(qkv)
        log_alpha_BTHK, beta_BTH = self._gates(x_BTD)
        s_BHKV = None if state is None else state["s"]
        o_BTHV, s_BHKV = linear_recurrence(q_BTHK, k_BTHK, v_BTHV, log_decay=log_alpha_BTHK, beta_BTH=beta_BTH, state_BHKV=s_BHKV)
        return self._output(o_BTHV, x_BTD), None if state is None else {"s": s_BHKV, "conv": tail_BPD}

    def step(self, x_BD: Tensor, state: State) -> tuple[Tensor, State]:
        """See `Mixer.step`."""
        if is_fused(self, x_BD, state, taps=self.conv.taps):
            o_BE, state = self._fused(self.qkv_proj(x_BD), x_BD, state)
            return self.o_proj(o_BE), state
        qkv, tail_BPD = self.conv.step(self.qkv_proj(x_BD), state["conv"])
        q_BHK, k_BHK, v_BHV = self._split(qkv)
        log_alpha_BHK, beta_BH = self._gates(x_BD)
        decayed_BHKV = log_alpha_BHK.exp()[..., None] * state["s"]
        old_BHV = (k_BHK[..., None] * decayed_BHKV).sum(-2)
        s_BHKV = decayed_BHKV + k_BHK[..., None] * (beta_BH[..., None] * (v_BHV - old_BHV))[..., None, :]
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

    def _fused(self, qkv_BE: Tensor, x_BD: Tensor, state: State) -> tuple[Tensor, State]:
        """One token in one launch, without the projections: the heads' outputs and the state."""
        per_head = (self.n_heads, self.k_dim)
        done = layer_step(
            Packed(qkv_BE, (0, self.d_model, 2 * self.d_model)),
            state["s"],
            StepForm(
                silu=self.conv.silu,
                unit=True,
                scale=self.k_dim**-0.5,
                decay="rate",
                open_beta=True,
                norm="rms",
                eps=self.norm.eps,
                gate="sigmoid",
            ),
            conv=conv_of(self.conv, state),
            decay=self.decay_gate(x_BD).unflatten(-1, per_head),
            decay_bias=self.decay_bias.unflatten(-1, per_head),
            log_rate_H=self.log_rate,
            beta_BH=self.beta_proj(x_BD),
            norm_weight=self.norm.weight,
            gate_BE=self.output_gate(x_BD),
        )
        return done.y_BE.to(x_BD.dtype), next_state(state, done.state_BHKV, done.tail_BPC)

    def _split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of each head, [..., H, K or V]; queries and keys have unit length."""
        widths = (self.d_model, self.d_model, self.n_heads * self.v_dim)
        q, k, v = (x.unflatten(-1, (self.n_heads, -1)) for x in qkv.split(widths, dim=-1))
        return l2_normalize(q) * self.k_dim**-0.5, l2_normalize(k), v

    def _gates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Log of alpha [..., H, K], and beta [..., H]."""
        rate = F.softplus(widen(self.decay_gate(x)) + self.decay_bias).unflatten(-1, (self.n_heads, -1))
        return -self.log_rate.exp()[:, None] * rate, torch.sigmoid(widen(self.beta_proj(x)))

    def _output(self, o: Tensor, x: Tensor) -> Tensor:
        return self.norm(o).flatten(-2).to(x.dtype) * torch.sigmoid(self.output_gate(x))
