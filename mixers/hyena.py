"""Hyena of order 2 (Poli et al. 2023, sections 3.2 and 3.3): gate, long implicit convolution, gate.

y = W_out (x2 * (h * (x1 . v) + D (x1 . v))), with x1, x2, v short convolutions of projections of the input. There is
no constant-size recurrence: decoding recomputes one output from the stored gated values.

Shape legend: B batch, T time, D width, E = 3 D.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from kernels.channels import from_channels, to_channels
from kernels.conv import channel_short_conv, gated_long_conv
from kernels.rows import pick_times
from mixers._base import Caps, Mixer, State, mixer
from mixers._filters import ImplicitFilter, continue_conv, history, step_conv
from mixers._layers import ShortConv


@mixer("hyena")
class Hyena(Mixer):
    """Order-2 Hyena operator with Zoology's settings.

    Args:
        max_len: longest sequence; the filter is defined for this many lags.
        filter_order: hidden width of the filter's network.
        kernel_size: taps of the short convolution over queries, keys and values.
    """

    caps = Caps(recurrent=False, patterns=frozenset({"causal_self"}))
    variants = ({"max_len": 96}, {"max_len": 80, "filter_order": 8, "kernel_size": 1})

    def __init__(
        self,
        d_model: int,
        *,
        layer: int = 0,
        pattern: str = "causal_self",
        max_len: int = 1024,
        filter_order: int = 64,
        kernel_size: int = 3,
    ) -> None:
        super().__init__(d_model, pattern=pattern)
        if kernel_size < 1:
            raise ValueError(f"kernel_size={kernel_size}: the short convolution has at least 1 tap")
        self.max_len = max_len
        self.caps = replace(self.caps, max_len=max_len)
        self.in_proj = nn.Linear(d_model, 3 * d_model)
        self.conv = ShortConv(3 * d_model, kernel_size, bias=True, silu=False)
        self.filter = ImplicitFilter(d_model, hidden=filter_order, max_len=max_len)
        self.skip = nn.Parameter(torch.randn(d_model))
        self.out_proj = nn.Linear(d_model, d_model)

    def forward(
        self, x_BTD: Tensor, state: State | None = None, *, context_BSD: Tensor | None = None
    ) -> tuple[Tensor, State | None]:
        """See `Mixer.forward`."""
        if context_BSD is not None:
            raise ValueError("hyena reads its own input only; context_BSD belongs to the cross patterns")
        if state is None:
            y_ND = from_channels(self._mixed(x_BTD).flatten(1), self.out_proj.weight)
            return (y_ND + self.out_proj.bias.to(y_ND.dtype)).unflatten(0, x_BTD.shape[:2]), None
        mixed, tail = self.conv(self.in_proj(x_BTD), state["conv"])
        gate_in, gate_out, v = mixed.chunk(3, -1)
        y, past = continue_conv(v * gate_in, self._filter(self.max_len), state["history"])
        return self.out_proj(y * gate_out), {"conv": tail, "history": past}

    def at_rows(self, x_BTD: Tensor, rows_BM: Tensor, x_BMD: Tensor) -> Tensor:
        """See `Mixer.at_rows`: the output's map is left out elsewhere."""
        return self.out_proj(pick_times(self._mixed(x_BTD), rows_BM))

    def step(self, x_BD: Tensor, state: State) -> tuple[Tensor, State]:
        """See `Mixer.step`: the convolution's sum for one output, over all stored inputs."""
        mixed, tail = self.conv.step(self.in_proj(x_BD), state["conv"])
        gate_in, gate_out, v = mixed.chunk(3, -1)
        y, past = step_conv(v * gate_in, self._filter(self.max_len), state["history"])
        return self.out_proj(y * gate_out), {"conv": tail, "history": past}

    def init_state(
        self, batch: int, max_len: int, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> State:
        """See `Mixer.init_state`: the short convolution's tail and the gated values of all tokens."""
        return {
            "conv": self.conv.init_tail(batch, device=device, dtype=dtype),
            "history": history(batch, min(max_len, self.max_len), self.d_model, device=device, dtype=dtype),
        }

    def published_elements(self, seq_len: int) -> int:
        """See `Mixer.published_elements`: d L, without the short convolution's tail (Zoology)."""
        return self.d_model * seq_len

    def _mixed(self, x_BTD: Tensor) -> Tensor:
        """What is read of a sequence from nothing, channel by channel: [D, B, T]."""
        in_EBT = to_channels(x_BTD.flatten(0, 1), self.in_proj.weight).unflatten(1, x_BTD.shape[:2])
        mixed_EBT = channel_short_conv(in_EBT, self.in_proj.bias, self.conv.weight)
        return gated_long_conv(mixed_EBT, self.conv.bias, self._filter(x_BTD.shape[1]), q=1)

    def _filter(self, length: int) -> Tensor:
        """The first taps [D, T]; the skip is one at lag 0."""
        taps_DT = self.filter(length)
        return torch.cat((taps_DT[:, :1] + self.skip[:, None], taps_DT[:, 1:]), 1)
