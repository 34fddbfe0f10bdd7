"""Parts that several mixers share: norms, a low-rank map, a short convolution with its tail, initial decays.

Shape legend: B batch, T time, D channels, H heads, V width of a head, K taps.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kernels.conv import short_conv, short_conv_step
from mixers._base import Mixer


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
        wide = widen(x)
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
        wide = widen(x)
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
        taps: K; the tail holds K - 1 inputs. Zero switches the convolution off: the tail is empty, the SiLU stays.
        bias: whether to add a bias.
        silu: whether to apply SiLU to the output.
    """

    def __init__(self, dim: int, taps: int, *, bias: bool = False, silu: bool = True) -> None:
        super().__init__()
        if taps < 0:
            raise ValueError(f"a short convolution cannot have {taps} taps; 0 switches it off")
        self.dim, self.taps, self.silu = dim, taps, silu
        if taps:
            bound = taps**-0.5
            self.weight = nn.Parameter(torch.empty(dim, taps).uniform_(-bound, bound))
            self.bias = nn.Parameter(torch.empty(dim).uniform_(-bound, bound)) if bias else None

    def forward(self, x_BTD: Tensor, tail_BPD: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Filters a segment; returns [B, T, D] and, if a tail was given, the tail after it."""
        if self.taps:
            return short_conv(x_BTD, self.weight, self.bias, tail_BPD, silu=self.silu)
        return F.silu(x_BTD) if self.silu else x_BTD, tail_BPD

    def step(self, x_BD: Tensor, tail_BPD: Tensor) -> tuple[Tensor, Tensor]:
        """Filters one token; returns [B, D] and the new tail."""
        if self.taps:
            return short_conv_step(x_BD, self.weight, self.bias, tail_BPD, silu=self.silu)
        return F.silu(x_BD) if self.silu else x_BD, tail_BPD

    def init_tail(self, batch: int, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
        """The tail before the first token: zeros [B, K-1, D]."""
        return torch.zeros(batch, max(self.taps - 1, 0), self.dim, device=device, dtype=dtype)


def project(x: Tensor, weight: Tensor, widths: tuple[int, ...]) -> tuple[Tensor, ...]:
    """`project_wide` in parts of the given widths."""
    wide = project_wide(x, weight)
    return wide.split((*widths, wide.shape[-1] - sum(widths)), dim=-1)[: len(widths)]


def project_wide(x: Tensor, weight: Tensor) -> Tensor:
    """The map x W^T with spare outputs up to a multiple of eight.

    Tensor cores' fast products want rows that begin on 16 bytes, and so do kernels that read a part.
    """
    spare = -weight.shape[0] % 8
    return F.linear(x, F.pad(weight, (0, 0, 0, spare)) if spare else weight)


def widen(x: Tensor) -> Tensor:
    """To fp32 if narrower: gates, decays and norms are not computed in 16 bits."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def l2_normalize(x: Tensor, eps: float = 1e-6) -> Tensor:
    """Scales the last axis to unit length; eps under the root keeps the gradient finite at zero."""
    wide = widen(x)
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + eps)).to(x.dtype)


def refuse_context(mixer: Mixer, context_BSD: Tensor | None) -> None:
    """Raises ValueError if a mixer that reads its own input only is given a context."""
    if context_BSD is not None:
        raise ValueError(
            f"pattern {mixer.pattern!r} of {mixer.name} reads its own input only; context_BSD belongs to the cross patterns"
        )


def head_count(width: int, head_dim: int, *, what: str) -> int:
    """Number of heads of a given width, which is cut down to the total width where that is smaller.

    Raises:
        ValueError: the head width does not divide the total width.
    """
    head_dim = min(head_dim, width)
    if head_dim < 1 or width % head_dim:
        nearest = min((n for n in range(1, width + 1) if width % n == 0), key=lambda n: abs(n - head_dim))
        raise ValueError(f"head_dim={head_dim} does not divide {what}={width}; the nearest head width that does is {nearest}")
    return width // head_dim


def log_rates(n: int, low: float = 1.0, high: float = 16.0) -> nn.Parameter:
    """Logs of n decay rates drawn uniformly from [low, high] (Dao & Gu 2024)."""
    return nn.Parameter(torch.empty(n).uniform_(low, high).log())


def time_step_bias(n: int, low: float = 1e-3, high: float = 1e-1) -> nn.Parameter:
    """Biases whose softplus is log-uniform in [low, high] (Gu & Dao 2023)."""
    step = torch.empty(n).uniform_(math.log(low), math.log(high)).exp()
    return nn.Parameter(step + torch.log(-torch.expm1(-step)))
