"""Norms between the layers of a model: a layer norm alone, two in a row (r + LN1(r), and LN2 of that), an RMS norm of a stream.

Forward is plain torch, which a compiler fuses with what comes before; backward is one Triton pass that makes the gradients of the
input and of all parameters together and recomputes everything but the input (`kernels.between.norms_triton`).

Shape legend: B batch, T time, D width, M members (each N rows: its B T tokens), R chosen positions of a sequence.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels._arguments import INDICES, check_arguments, check_axes, check_rank
from kernels.backends import TWO
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
    check_arguments(x_BTD, {name: (p, x_BTD.shape[-1:]) for name, p in zip(("weight", "bias"), norm, strict=True)})
    if pick("layer_norm", x_BTD, obstacle=_too_wide(x_BTD), backends=TWO) == "triton":
        from kernels.between.norms_operator import norms_operator

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
    check_axes("r", r_BTD, "B T D")
    if rows_BR is not None:
        check_rank("rows", rows_BR, "B R")
    batch, _, width = r_BTD.shape
    named = {"first": first, "second": second}
    expected = {f"{name}[{i}]": (p, (width,)) for name, norm in named.items() for i, p in enumerate(norm)}
    rows = {} if rows_BR is None else {"rows": (rows_BR, (batch, rows_BR.shape[-1]))}
    check_arguments(r_BTD, expected | rows, first="r", dtypes={"rows": INDICES})
    if pick("norm_pair", r_BTD, obstacle=_too_wide(r_BTD), backends=TWO) == "triton":
        from kernels.between.norms_operator import norms_operator

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


def stream_norm(r_BTD: Tensor, weight_D: Tensor, rows_BR: Tensor, eps: float = 1e-5) -> tuple[Tensor, Tensor, Tensor]:
    """A residual stream at chosen positions, its RMS norm at all, and that at the chosen ones.

    Args:
        r_BTD: the stream.
        weight_D: of the norm.
        rows_BR: the only positions at which the stream itself is wanted, as for `kernels.rows.pick_rows`.
        eps: added to the mean square.

    Returns:
        [B, R, D], [B, T, D] and [B, R, D] in the dtype of r.

    Raises:
        ValueError: shapes do not match.
    """
    check_axes("r", r_BTD, "B T D")
    check_rank("rows", rows_BR, "B R")
    others = {"weight": (weight_D, r_BTD.shape[-1:]), "rows": (rows_BR, (r_BTD.shape[0], rows_BR.shape[-1]))}
    check_arguments(r_BTD, others, first="r", dtypes={"rows": INDICES})
    if pick("stream_norm", r_BTD, obstacle=_too_wide(r_BTD), backends=TWO) == "triton":
        from kernels.between.stream_norm_operator import stream_norm_operator

        r, y, picked = stream_norm_operator(r_BTD.flatten(0, -2)[None], weight_D[None], rows_BR[None], eps)
        return r.view(*rows_BR.shape, -1), y.view(r_BTD.shape), picked.view(*rows_BR.shape, -1)
    y_BTD = rms_normalized(r_BTD, weight_D, eps)
    return pick_rows(r_BTD, rows_BR), y_BTD, pick_rows(y_BTD, rows_BR)


def rms_normalized(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The definition; the weight broadcasts against x."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight).to(x.dtype)


def normalized(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """The definition; parameters broadcast against x."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (F.layer_norm(wide, x.shape[-1:], eps=eps) * weight + bias).to(x.dtype)


def _too_wide(x: Tensor) -> str | None:
    return f"width {x.shape[-1]} is above {MOST_WIDTH}" if x.shape[-1] > MOST_WIDTH else None
