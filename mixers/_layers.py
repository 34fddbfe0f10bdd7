"""Layers that several mixers share: per-head norms, a low-rank linear map, a short convolution with its tail.

Shape legend: B batch, T time, D channels, H heads, V width of a head, K taps.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kernels.conv import short_conv, short_conv_step


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis, computed in fp32 or better (Zhang & Sennrich 2019).

    Args:
        dim: width of the last axis.
        eps: added to the mean square.
    """

    def __init__(self, dim: int, *, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * scale * self.weight).to(x.dtype)


class HeadNorm(nn.Module):
    """Group norm with one group per head: mean and variance over a head, an affine map over all channels.

    Args:
        n_heads: H.
        head_dim: V.
        eps: added to the variance.
    """

    def __init__(self, n_heads: int, head_dim: int, *, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(n_heads, head_dim))
        self.bias = nn.Parameter(torch.zeros(n_heads, head_dim))

    def forward(self, x: Tensor) -> Tensor:
        """Normalises [..., H, V]."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        normed = F.layer_norm(wide, wide.shape[-1:], eps=self.eps)
        return torch.addcmul(self.bias, normed, self.weight).to(x.dtype)


class LowRank(nn.Module):
    """x -> up(act(down(x))), a linear map through a bottleneck; the bias sits on the way up.

    Args:
        d_in: input width.
        rank: width of the bottleneck.
        d_out: output width.
        bias: whether `up` has a bias.
        activation: "tanh", "sigmoid" or None.
    """

    def __init__(self, d_in: int, rank: int, d_out: int, *, bias: bool = True, activation: str | None = None) -> None:
        super().__init__()
        self.down = nn.Linear(d_in, rank, bias=False)
        self.up = nn.Linear(rank, d_out, bias=bias)
        self.activation = {"tanh": torch.tanh, "sigmoid": torch.sigmoid, None: None}[activation]

    def forward(self, x: Tensor) -> Tensor:
        low = self.down(x)
        return self.up(low if self.activation is None else self.activation(low))


class ShortConv(nn.Module):
    """Causal depthwise convolution with an optional SiLU; its tail is part of the state of the mixer that owns it.

    Args:
        dim: channels D.
        taps: K; the tail holds K - 1 inputs.
        bias: whether to add a bias.
        silu: whether to apply SiLU to the output.
    """

    def __init__(self, dim: int, taps: int, *, bias: bool = False, silu: bool = True) -> None:
        super().__init__()
        if taps < 1:
            raise ValueError(f"a short convolution needs at least 1 tap; {taps} were asked for")
        self.dim, self.taps, self.silu = dim, taps, silu
        bound = taps**-0.5
        self.weight = nn.Parameter(torch.empty(dim, taps).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(dim).uniform_(-bound, bound)) if bias else None

    def forward(self, x_BTD: Tensor, tail_BPD: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Filters a segment; returns [B, T, D] and, if a tail was given, the tail after it."""
        y_BTD, tail_BPD = short_conv(x_BTD, self.weight, self.bias, tail_BPD)
        return F.silu(y_BTD) if self.silu else y_BTD, tail_BPD

    def step(self, x_BD: Tensor, tail_BPD: Tensor) -> tuple[Tensor, Tensor]:
        """Filters one token; returns [B, D] and the new tail."""
        y_BD, tail_BPD = short_conv_step(x_BD, self.weight, self.bias, tail_BPD)
        return F.silu(y_BD) if self.silu else y_BD, tail_BPD

    def init_tail(self, batch: int, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
        """The tail before the first token: zeros [B, K-1, D]."""
        return torch.zeros(batch, self.taps - 1, self.dim, device=device, dtype=dtype)


def l2_normalize(x: Tensor, eps: float = 1e-6) -> Tensor:
    """Scales the last axis to unit length, in fp32 or better; eps under the root keeps the gradient finite at zero."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + eps)).to(x.dtype)
