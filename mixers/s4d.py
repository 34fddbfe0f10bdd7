"""S4D (Gu et al. 2022): a linear time-invariant state space model with a diagonal complex state per channel.

    h_t = exp(dt a) h_{t-1} + (exp(dt a) - 1) / a x_t,    y_t = 2 Re(c . h_t) + D x_t        (zero-order hold, B = 1)

One step does not depend on the input, so a segment is a convolution with the filter 2 Re(c . exp(dt a l) (exp(dt a) - 1) / a).
Complex numbers are pairs of reals, since autocast and vmap know those.

Shape legend: B batch, T time, D width, N complex state elements of a channel.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.conv import long_conv
from mixers._base import Mixer, State, mixer
from mixers._layers import refuse_context, widen


@mixer("s4d")
class S4D(Mixer):
    """S4D with the S4D-Lin start, a_n = -1/2 + i pi n, in the block of its paper: GELU, then a gated output projection.

    Args:
        d_state: real state elements of a channel, 2 N.
        dt_min: smallest time step at first; a channel's own is drawn log-uniformly.
        dt_max: largest time step at first.
    """

    variants = ({}, {"d_state": 4})

    def __init__(
        self,
        d_model: int,
        *,
        layer: int = 0,
        pattern: str = "causal_self",
        d_state: int = 64,
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
    ) -> None:
        super().__init__(d_model, pattern=pattern)
        if d_state < 2 or d_state % 2 or not 0 < dt_min <= dt_max:
            raise ValueError(
                f"d_state={d_state}, dt_min={dt_min}, dt_max={dt_max}: state elements come in pairs, at least one, and "
                "0 < dt_min <= dt_max"
            )
        n_complex = d_state // 2
        self.log_dt = nn.Parameter(torch.empty(d_model).uniform_(math.log(dt_min), math.log(dt_max)))
        self.log_rate = nn.Parameter(torch.full((d_model, n_complex), math.log(0.5)))
        self.frequency = nn.Parameter(math.pi * torch.arange(n_complex, dtype=torch.get_default_dtype()).repeat(d_model, 1))
        self.readout = nn.Parameter(torch.randn(d_model, n_complex, 2) * 0.5**0.5)
        self.skip = nn.Parameter(torch.randn(d_model))
        self.out_proj = nn.Linear(d_model, 2 * d_model)

    def forward(
        self, x_BTD: Tensor, state: State | None = None, *, context_BSD: Tensor | None = None
    ) -> tuple[Tensor, State | None]:
        """See `Mixer.forward`."""
        refuse_context(self, context_BSD)
        length = x_BTD.shape[1]
        read_DN2 = _times(widen(self.readout), self._write())
        lag = torch.arange(length + 1, device=x_BTD.device)
        power_LDN2 = self._power(lag)
        filter_DT = 2 * _real(read_DN2, power_LDN2[:-1]).sum(-1).t()
        y_BTD = long_conv(x_BTD, filter_DT)
        if state is None:
            return self._output(y_BTD, x_BTD), None
        h_BDN2 = widen(state["h"])
        from_state_LDN2 = _times(widen(self.readout), power_LDN2[1:])
        carried_BTD = 2 * (
            torch.einsum("bdn,ldn->bld", h_BDN2[..., 0], from_state_LDN2[..., 0])
            - torch.einsum("bdn,ldn->bld", h_BDN2[..., 1], from_state_LDN2[..., 1])
        )
        writes_LDN2 = _times(self._write(), power_LDN2[:-1].flip(0))
        h_BDN2 = _times(power_LDN2[-1], h_BDN2) + torch.einsum("bld,ldnc->bdnc", widen(x_BTD), writes_LDN2)
        return self._output(y_BTD + carried_BTD.to(y_BTD.dtype), x_BTD), {"h": h_BDN2.to(state["h"].dtype)}

    def step(self, x_BD: Tensor, state: State) -> tuple[Tensor, State]:
        """See `Mixer.step`."""
        one = torch.ones((), device=x_BD.device)
        h_BDN2 = _times(self._power(one), widen(state["h"])) + self._write() * widen(x_BD)[..., None, None]
        y_BD = 2 * _real(widen(self.readout), h_BDN2).sum(-1)
        return self._output(y_BD.to(x_BD.dtype), x_BD), {"h": h_BDN2.to(state["h"].dtype)}

    def init_state(
        self, batch: int, max_len: int, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> State:
        """See `Mixer.init_state`."""
        return {"h": torch.zeros(batch, *self.readout.shape, device=device, dtype=dtype)}

    def _rates(self) -> tuple[Tensor, Tensor]:
        """Real and imaginary part of dt a, [D, N] each."""
        dt_D1 = widen(self.log_dt).exp()[:, None]
        return -widen(self.log_rate).exp() * dt_D1, widen(self.frequency) * dt_D1

    def _power(self, lag: Tensor) -> Tensor:
        """exp(dt a lag), [*lag.shape, D, N, 2]."""
        decay_DN, turn_DN = self._rates()
        lag = lag[..., None, None]
        return (decay_DN * lag).exp()[..., None] * torch.stack(((turn_DN * lag).cos(), (turn_DN * lag).sin()), -1)

    def _write(self) -> Tensor:
        """(exp(dt a) - 1) / a, [D, N, 2]."""
        decay_DN, turn_DN = self._rates()
        grown = torch.stack((decay_DN.exp() * turn_DN.cos() - 1, decay_DN.exp() * turn_DN.sin()), -1)
        rate, frequency = widen(self.log_rate).exp(), widen(self.frequency)
        conjugate = torch.stack((-rate, -frequency), -1) / (rate.square() + frequency.square())[..., None]
        return _times(grown, conjugate)

    def _output(self, y: Tensor, x: Tensor) -> Tensor:
        return F.glu(self.out_proj(F.gelu(y + self.skip * x).to(x.dtype)))


def _times(a: Tensor, b: Tensor) -> Tensor:
    """Complex product on the last axis (real, imaginary)."""
    real = a[..., 0] * b[..., 0] - a[..., 1] * b[..., 1]
    return torch.stack((real, a[..., 0] * b[..., 1] + a[..., 1] * b[..., 0]), -1)


def _real(a: Tensor, b: Tensor) -> Tensor:
    """Real part of the complex product."""
    return a[..., 0] * b[..., 0] - a[..., 1] * b[..., 1]
