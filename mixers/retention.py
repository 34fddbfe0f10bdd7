"""Retention: linear attention whose state decays by a constant of its head (Sun et al. 2023, RetNet, section 2).

    S_n = gamma S_{n-1} + k_n v_n^T,    o_n = S_n^T q_n,    y = (swish(x W_G) * groupnorm(o)) W_O

Shape legend: B batch, T time, D width, H heads, K key width of a head, V value width of a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.layer_step import Packed, layer_step
from kernels.recurrence import linear_recurrence
from kernels.step_form import StepForm
from mixers._base import Mixer, State, heads, mixer
from mixers._fused import is_fused, next_state
from mixers._layers import HeadNorm, refuse_context


@mixer("retention")
class Retention(Mixer):
    """Multi-scale retention without the paper's xPos rotation of q and k.

    Args:
        n_heads: number of heads.
        expand_v: value width over all heads as a multiple of D.
        decay: retnet, gamma = 1 - 2^(-5-h) for head h = 0, 1, ...; or lightning, gamma = exp(-8 h / H (1 - l / L))
            for head h = 1 ... H of layer l = 0 ... L - 1 (Qin et al. 2023, TransNormerLLM, section 3.1).
        n_layers: L of the lightning schedule.
    """

    variants = ({}, {"decay": "lightning", "n_layers": 4}, {"n_heads": 4, "expand_v": 2.0})
    input_maps = ("g_proj",)

    def __init__(
        self,
        d_model: int,
        *,
        layer: int = 0,
        pattern: str = "causal_self",
        n_heads: int = 2,
        expand_v: float = 1.0,
        decay: str = "retnet",
        n_layers: int = 2,
    ) -> None:
        super().__init__(d_model, pattern=pattern)
        d_value = int(expand_v * d_model)
        self.n_heads, self.k_dim = n_heads, heads(d_model, n_heads)
        self.v_dim = heads(d_value, n_heads, what="expand_v * d_model")
        self.qkv_proj = nn.Linear(d_model, 2 * d_model + d_value, bias=False)
        self.g_proj = nn.Linear(d_model, d_value, bias=False)
        self.norm = HeadNorm(n_heads, self.v_dim)
        self.o_proj = nn.Linear(d_value, d_model, bias=False)
        self.register_buffer("log_gamma", log_decays(decay, n_heads, layer, n_layers))

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
        q_BTHK, k_BTHK, v_BTHV = self._split(qkv_BTE)
        s_BHKV = None if state is None else state["s"]
        o_BTHV, s_BHKV = linear_recurrence(q_BTHK, k_BTHK, v_BTHV, log_decay=self.log_gamma, state_BHKV=s_BHKV)
        return self._output(o_BTHV, x_BTD), None if state is None else {"s": s_BHKV}

    def step(self, x_BD: Tensor, state: State) -> tuple[Tensor, State]:
        """See `Mixer.step`."""
        if is_fused(self, x_BD, state):
            o_BE, state = self._fused(self.qkv_proj(x_BD), x_BD, state)
            return self.o_proj(o_BE), state
        q_BHK, k_BHK, v_BHV = self._split(self.qkv_proj(x_BD))
        gamma_H11 = self.log_gamma.exp()[:, None, None]
        s_BHKV = gamma_H11 * state["s"] + k_BHK[..., None] * v_BHV[..., None, :]
        o_BHV = (q_BHK[..., None] * s_BHKV).sum(-2)
        return self.o_proj(self._output(o_BHV, x_BD)), {"s": s_BHKV.to(state["s"].dtype)}

    def init_state(
        self, batch: int, max_len: int, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> State:
        """See `Mixer.init_state`."""
        return {"s": torch.zeros(batch, self.n_heads, self.k_dim, self.v_dim, device=device, dtype=dtype)}

    def _fused(self, qkv_BE: Tensor, x_BD: Tensor, state: State) -> tuple[Tensor, State]:
        """One token in one launch, without the projections: the heads' outputs and the state."""
        done = layer_step(
            Packed(qkv_BE, (0, self.d_model, 2 * self.d_model)),
            state["s"],
            StepForm(key_scale=self.k_dim**-0.5, norm="layer", eps=self.norm.eps, gate="silu"),
            decay=self.log_gamma,
            norm_weight=self.norm.weight,
            norm_bias_HV=self.norm.bias,
            gate_BE=self.g_proj(x_BD),
        )
        return done.y_BE.to(x_BD.dtype), next_state(state, done.state_BHKV, None)

    def _split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys [..., H, K], values [..., H, V]."""
        widths = (self.d_model, self.d_model, self.n_heads * self.v_dim)
        q, k, v = (a.unflatten(-1, (self.n_heads, -1)) for a in qkv.split(widths, dim=-1))
        return q, k * self.k_dim**-0.5, v

    def _output(self, o: Tensor, x: Tensor) -> Tensor:
        return F.silu(self.g_proj(x)) * self.norm(o).flatten(-2).to(x.dtype)


def log_decays(schedule: str, n_heads: int, layer: int, n_layers: int) -> Tensor:
    """Logs of the heads' constant decays, [H]; see `Retention`.

    Raises:
        ValueError: no such schedule, or a layer beyond the last one.
    """
    if schedule == "retnet":
        return torch.log1p(-(2.0 ** (-5 - torch.arange(n_heads))))
    if schedule != "lightning":
        raise ValueError(f"there is no decay schedule {schedule!r}; there are retnet, lightning")
    if layer >= n_layers:
        raise ValueError(f"layer {layer} has no place in the lightning schedule of n_layers={n_layers}; set n_layers to the depth")
    return -8.0 * torch.arange(1, n_heads + 1) / n_heads * (1 - layer / n_layers)
