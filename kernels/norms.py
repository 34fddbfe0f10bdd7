"""Layer norms between the layers of a model, alone and two in a row: r + LN1(r), and LN2 of that.

Forward is plain torch, which a compiler fuses with what comes before; backward is one Triton pass that makes the gradients of the
input and of all parameters together and recomputes everything but the input (`kernels.norms_triton`).

Shape legend: B batch, T time, D width, M members (each N rows: its B T tokens), R chosen positions of a sequence.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels._arguments import check_arguments
from kernels.dispatch import pick
from kernels.rows import pick_rows

MOST_WIDTH = 1024
"""Of the Triton form, whose program holds whole rows."""

Affine = tuple[Tensor, Tensor]
"""A norm's weight and bias, [D] each."""


def layer_norm(x_BTD: Tensor, norm: Affine, eps: float = 1e-5) -> Tensor:
    """Layer norm over the last axis (Ba et al. 2016), computed in fp32 or better, in the dtype of x.

    Args:
        x_BTD: input.
        norm: weight and bias.
        eps: added to the variance.

    Raises:
        ValueError: shapes do not match.
    """
    _check(x_BTD, norm)
    if pick("layer_norm", x_BTD, obstacle=_too_wide(x_BTD)) == "triton":
        from kernels.norms_operator import norms_operator

        weight, bias = (p[None] for p in norm)
        return norms_operator(x_BTD.flatten(0, -2)[None], weight, bias, None, None, None, eps)[1].view(x_BTD.shape)
    return normalized(x_BTD, *norm, eps)


def norm_pair(
    r_BTD: Tensor, first: Affine, second: Affine, rows_BR: Tensor | None = None, eps: float = 1e-5
) -> tuple[Tensor, Tensor, Tensor | None]:
    """S = r + LN1(r), and LN2(s).

    Args:
        r_BTD: input.
        first: weight and bias of LN1.
        second: of LN2.
        rows_BR: the only positions at which s itself is wanted, as for `kernels.rows.pick_rows`; None for all.
        eps: added to variances.

    Returns:
        s, [B, T, D] or [B, R, D], LN2(s), [B, T, D], and that once more at the chosen positions, [B, R, D], so that what reads
        it only there need not spread its gradient over all; in the dtype of r.

    Raises:
        ValueError: shapes do not match.
    """
    _check(r_BTD, first)
    _check(r_BTD, second)
    if pick("norm_pair", r_BTD, obstacle=_too_wide(r_BTD)) == "triton":
        from kernels.norms_operator import norms_operator

        weights = [p[None] for p in (*first, *second)]
        flat_1ND = r_BTD.flatten(0, -2)[None]
        if rows_BR is None:
            s, y, _ = norms_operator(flat_1ND, *weights, None, eps)
            return s.view(r_BTD.shape), y.view(r_BTD.shape), None
        s, y, picked = norms_operator(flat_1ND, *weights, rows_BR[None], eps)
        return s.view(*rows_BR.shape, -1), y.view(r_BTD.shape), picked.view(*rows_BR.shape, -1)
    s_BTD = r_BTD + normalized(r_BTD, *first, eps)
    y_BTD = normalized(s_BTD, *second, eps)
    return (s_BTD, y_BTD, None) if rows_BR is None else (pick_rows(s_BTD, rows_BR), y_BTD, pick_rows(y_BTD, rows_BR))


def normalized(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """The definition; parameters broadcast against x."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (F.layer_norm(wide, x.shape[-1:], eps=eps) * weight + bias).to(x.dtype)


def _too_wide(x: Tensor) -> str | None:
    return f"width {x.shape[-1]} is above {MOST_WIDTH}" if x.shape[-1] > MOST_WIDTH else None


def _check(x: Tensor, norm: Affine) -> None:
    check_arguments(x, {name: (p, x.shape[-1:]) for name, p in zip(("weight", "bias"), norm, strict=True)})
