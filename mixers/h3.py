"""H3, "hungry hungry hippos" (Fu et al. 2023, section 3.1): o = q * SSM_diag(SSM_shift(k) v^T), head by head.

The shift SSM is a filter of `d_state` taps over the keys. The diagonal SSM (S4D, Gu et al. 2022) filters every entry of
the outer products k v^T with the impulse response 2 Re sum_m C_m B_m a_m^lag of its head; training evaluates it as a
convolution, decoding carries its complex state.

Shape legend: B batch, T time, D width, H heads, I and J rows and columns of a head's k v^T, M complex modes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from kernels.channels import from_channels, to_channels
from kernels.conv import gated_long_conv, long_conv
from kernels.correlation import correlation
from kernels.pairs import times
from kernels.rows import pick_times
from mixers._base import Caps, Mixer, State, mixer
from mixers._filters import continue_conv, history, step_conv

FINE = 16
"""Lags whose powers are tabulated one by one; those of their multiples are another table."""
FAR, NOTHING = 40.0, 1e-12
"""Logarithms of time steps and decays that change nothing further up, and squares that count as zero: a step that is as long as a
mode decays forgets it at once."""


@mixer("h3")
class H3(Mixer):
    """H3 with S4D-Lin modes, the bilinear rule and trained input maps B of both SSMs, as in the published code.

    Args:
        d_state: taps of the shift SSM, and real state size of each diagonal SSM; even.
        head_dim: I = J, width of a head.
    """

    caps = Caps(patterns=frozenset({"causal_self"}))
    variants = ({"d_state": 4}, {"d_state": 16, "head_dim": 4}, {"d_state": 2, "head_dim": 1})

    def __init__(self, d_model: int, *, layer: int = 0, pattern: str = "causal_self", d_state: int = 64, head_dim: int = 2) -> None:
        super().__init__(d_model, pattern=pattern)
        if head_dim < 1 or d_model % head_dim:
            raise ValueError(f"head_dim={head_dim} does not divide d_model={d_model}")
        if d_state < 2 or d_state % 2:
            raise ValueError(f"d_state={d_state} counts pairs of conjugate modes; take an even number from 2 on")
        self.d_state, self.head_dim, self.n_heads = d_state, head_dim, d_model // head_dim
        n_modes = d_state // 2
        self.qkv_proj = nn.Linear(d_model, 3 * d_model)
        self.shift_taps = nn.Parameter(torch.empty(d_model, d_state).uniform_(-(d_state**-0.5), d_state**-0.5))
        self.shift_in = nn.Parameter(torch.eye(1, d_state).repeat(d_model, 1))
        self.shift_skip = nn.Parameter(torch.randn(d_model))
        self.log_dt = nn.Parameter(torch.empty(self.n_heads).uniform_(math.log(1e-3), math.log(1e-1)))
        self.log_decay = nn.Parameter(torch.full((self.n_heads, n_modes), math.log(0.5)))
        self.frequency = nn.Parameter(math.pi * torch.arange(n_modes).repeat(self.n_heads, 1).float())
        self.write_in = nn.Parameter(torch.eye(1, 2).repeat(self.n_heads, n_modes, 1))
        self.readout = nn.Parameter(torch.randn(self.n_heads, n_modes, 2) * 0.5**0.5)
        self.skip = nn.Parameter(torch.randn(self.n_heads))
        self.o_proj = nn.Linear(d_model, d_model)  # the name that is not scaled down: H3 is published with 0.02

    def forward(
        self, x_BTD: Tensor, state: State | None = None, *, context_BSD: Tensor | None = None
    ) -> tuple[Tensor, State | None]:
        """See `Mixer.forward`."""
        if context_BSD is not None:
            raise ValueError("h3 reads its own input only; context_BSD belongs to the cross patterns")
        if state is None:
            y_ND = from_channels(self._mixed(x_BTD).flatten(1), self.o_proj.weight)
            return (y_ND + self.o_proj.bias.to(y_ND.dtype)).unflatten(0, x_BTD.shape[:2]), None
        q, k, v = self.qkv_proj(x_BTD).chunk(3, -1)
        k, past = continue_conv(k, self._shift_filter(self.d_state), state["shift"])
        kv_BIJTH = self._split(k)[:, :, None] * self._split(v)[:, None]
        y_BIJTH = long_conv(kv_BIJTH.flatten(0, 2), self._filter(x_BTD.shape[1])).view_as(kv_BIJTH)
        step_HM, gain_HM = (torch.view_as_complex(pair) for pair in self._modes())
        before = torch.view_as_complex(state["modes"].to(step_HM.real.dtype))
        power_HMT = torch.exp(step_HM[..., None] * torch.arange(x_BTD.shape[1], device=x_BTD.device))
        next_power = power_HMT * torch.exp(step_HM)[..., None]
        recalled = 2 * torch.einsum("hm,hmt,bijhm->bijth", gain_HM, next_power, before).real
        written = torch.einsum("hmt,bijth->bijhm", power_HMT.flip(-1), kv_BIJTH.to(power_HMT.dtype))
        after = torch.view_as_real(before * next_power[..., -1] + written)
        new_state = {"shift": past, "modes": after.to(state["modes"].dtype)}
        return self._read(q, y_BIJTH + recalled.to(y_BIJTH.dtype)), new_state

    def at_rows(self, x_BTD: Tensor, rows_BM: Tensor, x_BMD: Tensor) -> Tensor:
        """See `Mixer.at_rows`: the output's map is left out elsewhere."""
        return self.o_proj(pick_times(self._mixed(x_BTD), rows_BM))

    def step(self, x_BD: Tensor, state: State) -> tuple[Tensor, State]:
        """See `Mixer.step`: h <- a h + k v^T, o = q (2 Re C B h + D k v^T)."""
        q_BD, k, v = self.qkv_proj(x_BD).chunk(3, -1)
        k, past = step_conv(k, self._shift_filter(self.d_state), state["shift"])
        k, v = (self._split(a[:, None])[:, :, 0] for a in (k, v))
        kv_BIJH = k[:, :, None] * v[:, None]
        step_HM, gain_HM = (torch.view_as_complex(pair) for pair in self._modes())
        before = torch.view_as_complex(state["modes"].to(step_HM.real.dtype))
        modes = before * torch.exp(step_HM) + kv_BIJH[..., None].to(step_HM.dtype)
        y_BIJH = 2 * (modes * gain_HM).sum(-1).real.to(x_BD.dtype) + kv_BIJH * self.skip.to(x_BD.dtype)
        return self._read(q_BD[:, None], y_BIJH[:, :, :, None])[:, 0], {
            "shift": past,
            "modes": torch.view_as_real(modes).to(state["modes"].dtype),
        }

    def init_state(
        self, batch: int, max_len: int, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> State:
        """See `Mixer.init_state`: the shift SSM's last keys, and the diagonal SSMs' modes as (real, imaginary)."""
        shape = (batch, self.head_dim, self.head_dim, self.n_heads, self.d_state // 2, 2)
        return {
            "shift": history(batch, self.d_state - 1, self.d_model, device=device, dtype=dtype),
            "modes": torch.zeros(shape, device=device, dtype=dtype),
        }

    def published_elements(self, seq_len: int) -> int:
        """See `Mixer.published_elements`: d_model d_state; Zoology forgets the factor head_dim and the shift SSM."""
        return self.d_model * self.d_state

    def _modes(self) -> tuple[Tensor, Tensor]:
        """Log of the transition (1 + dt A / 2) / (1 - dt A / 2), and B C dt / (1 - dt A / 2).

        Pairs (real, imaginary) [H, M, 2] and at least fp32: compilers for GPUs leave out complex numbers.
        """
        wide = torch.promote_types(self.log_dt.dtype, torch.float32)
        dt_H1 = self.log_dt.to(wide).clamp(max=FAR).exp()[:, None]
        half_decay_HM = self.log_decay.to(wide).clamp(max=FAR).exp() * dt_H1 / 2
        half_turn_HM = self.frequency.to(wide) * dt_H1 / 2
        # numerator and denominator in units of the larger one's size, so that no square overflows
        unit_HM = 1 / torch.maximum(1 + half_decay_HM, half_turn_HM.abs()).detach()
        decay_HM, turn_HM = half_decay_HM * unit_HM, half_turn_HM * unit_HM
        above_HM = (unit_HM - decay_HM).square() + turn_HM.square()
        below_HM = (unit_HM + decay_HM).square() + turn_HM.square()
        angle_HM = _angle(turn_HM, unit_HM - decay_HM) + torch.atan2(turn_HM, unit_HM + decay_HM)
        held_HM2 = torch.stack((unit_HM + decay_HM, turn_HM), -1) * (dt_H1 * unit_HM / below_HM)[..., None]
        gain_HM2 = times(times(self.readout.to(wide), self.write_in.to(wide)), held_HM2)
        return torch.stack((_log_size(above_HM, below_HM, -4 * unit_HM * decay_HM), angle_HM), -1), gain_HM2

    def _split(self, a_BTD: Tensor) -> Tensor:
        """[B, T, D] to [B, I, T, H]: the channel index is (I, H), so that heads stay innermost for the convolution."""
        return a_BTD.unflatten(-1, (self.head_dim, self.n_heads)).transpose(1, 2)

    def _mixed(self, x_BTD: Tensor) -> Tensor:
        """What is read of a sequence from nothing, channel by channel: [D, B, T]."""
        qkv_EBT = to_channels(x_BTD.flatten(0, 1), self.qkv_proj.weight).unflatten(1, x_BTD.shape[:2])
        return gated_long_conv(qkv_EBT, self.qkv_proj.bias, self._filter(x_BTD.shape[1]), self._shift_filter(x_BTD.shape[1]))

    def _shift_filter(self, length: int) -> Tensor:
        """The shift SSM's taps of the lags below `length`, no more than it has, [D, K]; its skip is one at lag 0."""
        taps_DK = correlation(self.shift_in, self.shift_taps, min(length, self.d_state))
        return torch.cat((taps_DK[:, :1] + self.shift_skip[:, None], taps_DK[:, 1:]), 1)

    def _filter(self, length: int) -> Tensor:
        """Impulse response of the diagonal SSMs with their skips, [H, T]."""
        response_HT = _impulse_response(*self._modes(), length)
        return torch.cat((response_HT[:, :1] + self.skip[:, None], response_HT[:, 1:]), 1)

    def _read(self, q_BTD: Tensor, y_BIJTH: Tensor) -> Tensor:
        """The output of queries."""
        y_BJTH = (self._split(q_BTD)[:, :, None] * y_BIJTH).sum(1)
        return self.o_proj(y_BJTH.transpose(1, 2).flatten(-2))


def _log_size(above_HM: Tensor, below_HM: Tensor, lacks_HM: Tensor) -> Tensor:
    """Half of log(above / below), where above = below + lacks: the way that takes no difference of numbers close to each other."""
    share_HM = lacks_HM / below_HM
    is_near_one = share_HM > -0.5
    near_HM = torch.log1p(torch.where(is_near_one, share_HM, -0.5))
    far_HM = torch.log(torch.where(is_near_one, 0.5, above_HM / below_HM).clamp(min=NOTHING))
    return 0.5 * torch.where(is_near_one, near_HM, far_HM)


def _angle(y_HM: Tensor, x_HM: Tensor) -> Tensor:
    """Of a point, whose gradient stays finite where there is none: at the origin."""
    is_nothing = y_HM.square() + x_HM.square() < NOTHING
    return torch.atan2(torch.where(is_nothing, 0.0, y_HM), torch.where(is_nothing, 1.0, x_HM))


def _impulse_response(step_HM2: Tensor, gain_HM2: Tensor, length: int) -> Tensor:
    """2 Re sum_m gain_m exp(step_m lag) of the lags below `length`, [H, T].

    A lag is c F + f, and its power a product: two short tables and a matrix product instead of an exponential for each lag.
    """
    near_re_HFM, near_im_HFM = _powers(step_HM2, torch.arange(FINE, device=step_HM2.device))
    re_HCM, im_HCM = _powers(step_HM2, FINE * torch.arange(-(-length // FINE), device=step_HM2.device))
    gain_re_H1M, gain_im_H1M = (2 * gain_HM2[:, None]).unbind(-1)
    far = torch.cat((re_HCM * gain_re_H1M - im_HCM * gain_im_H1M, re_HCM * gain_im_H1M + im_HCM * gain_re_H1M), -1)
    near = torch.cat((near_re_HFM, -near_im_HFM), -1)
    with torch.autocast(step_HM2.device.type, enabled=False):
        return torch.bmm(far, near.mT).flatten(1)[:, :length]


def _powers(step_HM2: Tensor, lag_L: Tensor) -> tuple[Tensor, Tensor]:
    """exp(step lag), real and imaginary parts [H, L, M]: as pairs they would be a tensor of their own in memory."""
    lag_L1 = lag_L[:, None]
    size_HLM, angle_HLM = (step_HM2[:, None, :, 0] * lag_L1).exp(), step_HM2[:, None, :, 1] * lag_L1
    return size_HLM * angle_HLM.cos(), size_HLM * angle_HLM.sin()
