"""The state space block of Mamba-2 (Dao & Gu 2024, section 7), which mixers run alone or beside an attention.

    S_t = exp(-exp(A) dt_t) S_{t-1} + B_t (dt_t x_t)^T,    y_t = S_t^T C_t + D x_t,    dt_t = softplus(.)

Shape legend: B batch, T time, D width, E inner width, H heads, P width of a head (E = H P), G groups that share B and C,
N state size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.gated_norm import gated_norm
from kernels.layer_step import Packed, layer_step
from kernels.rows import pick_rows
from kernels.ssd import Conv, Heads, Sizes, ssd
from kernels.ssd import State as SSDState
from kernels.step_form import StepForm
from mixers._base import AttentionWeights, Mixer, State
from mixers._fused import conv_of, next_state
from mixers._layers import RMSNorm, ShortConv, head_count, log_rates, project, project_wide, time_step_bias, widen


class SSDBlock(Mixer):
    """Projections, short convolution, scan and gated norm; a subclass says what joins the scan before the norm.

    Args:
        d_model: D.
        pattern: see `Mixer`.
        d_state: N.
        head_dim: P, cut down to the inner width where that is smaller.
        n_groups: G.
        expand: E as a multiple of D.
        conv: taps of the short convolution on x, B and C; 0 for none.
    """

    def __init__(self, d_model: int, *, pattern: str, d_state: int, head_dim: int, n_groups: int, expand: int, conv: int) -> None:
        super().__init__(d_model, pattern=pattern)
        self.d_inner, self.d_state, self.n_groups = expand * d_model, d_state, n_groups
        self.n_heads = head_count(self.d_inner, head_dim, what="expand * d_model")
        self.head_dim = self.d_inner // self.n_heads
        if n_groups < 1 or self.n_heads % n_groups:
            raise ValueError(f"n_groups={n_groups} does not divide the {self.n_heads} heads; one group always does")
        d_conv = self.d_inner + 2 * n_groups * d_state
        self.in_proj = nn.Linear(d_model, self.d_inner + d_conv + self.n_heads, bias=False)
        self.conv = ShortConv(d_conv, conv, bias=True)
        self.dt_bias = time_step_bias(self.n_heads)
        self.log_rate = log_rates(self.n_heads)
        self.skip = nn.Parameter(torch.ones(self.n_heads))
        self.norm = RMSNorm(self.d_inner)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=False)

    def load_attention(self, weights: AttentionWeights) -> None:
        """See `Mixer.load_attention`: x from v, B from k, C from q, as MambaInLlama starts (Wang et al. 2024).

        Attention's scale goes into C; the gate z, the time step and the convolution keep their own initial values.
        """
        groups = (self.n_groups * self.d_state, self.d_inner)
        if groups != (len(weights.k), len(weights.v)):
            raise ValueError(
                f"B and C are {groups[0]} and x is {groups[1]} wide, but the keys are {len(weights.k)} and the values "
                f"{len(weights.v)}; set n_groups to the heads, d_state and head_dim to {weights.head_dim}"
            )
        sizes = (self.d_inner, self.d_inner, groups[0], groups[0])
        with torch.no_grad():
            _, x, b, c = self.in_proj.weight[: sum(sizes)].split(sizes)
            x.copy_(weights.v)
            b.copy_(weights.k)
            c.copy_(weights.q * weights.head_dim**-0.5)
            self.out_proj.weight.copy_(weights.o)

    def scan(self, x_BTD: Tensor, state: State | None) -> tuple[Tensor, Tensor, Tensor, State | None]:
        """A segment through the state space model.

        Returns:
            Its output, the convolved input and the gate, [B, T, E] each, and the state's part `s` and `conv`, or None.
        """
        gate, rest = self.in_proj.weight.split((self.d_inner, self.conv.dim + self.n_heads))
        y, x, state = self._scan(project_wide(x_BTD, rest), state)
        return y, x, F.linear(x_BTD, gate), state

    def scan_rows(self, x_BTD: Tensor, rows_BM: Tensor, x_BMD: Tensor) -> tuple[Tensor, Tensor]:
        """The output of `scan` from nothing and the gate at some positions only, [B, M, E] each; as for `Mixer.at_rows`."""
        gate, rest = self.in_proj.weight.split((self.d_inner, self.conv.dim + self.n_heads))
        y_BTE, _, _ = self._scan(project_wide(x_BTD, rest), None)
        return pick_rows(y_BTE, rows_BM), F.linear(x_BMD, gate)

    def scan_step(self, x_BD: Tensor, state: State) -> tuple[Tensor, Tensor, Tensor, State]:
        """One token of `scan`, by the recurrence: [B, E] three times, and the state's part."""
        z, xbc, dt = self._project(x_BD)
        xbc, tail = self.conv.step(xbc, state["conv"])
        x_BHP, b_BGN, c_BGN = self._split(xbc)
        b_BHN, c_BHN = (a.repeat_interleave(self.n_heads // self.n_groups, dim=1) for a in (b_BGN, c_BGN))
        dt_BH, log_decay_BH = self._time_step(dt)
        write_BHNP = b_BHN[..., None] * (dt_BH[..., None] * x_BHP)[..., None, :]
        s_BHNP = log_decay_BH.exp()[..., None, None] * state["s"] + write_BHNP
        y_BHP = (c_BHN[..., None] * s_BHNP).sum(-2) + self.skip[:, None] * x_BHP
        return y_BHP.flatten(-2), x_BHP.flatten(-2), z, {"s": s_BHNP.to(state["s"].dtype), "conv": tail}

    def fused_step(self, x_BD: Tensor, state: State) -> tuple[Tensor, State]:
        """One token of a block whose norm nothing joins, in one launch beside the projections: [B, D] and the state."""
        z_BE, xbc_BC, dt_BH = self._project(x_BD)
        n = self.n_groups * self.d_state
        done = layer_step(
            Packed(xbc_BC, (self.d_inner + n, self.d_inner, 0)),
            state["s"],
            StepForm(silu=True, decay="rate", stepped=True, norm="row", eps=self.norm.eps, gate="silu"),
            conv=conv_of(self.conv, state),
            decay=dt_BH,
            decay_bias=self.dt_bias,
            log_rate_H=self.log_rate,
            skip_H=self.skip,
            norm_weight=self.norm.weight.unflatten(0, (self.n_heads, -1)),
            gate_BE=z_BE,
        )
        return self.out_proj(done.y_BE.to(x_BD.dtype)), next_state(state, done.state_BHKV, done.tail_BPC)

    def scan_state(self, batch: int, *, device: torch.device | str, dtype: torch.dtype) -> State:
        """The scan's part of the state before the first token."""
        return {
            "s": torch.zeros(batch, self.n_heads, self.d_state, self.head_dim, device=device, dtype=dtype),
            "conv": self.conv.init_tail(batch, device=device, dtype=dtype),
        }

    def matrix(self, x_BTD: Tensor) -> Tensor:
        """The causal matrix that the scan multiplies its inputs with, [B, H, T, T] (Dao & Gu 2024)."""
        _, xbc, dt = self._project(x_BTD)
        _, b_BTGN, c_BTGN = self._split(self.conv(xbc)[0])
        b_BTHN, c_BTHN = (widen(a).repeat_interleave(self.n_heads // self.n_groups, dim=2) for a in (b_BTGN, c_BTGN))
        dt_BTH, log_decay_BTH = self._time_step(dt)
        total_BHT = log_decay_BTH.cumsum(1).transpose(1, 2)
        log_ratio_BHTT = total_BHT[..., :, None] - total_BHT[..., None, :]
        causal_TT = torch.ones_like(log_ratio_BHTT[0, 0], dtype=torch.bool).tril()
        decay_BHTT = log_ratio_BHTT.masked_fill(~causal_TT, float("-inf")).exp()
        return torch.einsum("bthn,bshn->bhts", c_BTHN, b_BTHN) * decay_BHTT * dt_BTH.transpose(1, 2)[..., None, :]

    def project_out(self, y: Tensor, z: Tensor) -> Tensor:
        """The gated norm and the output projection of [..., E]."""
        return self.out_proj(gated_norm(y, z, self.norm.weight, self.norm.eps))

    def _scan(self, row_BTR: Tensor, state: State | None) -> tuple[Tensor, Tensor, State | None]:
        """`scan` of a projected segment: inputs of the convolution, time steps and spare numbers."""
        y_BTE, x_BTE, after = ssd(
            row_BTR,
            Conv(self.conv.weight, self.conv.bias) if self.conv.taps else None,
            Heads(self.dt_bias, self.log_rate, self.skip),
            Sizes(self.n_groups, self.d_state, self.head_dim),
            None if state is None else SSDState(state["s"], state["conv"]),
        )
        return y_BTE, x_BTE, None if after is None else {"s": after.s_BHNP, "conv": after.tail_BQW}

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The output gate z, the input of the convolution (x, B, C), and dt before its softplus."""
        z, xbc, dt = project(x, self.in_proj.weight, (self.d_inner, self.conv.dim, self.n_heads))
        return z, xbc, dt

    def _split(self, xbc: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs [..., H, P], and B and C [..., G, N]."""
        n = self.n_groups * self.d_state
        x, b, c = xbc.split((self.d_inner, n, n), dim=-1)
        groups = (self.n_groups, self.d_state)
        return x.unflatten(-1, (self.n_heads, self.head_dim)), b.unflatten(-1, groups), c.unflatten(-1, groups)

    def _time_step(self, dt: Tensor) -> tuple[Tensor, Tensor]:
        """The step dt and the log decay -exp(A) dt: [..., H] each."""
        dt = F.softplus(widen(dt) + self.dt_bias)
        return dt, -self.log_rate.exp() * dt
