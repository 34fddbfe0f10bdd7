"""SUPRA (Mercat et al. 2024): a pretrained layer as a recurrence with ReLU features, fixed decays and a group norm.

    S_t = gamma_h S_{t-1} + phi(k_t) v_t^T,    o_t = groupnorm(S_t^T phi(q_t)),    phi(x) = relu(x W + b)

Shape legend: B batch, T time, D width, H heads, K width of a head.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.layer_step import Apart, layer_step
from kernels.recurrence import linear_recurrence
from kernels.step_form import StepForm
from mixers._base import Mixer, State, heads, mixer
from mixers._fused import is_fused, next_state
from mixers._layers import refuse_context, widen


@mixer("supra")
class Supra(Mixer):
    """SUPRA's attention, with one feature map for queries and keys and decays as in Lightning Attention.

    Args:
        n_heads: number of heads.
        normalize: the group norm without an affine map, one group a head.
    """

    variants = ({}, {"n_heads": 1}, {"normalize": False})

    def __init__(
        self, d_model: int, *, layer: int = 0, pattern: str = "causal_self", n_heads: int = 2, normalize: bool = True
    ) -> None:
        super().__init__(d_model, pattern=pattern)
        self.n_heads, self.head_dim, self.normalize = n_heads, heads(d_model, n_heads), normalize
        self.qkv_proj = nn.Linear(d_model, 3 * d_model, bias=False)
        self.feature_proj = nn.Linear(d_model, d_model)
        self.o_proj = nn.Linear(d_model, d_model, bias=False)
        self.register_buffer("log_gamma", -(2.0 ** (-8.0 * torch.arange(1, n_heads + 1) / n_heads)))

    def forward(
        self, x_BTD: Tensor, state: State | None = None, *, context_BSD: Tensor | None = None
    ) -> tuple[Tensor, State | None]:
        """See `Mixer.forward`."""
        refuse_context(self, context_BSD)
        o_BTE, state = self.mix(self.qkv_proj(x_BTD), x_BTD, state)
        return self.o_proj(o_BTE), state

    def mix(
        self, qkv_BTE: Tensor, x_BTD: Tensor, state: State | None = None, *, rotate: Callable[[Tensor], Tensor] | None = None
    ) -> tuple[Tensor, State | None]:
        """See `Mixer.mix`; `rotate` applies rotary positions to features [B, T, H, K], as the paper does."""
        q, k, v = self._split(qkv_BTE)
        q, k = (q, k) if rotate is None else (rotate(q), rotate(k))
        if is_fused(self, x_BTD, state):
            o_BD, state = self._fused(q[:, 0], k[:, 0], v[:, 0], state)
            return o_BD[:, None], state
        o_BTHK, s_BHKK = linear_recurrence(q, k, v, log_decay=self.log_gamma, state_BHKV=None if state is None else state["s"])
        return self._normed(o_BTHK), None if state is None else {"s": s_BHKK}

    def step(self, x_BD: Tensor, state: State) -> tuple[Tensor, State]:
        """See `Mixer.step`."""
        q, k, v = self._split(self.qkv_proj(x_BD))
        if is_fused(self, x_BD, state):
            o_BD, state = self._fused(q, k, v, state)
            return self.o_proj(o_BD), state
        s_BHKK = self.log_gamma.exp()[:, None, None] * state["s"] + k[..., None] * v[..., None, :]
        o_BHK = (q[..., None] * s_BHKK).sum(-2).to(x_BD.dtype)
        return self.o_proj(self._normed(o_BHK)), {"s": s_BHKK.to(state["s"].dtype)}

    def init_state(
        self, batch: int, max_len: int, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> State:
        """See `Mixer.init_state`."""
        return {"s": torch.zeros(batch, self.n_heads, self.head_dim, self.head_dim, device=device, dtype=dtype)}

    def _fused(self, q_BHK: Tensor, k_BHK: Tensor, v_BHK: Tensor, state: State) -> tuple[Tensor, State]:
        """One token's recurrence and norm in one launch, after the features: [B, D] and the state."""
        form = StepForm(norm="layer" if self.normalize else "none")
        done = layer_step(Apart(q_BHK, k_BHK, v_BHK), state["s"], form, decay=self.log_gamma)
        return done.y_BE, next_state(state, done.state_BHKV, None)

    def _split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features of queries and keys, and values: [..., H, K] each; keys are scaled as attention scales."""
        q, k, v = qkv.chunk(3, dim=-1)
        q, k = F.relu(self.feature_proj(q)), F.relu(self.feature_proj(k)) * self.head_dim**-0.5
        q, k, v = (a.unflatten(-1, (self.n_heads, self.head_dim)) for a in (q, k, v))
        return q, k, v

    def _normed(self, o: Tensor) -> Tensor:
        """[..., H, K] to [..., D], each head normed."""
        normed = F.layer_norm(widen(o), (self.head_dim,)).to(o.dtype) if self.normalize else o
        return normed.flatten(-2)
