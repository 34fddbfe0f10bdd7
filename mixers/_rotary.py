"""Rotary position embedding (Su et al. 2021, RoFormer, eq. 34), half-split layout as in GPT-NeoX."""

from __future__ import annotations

import torch
from torch import Tensor

POSITIONS = ("none", "rotary", "learned")
"""Position encodings of the attention mixers."""


def check_positions(positions: str, head_dim: int, allowed: tuple[str, ...]) -> None:
    """Refuses an unknown position encoding, or rotary on an odd head width.

    Raises:
        ValueError: as said.
    """
    if positions not in allowed:
        raise ValueError(f"positions={positions!r} is not known here; choose one of {', '.join(allowed)}")
    if positions == "rotary" and head_dim % 2:
        raise ValueError(f"positions='rotary' rotates pairs of features, but the head width {head_dim} is odd; change n_heads")


def rotary(x_BHTK: Tensor, position: Tensor, base: float = 10000.0) -> Tensor:
    """Rotates pairs of features by angles that grow with the position.

    Args:
        x_BHTK: queries or keys, K even.
        position: int64, [T] or, if it differs between sequences, [B, T].
        base: wavelength base.

    Returns:
        Same shape and dtype as `x_BHTK`.
    """
    half = x_BHTK.shape[-1] // 2
    wide = torch.promote_types(x_BHTK.dtype, torch.float32)
    frequency = base ** (-torch.arange(half, device=x_BHTK.device, dtype=wide) / half)
    angle = position[..., None].to(wide) * frequency
    if position.ndim == 2:
        angle = angle[:, None]
    cos, sin = angle.cos(), angle.sin()
    a, b = x_BHTK.to(wide).chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x_BHTK.dtype)
