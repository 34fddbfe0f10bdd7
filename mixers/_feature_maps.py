"""Feature maps phi of linear attention, whose inner products stand in for exp(q . k).

Shape legend: H heads, K width of a head before the map, F features.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import taylor
from mixers._layers import widen

FEATURE_MAPS = ("elu", "relu", "t2r", "hedgehog", "taylor2", "identity")


def make_feature_map(kind: str, n_heads: int, dim: int, *, columns: int | None = None) -> nn.Module:
    """A module from [..., H, K] to [..., H, F] with an attribute `features`, F.

    Args:
        kind: one of `FEATURE_MAPS`.
        n_heads: H.
        dim: K.
        columns: of a Hedgehog map's matrix W; None means K.

    Raises:
        ValueError: no such map.
    """
    if kind == "t2r":
        return T2R(n_heads, dim)
    if kind == "hedgehog":
        return Hedgehog(n_heads, dim, columns or dim)
    if kind == "taylor2":
        return Taylor2(dim)
    if kind in ("elu", "relu", "identity"):
        return Pointwise(kind, dim)
    raise ValueError(f"there is no feature map {kind!r}; there are {', '.join(FEATURE_MAPS)}")


class Pointwise(nn.Module):
    """elu(x) + 1 (Katharopoulos et al. 2020, eq. 7), relu(x), or x K^(-1/4), the linear part of softmax's kernel."""

    def __init__(self, kind: str, dim: int) -> None:
        super().__init__()
        self.kind, self.features = kind, dim

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "identity":
            return x * self.features**-0.25
        return F.elu(x) + 1 if self.kind == "elu" else F.relu(x)


class T2R(nn.Module):
    """relu(x W + b), learned per head (Kasai et al. 2021, eq. 4), here with as many features as inputs."""

    def __init__(self, n_heads: int, dim: int) -> None:
        super().__init__()
        self.features = dim
        bound = dim**-0.5
        self.weight = nn.Parameter(torch.empty(n_heads, dim, dim).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(n_heads, dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(per_head(x, self.weight) + self.bias)


class Hedgehog(nn.Module):
    """[softmax(x W), softmax(-x W)], learned per head and starting from W = I (Zhang et al. 2024, section 4.2).

    With fewer columns than K, as in LoLCATs, W starts at random.
    """

    def __init__(self, n_heads: int, dim: int, columns: int) -> None:
        super().__init__()
        self.features = 2 * columns
        bound = dim**-0.5
        start = (
            torch.eye(dim).repeat(n_heads, 1, 1) if columns == dim else torch.empty(n_heads, dim, columns).uniform_(-bound, bound)
        )
        self.weight = nn.Parameter(start)

    def forward(self, x: Tensor) -> Tensor:
        projected = widen(per_head(x, self.weight))
        return torch.cat((projected.softmax(-1), (-projected).softmax(-1)), dim=-1)


class Taylor2(nn.Module):
    """Second-order Taylor features of exp (`kernels.taylor`): phi(q) . phi(k) = 1 + s + s^2 / 2 with s = q . k / sqrt(K)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.features = taylor.n_features(dim)

    def forward(self, x: Tensor) -> Tensor:
        return taylor.features(x)


def per_head(x: Tensor, weight_HKF: Tensor) -> Tensor:
    """[..., H, K] times a matrix for each head: [..., H, F]."""
    return torch.einsum("...hk,hkf->...hf", x, weight_HKF)
