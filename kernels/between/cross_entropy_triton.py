"""Cross entropy of rows in Triton: one program a row forward, one a row and block of classes backward.

Bytes: forward reads the logits, backward reads them and writes as many; nothing else counts. One exponential an element
each way, which the copy hides.

Shape legend: R rows, V classes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = tl.constexpr(1.4426950408889634)
LARGEST_BLOCK = 8192
IN_PLACE_BLOCK = 4096
"""Of the form that goes over a row twice: the second time from the cache, so that more rows in flight beat a row in registers."""


def block_and_warps(n_classes: int) -> tuple[int, int]:
    """Classes that a program holds at a time, and its warps: 8 to 32 elements a thread."""
    block = min(LARGEST_BLOCK, max(32, triton.next_power_of_2(n_classes)))
    return block, max(1, min(8, block // 256))


@triton.jit
def _walk_row(row_ptr, n_classes, BLOCK: tl.constexpr):
    """A row's maximum, the class that has it, and the sum of exponentials below it."""
    peak = float("-inf")
    predicted = 0
    total = 0.0
    for start in range(0, n_classes, BLOCK):
        column_V = start + tl.arange(0, BLOCK)
        x_V = tl.load(row_ptr + column_V, mask=column_V < n_classes, other=float("-inf")).to(tl.float32)
        block_peak, place = tl.max(x_V, axis=0, return_indices=True)
        predicted = tl.where(block_peak > peak, start + place, predicted)
        higher = tl.maximum(peak, block_peak)
        # a row of -inf so far has no finite maximum to subtract
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp2((peak - shift) * LOG2_E) + tl.sum(tl.exp2((x_V - shift) * LOG2_E), axis=0)
        peak = higher
    return peak, predicted, total


@triton.jit
def cross_entropy_forward(logits_ptr, labels_ptr, loss_ptr, predicted_ptr, logsumexp_ptr, n_classes, ignored, BLOCK: tl.constexpr):
    """Loss, prediction and the log of the sum of exponentials of one row."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * n_classes
    peak, predicted, total = _walk_row(row_ptr, n_classes, BLOCK)
    above_peak = tl.log(total)
    label = tl.load(labels_ptr + row)
    exists = (label >= 0) & (label < n_classes)
    own = tl.load(row_ptr + label, mask=exists, other=float("nan")).to(tl.float32)
    tl.store(loss_ptr + row, tl.where(label == ignored, 0.0, above_peak + (peak - own)))
    tl.store(predicted_ptr + row, predicted.to(tl.int64))
    tl.store(logsumexp_ptr + row, peak + above_peak)


@triton.jit
def cross_entropy_backward(
    dloss_ptr, dloss_stride, logits_ptr, labels_ptr, logsumexp_ptr, dlogits_ptr, n_classes, ignored, BLOCK: tl.constexpr
):
    """(softmax - one hot) dloss for one block of a row; a row without a label is not read."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row)
    labelled = label != ignored
    exists = (label >= 0) & (label < n_classes)
    dloss = tl.where(exists, tl.load(dloss_ptr + row * dloss_stride).to(tl.float32), float("nan"))
    logsumexp = tl.load(logsumexp_ptr + row)
    column_V = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside_V = column_V < n_classes
    x_V = tl.load(logits_ptr + row * n_classes + column_V, mask=inside_V & labelled, other=0.0).to(tl.float32)
    softmax_V = tl.exp2((x_V - logsumexp) * LOG2_E)
    d_V = tl.where(labelled, (softmax_V - tl.where(column_V == label, 1.0, 0.0)) * dloss, 0.0)
    tl.store(dlogits_ptr + row * n_classes + column_V, d_V.to(dlogits_ptr.dtype.element_ty), mask=inside_V)


@triton.jit
def cross_entropy_in_place(logits_ptr, labels_ptr, loss_ptr, predicted_ptr, n_classes, ignored, BLOCK: tl.constexpr):
    """Loss and prediction of one row, whose logits become softmax - one hot, or 0 without a label."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * n_classes
    label = tl.load(labels_ptr + row)
    exists = (label >= 0) & (label < n_classes)
    own = tl.load(row_ptr + label, mask=exists, other=float("nan")).to(tl.float32)
    peak, predicted, total = _walk_row(row_ptr, n_classes, BLOCK)
    logsumexp = peak + tl.log(total)
    labelled = label != ignored
    tl.store(loss_ptr + row, tl.where(labelled, logsumexp - own, 0.0))
    tl.store(predicted_ptr + row, predicted.to(tl.int64))
    scale = tl.where(exists, 1.0, float("nan"))
    tl.debug_barrier()  # the own logit is read before another thread writes over it
    for start in range(0, n_classes, BLOCK):  # from the cache
        column_V = start + tl.arange(0, BLOCK)
        x_V = tl.load(row_ptr + column_V, mask=column_V < n_classes, other=float("-inf")).to(tl.float32)
        softmax_V = tl.exp2((x_V - logsumexp) * LOG2_E)
        d_V = tl.where(labelled, (softmax_V - tl.where(column_V == label, 1.0, 0.0)) * scale, 0.0)
        tl.store(row_ptr + column_V, d_V.to(logits_ptr.dtype.element_ty), mask=column_V < n_classes)


def in_place(logits_RV: Tensor, labels_R: Tensor, ignored: int) -> tuple[Tensor, Tensor]:
    """Losses in fp32 and int64 predictions, [R] each; the contiguous logits become their gradients."""
    rows, classes = logits_RV.shape
    loss_R = logits_RV.new_empty(rows, dtype=torch.float32)
    predicted_R = logits_RV.new_empty(rows, dtype=torch.int64)
    block = min(block_and_warps(classes)[0], IN_PLACE_BLOCK)
    warps = max(1, min(4, block // 256))
    if rows:
        cross_entropy_in_place[(rows,)](
            logits_RV, labels_R.contiguous(), loss_R, predicted_R, classes, ignored, BLOCK=block, num_warps=warps
        )
    return loss_R, predicted_R


def forward(logits_RV: Tensor, labels_R: Tensor, ignored: int) -> tuple[Tensor, Tensor, Tensor]:
    """Losses [R] and logs of the sum of exponentials [R] in fp32, with int64 predictions between them; contiguous inputs."""
    rows, classes = logits_RV.shape
    loss_R, logsumexp_R = (logits_RV.new_empty(rows, dtype=torch.float32) for _ in range(2))
    predicted_R = logits_RV.new_empty(rows, dtype=torch.int64)
    block, warps = block_and_warps(classes)
    if rows:
        cross_entropy_forward[(rows,)](
            logits_RV, labels_R, loss_R, predicted_R, logsumexp_R, classes, ignored, BLOCK=block, num_warps=warps
        )
    return loss_R, predicted_R, logsumexp_R


def backward(dloss_R: Tensor, logits_RV: Tensor, labels_R: Tensor, logsumexp_R: Tensor, ignored: int) -> Tensor:
    """The gradient of the logits [R, V]; `dloss_R` may be an expanded scalar, the rest is contiguous."""
    rows, classes = logits_RV.shape
    dlogits_RV = logits_RV.new_empty(rows, classes)
    block, warps = block_and_warps(classes)
    if rows:
        cross_entropy_backward[(rows, -(-classes // block))](
            dloss_R,
            dloss_R.stride(0),
            logits_RV,
            labels_R,
            logsumexp_R,
            dlogits_RV,
            classes,
            ignored,
            BLOCK=block,
            num_warps=warps,
        )
    return dlogits_RV
