"""Implicit long filters (Poli et al. 2023, Hyena, section 3.3), and how a long convolution continues from its history.

Shape legend: B batch, T time, D channels, L filter length, M stored history, F hidden width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from kernels.conv import long_conv


class ImplicitFilter(nn.Module):
    """A filter of `max_len` taps per channel that a small sine network computes from the lag.

    The network sees (t, cos 2 pi f t, sin 2 pi f t) with t the lag over the length; its output is multiplied by
    exp(-delta t), delta spread over the channels so that the filter falls to 1 % after 0.3 to 1.5 lengths. One
    frequency vector serves all its sine layers, as in the published experiments.

    Args:
        d_model: D.
        hidden: F.
        max_len: L.
        train_features: whether what the network sees of each lag is a parameter, which starts from the features above: a free
            point for every lag, at the learning rate and weight decay of all others.
    """

    def __init__(self, d_model: int, *, hidden: int, max_len: int, train_features: bool = False) -> None:
        super().__init__()
        if max_len < 1:
            raise ValueError(f"max_len={max_len}: a filter has at least one tap")
        self.max_len = max_len
        self.layers = nn.ModuleList(nn.Linear(width, hidden) for width in (3, hidden, hidden))
        self.readout = nn.Linear(hidden, d_model, bias=False)
        self.frequency = nn.Parameter(torch.ones(hidden))
        self.features = nn.Parameter(_lag_features(torch.arange(max_len).float(), max_len)) if train_features else None
        self.register_buffer("delta", torch.linspace(math.log(100) / 1.5, math.log(100) / 0.3, d_model), persistent=False)

    def forward(self, length: int) -> Tensor:
        """The first taps of the filter, newest lag first.

        Args:
            length: number of taps.

        Returns:
            [D, length].

        Raises:
            ValueError: more taps than the filter has.
        """
        if length > self.max_len:
            raise ValueError(f"the filter is defined for max_len={self.max_len} tokens, not {length}; raise max_len")
        lag_L = torch.arange(length, device=self.delta.device, dtype=self.delta.dtype)
        t_L1 = lag_L[:, None] / max(self.max_len - 1, 1)
        h = _lag_features(lag_L, self.max_len) if self.features is None else self.features[:length]
        with torch.autocast(h.device.type, enabled=False):  # lags above 256 would be rounded to each other
            for layer in self.layers:
                h = torch.sin(self.frequency * layer(h))
            return (self.readout(h) * torch.exp(-t_L1 * self.delta)).t()


def _lag_features(lag_L: Tensor, max_len: int) -> Tensor:
    """What the network sees of each lag, [L, 3]."""
    lag_L1 = lag_L[:, None]
    # the published features have a single band of frequency 1e-4: nearly the constants 1 and 0
    angle_L1 = 1e-4 * 2 * math.pi * lag_L1 / max_len
    return torch.cat((lag_L1 / max(max_len - 1, 1), angle_L1.cos(), -angle_L1.sin()), -1)


def continue_conv(x_BTD: Tensor, filter_DL: Tensor, history_BMD: Tensor) -> tuple[Tensor, Tensor]:
    """Long convolution of a segment that follows M stored inputs.

    Args:
        x_BTD: the segment.
        filter_DL: taps, newest first; lags beyond L do not contribute.
        history_BMD: the last inputs before the segment, zeros where there were none.

    Returns:
        The output [B, T, D], and the history after the segment, [B, M, D].
    """
    whole = torch.cat((history_BMD.to(x_BTD.dtype), x_BTD), 1)
    y = long_conv(whole, filter_DL)[:, history_BMD.shape[1] :]
    return y, whole[:, x_BTD.shape[1] :].to(history_BMD.dtype)


def step_conv(x_BD: Tensor, filter_DL: Tensor, history_BMD: Tensor) -> tuple[Tensor, Tensor]:
    """One token of `continue_conv`: the sum over the stored inputs, O(M D)."""
    whole = torch.cat((history_BMD.to(x_BD.dtype), x_BD[:, None]), 1)
    n_taps = min(filter_DL.shape[1], whole.shape[1])
    y = (whole[:, -n_taps:] * filter_DL[:, :n_taps].flip(1).t().to(x_BD.dtype)).sum(1)
    return y, whole[:, 1:].to(history_BMD.dtype)


def history(batch: int, length: int, width: int, *, device: torch.device | str, dtype: torch.dtype) -> Tensor:
    """An empty history: zeros [B, M, D]."""
    return torch.zeros(batch, length, width, device=device, dtype=dtype)
