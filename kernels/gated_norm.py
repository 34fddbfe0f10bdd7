"""The output gate of a state space block: x silu(gate), with an RMS norm of that in Mamba-2 (Dao & Gu 2024, section 7).

Forward is plain torch, which a compiler fuses with what comes before; backward is one Triton pass that makes the gradients of
the input, the gate and the norm's weight together (`kernels.between.gated_norm_triton`), where a compiler takes four.

Shape legend: B batch, T time, D width, M members (each N rows: its B T tokens).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels._arguments import check_arguments
from kernels.backends import TWO
from kernels.dispatch import pick
from kernels.norms import rms_normalized

MOST_WIDTH = 1024
"""Of the Triton form, whose program holds whole rows."""


def gated_norm(x: Tensor, gate: Tensor, weight_D: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """The RMS norm of x silu(gate) over the last axis, or without a weight that product alone, in the dtype of x.

    Args:
        x: input, [..., D].
        gate: before its SiLU, [..., D].
        weight_D: of the norm; None for no norm.
        eps: added to the mean square.

    Raises:
        ValueError: shapes, dtypes or devices do not match.
    """
    named = {"gate": (gate, x.shape), "weight": (weight_D, x.shape[-1:])}
    check_arguments(x, named)
    too_wide = f"width {x.shape[-1]} is above {MOST_WIDTH}" if x.shape[-1] > MOST_WIDTH else None
    if pick("gated_norm", x, obstacle=too_wide, backends=TWO) == "triton":
        from kernels.between.gated_norm_operator import gated_norm_operator

        flat = (tensor.reshape(1, -1, x.shape[-1]) for tensor in (x, gate))
        return gated_norm_operator(*flat, None if weight_D is None else weight_D[None], eps).view(x.shape)
    return gated(x, gate, weight_D, eps)


def gated(x: Tensor, gate: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """The definition; the weight broadcasts against x."""
    wide = torch.promote_types(x.dtype, torch.float32)
    product = x.to(wide) * F.silu(gate.to(wide))
    return (product if weight is None else rms_normalized(product, weight, eps)).to(x.dtype)
