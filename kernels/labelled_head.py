"""A linear head and the cross entropy of its labelled rows in one operation, which owns the logits.

Nobody else reads the logits of a training step, so the pass that makes losses of them writes their gradients over them: they go
through memory five times instead of six, and once instead of twice into it.

Shape legend: R rows, D width, V classes, M members.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels._arguments import INTEGERS, check_arguments
from kernels._members import fold_members
from kernels.backends import TWO
from kernels.cross_entropy import IGNORED, labelled_cross_entropy
from kernels.dispatch import pick
from kernels.values import check_labels, is_checking


def labelled_head(h_RD: Tensor, weight_VD: Tensor, labels_R: Tensor) -> tuple[Tensor, Tensor]:
    """`labelled_cross_entropy` of h W^T.

    Args:
        h_RD: hidden rows.
        weight_VD: the head; taken in the dtype of h.
        labels_R: as for `labelled_cross_entropy`.

    Returns:
        The losses [R], in fp32 (fp64 for fp64 rows), and int64 predictions [R], which carry no gradient.

    Raises:
        ValueError: shapes do not match, or labels are not integers.
    """
    if h_RD.ndim != 2 or weight_VD.ndim != 2:
        raise ValueError(f"h has shape {tuple(h_RD.shape)} and weight {tuple(weight_VD.shape)}; it must be [R, D] and [V, D]")
    rows, width = h_RD.shape
    expected = {"weight": (weight_VD, (weight_VD.shape[0], width)), "labels": (labels_R, (rows,))}
    check_arguments(h_RD, expected, first="h", dtypes={"labels": INTEGERS}, values=False)
    if is_checking():
        check_labels("labels", labels_R, weight_VD.shape[0], IGNORED)
    if pick("labelled_head", h_RD, backends=TWO) == "triton":
        loss_MR, predicted_MR, _ = _head(h_RD[None], weight_VD.to(h_RD.dtype)[None], labels_R[None])
        return loss_MR[0], predicted_MR[0]
    return labelled_cross_entropy(F.linear(h_RD, weight_VD.to(h_RD.dtype)), labels_R)


@torch.library.custom_op("mixer_bench::labelled_head", mutates_args=())
def _head(h_MRD: Tensor, weight_MVD: Tensor, labels_MR: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Losses, predictions, and gradients of the losses by the logits."""
    from kernels.between.cross_entropy_triton import in_place

    logits_MRV = torch.bmm(h_MRD, weight_MVD.mT)
    with torch.cuda.device_of(h_MRD):  # Triton launches on the current device
        loss_R, predicted_R = in_place(logits_MRV.flatten(0, 1), labels_MR.flatten(), IGNORED)
    return loss_R.view(labels_MR.shape), predicted_R.view(labels_MR.shape), logits_MRV


@_head.register_fake
def _(h_MRD: Tensor, weight_MVD: Tensor, labels_MR: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    loss_MR = h_MRD.new_empty(labels_MR.shape, dtype=torch.float32)
    return loss_MR, labels_MR.new_empty(labels_MR.shape, dtype=torch.int64), h_MRD.new_empty(*labels_MR.shape, weight_MVD.shape[1])


def _save(ctx, inputs: tuple[Tensor, Tensor, Tensor], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(output[2], *inputs[:2])


def _differentiate(ctx, dloss_MR: Tensor, _dpredicted: None, _dlogits: None) -> tuple[Tensor, Tensor, None]:
    """The loss's gradient scales the narrow factors instead of the logits."""
    dlogits_MRV, h_MRD, weight_MVD = ctx.saved_tensors
    dh_MRD = (torch.bmm(dlogits_MRV, weight_MVD) * dloss_MR[..., None]).to(h_MRD.dtype)
    return dh_MRD, torch.bmm(dlogits_MRV.mT, (h_MRD * dloss_MR[..., None]).to(h_MRD.dtype)), None


_head.register_autograd(_differentiate, setup_context=_save)


@_head.register_vmap
def _(info, in_dims: tuple[int | None, ...], *arguments: Tensor) -> tuple[tuple[Tensor, ...], tuple[int, int, int]]:
    folded = (fold_members(t, axis, info.batch_size) for t, axis in zip(arguments, in_dims, strict=True))
    return tuple(t.unflatten(0, (info.batch_size, -1)) for t in _head(*folded)), (0, 0, 0)
