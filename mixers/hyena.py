"""Hyena of order 2 (Poli et al. 2023, sections 3.2 and 3.3): gate, long implicit convolution, gate.

y = W_out (x2 * (h * (x1 . v) + D (x1 . v))), with x1, x2, v short convolutions of projections of the input. There is
no constant-size recurrence: decoding recomputes one output from the stored gated values.

Shape legend: B batch, T time, D width, E = 3 D.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from kernels.conv import long_conv
from kernels.rows import pick_rows
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
        train_features: whether what the filter's network sees of each lag is trained. In Zoology it is: the published learning
            rate of 1e-5 for it is an attribute that Zoology's trainer does not read.
    """

    caps = Caps(recurrent=False, patterns=frozenset({"causal_self"}))
    variants = ({"max_len": 96}, {"max_len": 80, "filter_order": 8, "kernel_size": 1}, {"max_len": 96, "train_features": True})

    def __init__(
        self,
        d_model: int,
        *,
        layer: int = 0,
        pattern: str = "causal_self",
        max_len: int = 1024,
        filter_order: int = 64,
        kernel_size: int = 3,
        train_features: bool = False,
    ) -> None:
        super().__init__(d_model, pattern=pattern)
        if kernel_size < 1:
            raise ValueError(f"kernel_size={kernel_size}: the short convolution has at least 1 tap")
        self.max_len = max_len
        self.caps = replace(self.caps, max_len=max_len)
        self.in_proj = nn.Linear(d_model, 3 * d_model)
        self.conv = ShortConv(3 * d_model, kernel_size, bias=True, silu=False)
        self.filter = ImplicitFilter(d_model, hidden=filter_order, max_len=max_len, train_features=train_features)
        self.skip = nn.Parameter(torch.randn(d_model))
        self.out_proj = nn.Linear(d_model, d_model)

    def forward(
        self, x_BTD: Tensor, state: State | None = None, *, context_BSD: Tensor | None = None
    ) -> tuple[Tensor, State | None]:
        """See `Mixer.forward`."""
        if context_BSD is not None:
            raise ValueError("hyena reads its own input only; context_BSD belongs to the cross patterns")
        v, gate_out, tail = self._gated(x_BTD, None if state is None else state["conv"])
        if state is None:
            return self._output(long_conv(v, self.filter(v.shape[1])), v, gate_out), None
        y, past = continue_conv(v, self.filter(self.max_len), state["history"])
        return self._output(y, v, gate_out), {"conv": tail, "history": past}

    def at_rows(self, x_BTD: Tensor, rows_BM: Tensor, x_BMD: Tensor) -> Tensor:
        """See `Mixer.at_rows`: what follows the long convolution is left out elsewhere."""
        v, gate_out, _ = self._gated(x_BTD, None)
        y = long_conv(v, self.filter(v.shape[1]))
        return self._output(*(pick_rows(part, rows_BM) for part in (y, v, gate_out)))

    def step(self, x_BD: Tensor, state: State) -> tuple[Tensor, State]:
        """See `Mixer.step`: the convolution's sum for one output, over all stored inputs."""
        mixed, tail = self.conv.step(self.in_proj(x_BD), state["conv"])
        gate_in, gate_out, v = mixed.chunk(3, -1)
        v = v * gate_in
        y, past = step_conv(v, self.filter(self.max_len), state["history"])
        return self._output(y, v, gate_out), {"conv": tail, "history": past}

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

    def _gated(self, x_BTD: Tensor, tail: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """The gated values and the gate of the output, [B, T, D] each, and the short convolution's tail."""
        mixed, tail = self.conv(self.in_proj(x_BTD), tail)
        gate_in, gate_out, v = mixed.chunk(3, -1)
        return v * gate_in, gate_out, tail

    def _output(self, y: Tensor, v: Tensor, gate: Tensor) -> Tensor:
        return self.out_proj(torch.addcmul(y, v, self.skip.to(v.dtype)) * gate)
