"""Liger's gated linear attention (Lan et al. 2025): the gate is read off the key, so a pretrained layer needs no new weights.

    S_t = Diag(alpha_t) S_{t-1} + softmax(k_t) v_t^T,    o_t = S_t^T softmax(q_t),    alpha_t = sigmoid(k_t)^(1/16)

Shape legend: B batch, T time, D width, H heads, K width of a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.recurrence import linear_recurrence
from mixers._base import Mixer, State, heads, mixer
from mixers._layers import refuse_context, widen


@mixer("liger")
class Liger(Mixer):
    """The recurrent branch of Liger attention, whose pooling of the key has as many outputs as inputs.

    Args:
        n_heads: number of heads.
        gate_temperature: tau; the gate is sigmoid(k)^(1/tau).
    """

    variants = ({}, {"n_heads": 1, "gate_temperature": 1.0})

    def __init__(
        self, d_model: int, *, layer: int = 0, pattern: str = "causal_self", n_heads: int = 2, gate_temperature: float = 16.0
    ) -> None:
        super().__init__(d_model, pattern=pattern)
        self.n_heads, self.head_dim = n_heads, heads(d_model, n_heads)
        self.gate_temperature = gate_temperature
        self.qkv_proj = nn.Linear(d_model, 3 * d_model, bias=False)
        self.o_proj = nn.Linear(d_model, d_model, bias=False)

    def forward(
        self, x_BTD: Tensor, state: State | None = None, *, context_BSD: Tensor | None = None
    ) -> tuple[Tensor, State | None]:
        """See `Mixer.forward`."""
        refuse_context(self, context_BSD)
        o_BTE, state = self.mix(self.qkv_proj(x_BTD), x_BTD, state)
        return self.o_proj(o_BTE), state

    def mix(self, qkv_BTE: Tensor, x_BTD: Tensor, state: State | None = None) -> tuple[Tensor, State | None]:
        """See `Mixer.mix`."""
        q, k, v, log_alpha = self._split(qkv_BTE)
        o_BTHK, s_BHKK = linear_recurrence(q, k, v, log_decay=log_alpha, state_BHKV=None if state is None else state["s"])
        return o_BTHK.flatten(-2), None if state is None else {"s": s_BHKK}

    def step(self, x_BD: Tensor, state: State) -> tuple[Tensor, State]:
        """See `Mixer.step`."""
        q, k, v, log_alpha = self._split(self.qkv_proj(x_BD))
        s_BHKK = log_alpha.exp()[..., None] * state["s"] + k[..., None] * v[..., None, :]
        o_BHK = (q[..., None] * s_BHKK).sum(-2).to(x_BD.dtype)
        return self.o_proj(o_BHK.flatten(-2)), {"s": s_BHKK.to(state["s"].dtype)}

    def init_state(
        self, batch: int, max_len: int, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> State:
        """See `Mixer.init_state`."""
        return {"s": torch.zeros(batch, self.n_heads, self.head_dim, self.head_dim, device=device, dtype=dtype)}

    def _split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries and keys as distributions over the features of a head, values, and log alpha: [..., H, K] each."""
        width = self.n_heads * self.head_dim
        q, k, v = (a.unflatten(-1, (self.n_heads, self.head_dim)) for a in qkv.split(width, dim=-1))
        return widen(q).softmax(-1), widen(k).softmax(-1), v, F.logsigmoid(widen(k)) / self.gate_temperature
