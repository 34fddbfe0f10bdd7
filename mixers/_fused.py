"""When a mixer's token is one launch: its whole layer but the projections, by `kernels.layer_step`.

Shape legend: B batch, T time, D width.
"""

from __future__ import annotations

from torch import Tensor

from kernels.layer_step import Conv, fuses
from mixers._base import Mixer, State
from mixers._layers import ShortConv


def is_fused(mixer: Mixer, x: Tensor, state: State | None, *, taps: int = 0) -> bool:
    """Whether `x`, [B, D] or [B, T, D], is one token after a state that one launch can serve.

    Args:
        mixer: its weights may want gradients, which a fused step does not have.
        x: the mixer's input.
        state: with the recurrence's state under the name `s`.
        taps: of the mixer's short convolution.
    """
    if state is None or (x.ndim == 3 and x.shape[1] != 1):
        return False
    return fuses(x, state["s"], mixer.parameters(), taps=taps)


def conv_of(conv: ShortConv, state: State) -> Conv | None:
    """The convolution and its tail, or None if it is switched off."""
    return Conv(conv.weight, conv.bias, state["conv"]) if conv.taps else None


def next_state(state: State, s: Tensor, tail: Tensor | None, sums: Tensor | None = None) -> State:
    """The state after a fused step, with the names of the given one."""
    new = {"s": s, "conv": state.get("conv") if tail is None else tail, "z": sums}
    return {name: new[name] for name in state}
