"""Cross entropy of labelled rows: loss, prediction and gradient without a wide copy of the logits.

The logits of a large vocabulary are the largest tensors of a small model. They are read once forward and once backward, in
their own dtype; what is kept between the two is one number a row, the log of the sum of exponentials.

Shape legend: R rows, V classes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels._arguments import INTEGERS, check_arguments
from kernels._members import fold_members
from kernels._operator import operator
from kernels.backends import TWO
from kernels.dispatch import pick
from kernels.values import check_labels, is_checking

IGNORED = -100
"""The label of a row that has none: its loss and its gradient are zero."""


def labelled_cross_entropy(logits_RV: Tensor, labels_R: Tensor) -> tuple[Tensor, Tensor]:
    """Cross entropy of each row with its label, and the most likely class.

    Args:
        logits_RV: any floating dtype; computed in fp32 or better.
        labels_R: integers, 0 to V - 1 or `IGNORED`. Values are not looked at before the launch: the Triton form answers any
            other label with a NaN loss.

    Returns:
        The losses [R], in fp32 (fp64 for fp64 logits), and int64 predictions [R], which carry no gradient.

    Raises:
        ValueError: shapes do not match, or labels are not integers.
    """
    if logits_RV.dim() != 2:
        raise ValueError(f"logits have shape {tuple(logits_RV.shape)}; cross entropy takes [rows, classes]")
    check_arguments(
        logits_RV, {"labels": (labels_R, logits_RV.shape[:1])}, first="logits", dtypes={"labels": INTEGERS}, values=False
    )
    if is_checking():
        check_labels("labels", labels_R, logits_RV.shape[1], IGNORED)
    if pick("labelled_cross_entropy", logits_RV, backends=TWO) == "triton":
        loss_R, predicted_R, _ = _rows(logits_RV, labels_R)
        return loss_R, predicted_R
    wide_RV = logits_RV.to(torch.promote_types(logits_RV.dtype, torch.float32))
    loss_R = F.cross_entropy(wide_RV, labels_R.long(), ignore_index=IGNORED, reduction="none")
    return loss_R, logits_RV.detach().argmax(-1)


@operator("mixer_bench::cross_entropy")
def _rows(logits_RV: Tensor, labels_R: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Losses, predictions and logs of the sum of exponentials."""
    from kernels.between.cross_entropy_triton import forward

    with torch.cuda.device_of(logits_RV):  # Triton launches on the current device
        return forward(logits_RV.contiguous(), labels_R.contiguous(), IGNORED)


@operator("mixer_bench::cross_entropy_backward")
def _rows_backward(dloss_R: Tensor, logits_RV: Tensor, labels_R: Tensor, logsumexp_R: Tensor) -> Tensor:
    """The gradient of the logits, in their dtype."""
    from kernels.between.cross_entropy_triton import backward

    with torch.cuda.device_of(dloss_R):  # Triton launches on the current device
        return backward(dloss_R, logits_RV.contiguous(), labels_R.contiguous(), logsumexp_R.contiguous(), IGNORED)


@_rows.register_fake
def _(logits_RV: Tensor, labels_R: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows = logits_RV.shape[:1]
    loss_R, logsumexp_R = (logits_RV.new_empty(rows, dtype=torch.float32) for _ in range(2))
    return loss_R, logits_RV.new_empty(rows, dtype=torch.int64), logsumexp_R


@_rows_backward.register_fake
def _(dloss_R: Tensor, logits_RV: Tensor, labels_R: Tensor, logsumexp_R: Tensor) -> Tensor:
    return logits_RV.new_empty(logits_RV.shape)


def _save(ctx, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, output[2])


def _differentiate(ctx, dloss_R: Tensor, _dpredicted: None, _dlogsumexp: None) -> tuple[Tensor, None]:
    return _rows_backward(dloss_R, *ctx.saved_tensors), None


_rows.register_autograd(_differentiate, setup_context=_save)


@_rows.register_vmap
def _(
    info, in_dims: tuple[int | None, int | None], logits_RV: Tensor, labels_R: Tensor
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    members = info.batch_size
    folded = (fold_members(tensor, axis, members) for tensor, axis in zip((logits_RV, labels_R), in_dims, strict=True))
    return tuple(out.unflatten(0, (members, -1)) for out in _rows(*folded)), (0, 0, 0)
