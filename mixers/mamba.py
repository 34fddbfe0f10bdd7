"""Mamba (Gu & Dao 2023): a selective state space model, S6, with a decay for every channel and state element.

    h_t = exp(-exp(A) dt_t) h_{t-1} + (dt_t x_t) B_t^T,    y_t = h_t C_t + D x_t,    dt_t = softplus(W_2 W_1 x_t + b)

Shape legend: B batch, T time, D width, E inner width, N state size of a channel, P conv taps - 1.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.rows import pick_rows
from kernels.scan import gated_selective_scan, selective_scan, skip_and_gate
from mixers._base import Mixer, State, mixer
from mixers._layers import ShortConv, project, refuse_context, time_step_bias, widen


@mixer("mamba")
class Mamba(Mixer):
    """The Mamba block of the paper's figure 3.

    Args:
        d_state: N.
        expand: inner width as a multiple of D.
        conv: taps of the short convolution on x; 0 for none.
        dt_rank: bottleneck of the time step; None means D / 16, rounded up.
    """

    variants = ({}, {"d_state": 4, "dt_rank": 3, "expand": 1}, {"conv": 0})

    def __init__(
        self,
        d_model: int,
        *,
        layer: int = 0,
        pattern: str = "causal_self",
        d_state: int = 16,
        expand: int = 2,
        conv: int = 4,
        dt_rank: int | None = None,
    ) -> None:
        super().__init__(d_model, pattern=pattern)
        self.d_inner, self.d_state = expand * d_model, d_state
        self.dt_rank = math.ceil(d_model / 16) if dt_rank is None else dt_rank
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=False)
        self.conv = ShortConv(self.d_inner, conv, bias=True)
        self.x_proj = nn.Linear(self.d_inner, self.dt_rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(self.dt_rank, self.d_inner, bias=False)
        self.dt_bias = time_step_bias(self.d_inner)
        self.log_rate = nn.Parameter(torch.arange(1.0, d_state + 1).log().repeat(self.d_inner, 1))
        self.skip = nn.Parameter(torch.ones(self.d_inner))
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=False)
        with torch.no_grad():
            self.dt_proj.weight.uniform_(-(self.dt_rank**-0.5), self.dt_rank**-0.5)

    def forward(
        self, x_BTD: Tensor, state: State | None = None, *, context_BSD: Tensor | None = None
    ) -> tuple[Tensor, State | None]:
        """See `Mixer.forward`."""
        refuse_context(self, context_BSD)
        y_BTE, state = self._scan(x_BTD, state)
        return self.out_proj(y_BTE), state

    def at_rows(self, x_BTD: Tensor, rows_BM: Tensor, x_BMD: Tensor) -> Tensor:
        """See `Mixer.at_rows`: the skip, the gate and the output projection are left out elsewhere."""
        to_scan, to_gate = self.in_proj.weight.chunk(2)
        x_BTE, _ = self.conv(F.linear(x_BTD, to_scan))
        dt_BTE, b_BTN, c_BTN = self._select(x_BTE)
        y_BTE, _ = selective_scan(x_BTE, dt_BTE, self.log_rate.exp(), b_BTN, c_BTN, dt_bias_D=self.dt_bias)
        y_BME, x_BME = pick_rows(y_BTE, rows_BM), pick_rows(x_BTE, rows_BM)
        return self.out_proj(skip_and_gate(y_BME, x_BME, self.skip, F.linear(x_BMD, to_gate)))

    def step(self, x_BD: Tensor, state: State) -> tuple[Tensor, State]:
        """See `Mixer.step`."""
        x_BE, z_BE = self.in_proj(x_BD).chunk(2, dim=-1)
        x_BE, tail_BPE = self.conv.step(x_BE, state["conv"])
        dt_BE, b_BN, c_BN = self._select(x_BE)
        dt_BE = F.softplus(widen(dt_BE) + self.dt_bias)
        decay_BEN = torch.exp(-self.log_rate.exp() * dt_BE[..., None])
        h_BEN = decay_BEN * state["h"] + (dt_BE * x_BE)[..., None] * b_BN[:, None]
        y_BE = (h_BEN * c_BN[:, None]).sum(-1)
        y_BE = ((y_BE + self.skip * x_BE) * F.silu(z_BE)).to(z_BE.dtype)
        return self.out_proj(y_BE), {"h": h_BEN.to(state["h"].dtype), "conv": tail_BPE}

    def init_state(
        self, batch: int, max_len: int, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> State:
        """See `Mixer.init_state`."""
        return {
            "h": torch.zeros(batch, self.d_inner, self.d_state, device=device, dtype=dtype),
            "conv": self.conv.init_tail(batch, device=device, dtype=dtype),
        }

    def published_elements(self, seq_len: int) -> int:
        """See `Mixer.published_elements`: Zoology's plots count the SSM state, without the convolution tail."""
        return self.d_inner * self.d_state

    def _scan(self, x_BTD: Tensor, state: State | None) -> tuple[Tensor, State | None]:
        """The block without its output projection: [B, T, E] and the state after it."""
        x_BTE, z_BTE = self.in_proj(x_BTD).chunk(2, dim=-1)
        x_BTE, tail_BPE = self.conv(x_BTE, None if state is None else state["conv"])
        dt_BTE, b_BTN, c_BTN = self._select(x_BTE)
        h_BEN = None if state is None else state["h"]
        y_BTE, h_BEN = gated_selective_scan(
            x_BTE, dt_BTE, self.log_rate.exp(), b_BTN, c_BTN, h_BEN, dt_bias_D=self.dt_bias, skip_D=self.skip, gate_BTD=z_BTE
        )
        return y_BTE, None if state is None else {"h": h_BEN, "conv": tail_BPE}

    def _select(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The time step before bias and softplus [..., E], and the vectors B and C [..., N] that write and read the state."""
        dt, b, c = project(x, self.x_proj.weight, (self.dt_rank, self.d_state, self.d_state))
        return self.dt_proj(dt), b, c
