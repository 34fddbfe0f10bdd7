"""BaseConv: a gated causal convolution (Arora et al. 2023, Zoology, section 4 and appendix).

y = conv(x) * (W x + b) + x, with a short depthwise filter or an implicit one as long as the sequence.

Shape legend: B batch, T time, D width.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from kernels.conv import long_conv
from kernels.gated_conv import gated_conv
from mixers._base import Caps, Mixer, State, mixer
from mixers._filters import ImplicitFilter, continue_conv, history, step_conv
from mixers._layers import ShortConv


@mixer("base_conv")
class BaseConv(Mixer):
    """Convolution times projection plus input; Zoology Figure 2 uses a short filter, then an implicit long one.

    The sum includes the input itself, although the block around the mixer has a residual too.

    Args:
        kernel_size: taps of the short filter.
        implicit: whether to use a full-length implicit filter in place of the short one; it adds x to its output, as the
            published code does.
        max_len: length of the implicit filter.
        hidden: hidden width of the implicit filter's network.
    """

    caps = Caps(patterns=frozenset({"causal_self"}))
    variants = ({}, {"kernel_size": 2}, {"implicit": True, "max_len": 96})

    def __init__(
        self,
        d_model: int,
        *,
        layer: int = 0,
        pattern: str = "causal_self",
        kernel_size: int = 3,
        implicit: bool = False,
        max_len: int = 1024,
        hidden: int = 16,
    ) -> None:
        super().__init__(d_model, pattern=pattern)
        if kernel_size < 1:
            raise ValueError(f"kernel_size={kernel_size}: the short convolution has at least 1 tap")
        self.kernel_size, self.implicit, self.max_len = kernel_size, implicit, max_len
        self.projection = nn.Linear(d_model, d_model)
        if implicit:
            self.filter = ImplicitFilter(d_model, hidden=hidden, max_len=max_len)
            self.caps = replace(self.caps, recurrent=False, max_len=max_len)
        else:
            self.conv = ShortConv(d_model, kernel_size, bias=True, silu=False)

    def forward(
        self, x_BTD: Tensor, state: State | None = None, *, context_BSD: Tensor | None = None
    ) -> tuple[Tensor, State | None]:
        """See `Mixer.forward`."""
        if context_BSD is not None:
            raise ValueError("base_conv reads its own input only; context_BSD belongs to the cross patterns")
        if state is None and not self.implicit:
            return gated_conv(x_BTD, self.projection.weight, self.projection.bias, self.conv.weight, self.conv.bias), None
        tail = None if state is None else state["conv"]
        if not self.implicit:
            mixed, tail = self.conv(x_BTD, tail)
        elif tail is None:
            mixed = long_conv(x_BTD, self.filter(x_BTD.shape[1])) + x_BTD
        else:
            mixed, tail = continue_conv(x_BTD, self.filter(self.max_len), tail)
            mixed = mixed + x_BTD
        return torch.addcmul(x_BTD, mixed, self.projection(x_BTD)), None if state is None else {"conv": tail}

    def step(self, x_BD: Tensor, state: State) -> tuple[Tensor, State]:
        """See `Mixer.step`: the convolution at one token, from the inputs that it remembers."""
        if self.implicit:
            mixed, tail = step_conv(x_BD, self.filter(self.max_len), state["conv"])
            mixed = mixed + x_BD
        else:
            mixed, tail = self.conv.step(x_BD, state["conv"])
        return torch.addcmul(x_BD, mixed, self.projection(x_BD)), {"conv": tail}

    def init_state(
        self, batch: int, max_len: int, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> State:
        """See `Mixer.init_state`: the last kernel_size - 1 inputs, or all inputs of an implicit filter."""
        if self.implicit:
            return {"conv": history(batch, min(max_len, self.max_len), self.d_model, device=device, dtype=dtype)}
        return {"conv": self.conv.init_tail(batch, device=device, dtype=dtype)}

    def published_elements(self, seq_len: int) -> int | None:
        """See `Mixer.published_elements`: Zoology charges all kernel_size inputs of the short filter."""
        return None if self.implicit else self.kernel_size * self.d_model
