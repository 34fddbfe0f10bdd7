"""Complex numbers as pairs (real, imaginary) on the last axis: compilers for GPUs have no code for complex ones."""

from __future__ import annotations

import torch
from torch import Tensor


def times(a: Tensor, b: Tensor) -> Tensor:
    """Products."""
    return torch.stack((a[..., 0] * b[..., 0] - a[..., 1] * b[..., 1], a[..., 0] * b[..., 1] + a[..., 1] * b[..., 0]), -1)
