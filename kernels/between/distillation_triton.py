"""Distillation of rows in Triton: one program a row, which walks it twice.

Bytes: student and teacher are read twice, the second time partly from L2, and the gradient is written once. Four
exponentials an element and walk, two where the temperature is 1; the copy hides them.

Shape legend: R rows, V classes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = tl.constexpr(1.4426950408889634)
BLOCK = 4096
WARPS = 8


@triton.jit
def _write_gradient(
    student_ptr, teacher_ptr, gradient_ptr, n_classes, label, labelled, logsumexp, warm_logsumexp, teacher_logsumexp,
    kl, ce, temperature, scale, HAS_TEACHER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The second walk: the gradient of a row, zero where it has no label."""
    for start in range(0, n_classes, BLOCK):
        column_V = start + tl.arange(0, BLOCK)
        inside_V = column_V < n_classes
        s_V = tl.load(student_ptr + column_V, mask=inside_V & labelled, other=0.0).to(tl.float32)
        d_V = ce * (tl.exp2((s_V - logsumexp) * LOG2_E) - tl.where(column_V == label, 1.0, 0.0))
        if HAS_TEACHER:
            t_V = tl.load(teacher_ptr + column_V, mask=inside_V & labelled, other=0.0).to(tl.float32)
            p_V = tl.exp2((s_V * scale - warm_logsumexp) * LOG2_E)
            d_V += kl * temperature * (p_V - tl.exp2((t_V * scale - teacher_logsumexp) * LOG2_E))
        d_V = tl.where(labelled, d_V, 0.0)
        tl.store(gradient_ptr + column_V, d_V.to(gradient_ptr.dtype.element_ty), mask=inside_V)


@triton.jit
def distillation_kernel(
    student_ptr,
    teacher_ptr,
    labels_ptr,
    losses_ptr,
    gradient_ptr,
    n_classes,
    kl,
    ce,
    temperature,
    ignored,
    HAS_TEACHER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """First walk: maxima, sums of exponentials, and the mean difference of logits under the teacher; second: the gradient."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row)
    labelled = label != ignored
    exists = (label >= 0) & (label < n_classes)
    student_ptr += row * n_classes
    teacher_ptr += row * n_classes
    gradient_ptr += row * n_classes
    scale = 1.0 / temperature
    peak, total, warm = float("-inf"), 0.0, 0.0
    teacher_peak, teacher_total, gap = float("-inf"), 0.0, 0.0
    for start in range(0, n_classes, BLOCK):
        column_V = start + tl.arange(0, BLOCK)
        inside_V = column_V < n_classes
        s_V = tl.load(student_ptr + column_V, mask=inside_V, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(peak, tl.max(s_V, axis=0))
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp2((peak - shift) * LOG2_E) + tl.sum(tl.exp2((s_V - shift) * LOG2_E), axis=0)
        if HAS_TEACHER:
            warm *= tl.exp2((peak - shift) * (scale * LOG2_E))
            warm += tl.sum(tl.exp2((s_V - shift) * (scale * LOG2_E)), axis=0)
            t_V = tl.load(teacher_ptr + column_V, mask=inside_V, other=float("-inf")).to(tl.float32)
            teacher_higher = tl.maximum(teacher_peak, tl.max(t_V, axis=0))
            teacher_shift = tl.where(teacher_higher == float("-inf"), 0.0, teacher_higher)
            older = tl.exp2((teacher_peak - teacher_shift) * (scale * LOG2_E))
            q_V = tl.exp2((t_V - teacher_shift) * (scale * LOG2_E))
            teacher_total = teacher_total * older + tl.sum(q_V, axis=0)
            further_V = tl.where(inside_V, t_V, 0.0) - tl.where(inside_V, s_V, 0.0)
            gap = gap * older + tl.sum(q_V * further_V, axis=0)
            teacher_peak = teacher_higher
        peak = higher
    logsumexp = peak + tl.log(total)
    own = tl.load(student_ptr + label, mask=exists, other=float("nan")).to(tl.float32)
    warm_logsumexp, teacher_logsumexp = 0.0, 0.0
    divergence = 0.0
    if HAS_TEACHER:
        warm_logsumexp = peak * scale + tl.log(warm)
        teacher_logsumexp = teacher_peak * scale + tl.log(teacher_total)
        divergence = temperature * temperature * (gap / teacher_total * scale - teacher_logsumexp + warm_logsumexp)
    tl.store(losses_ptr + 2 * row, tl.where(labelled, divergence, 0.0))
    tl.store(losses_ptr + 2 * row + 1, tl.where(labelled, logsumexp - own, 0.0))
    _write_gradient(
        student_ptr, teacher_ptr, gradient_ptr, n_classes, label, labelled, logsumexp, warm_logsumexp, teacher_logsumexp,
        kl, ce, temperature, scale, HAS_TEACHER, BLOCK,
    )  # fmt: skip


def rows(
    student_RV: Tensor,
    teacher_RV: Tensor | None,
    labels_R: Tensor,
    kl: float,
    ce: float,
    temperature: float,
    dtype: torch.dtype,
    ignored: int,
) -> tuple[Tensor, Tensor]:
    """Losses [R, 2] in fp32 and the gradient [R, V]; see `kernels.distillation.distillation_rows`."""
    n_rows, classes = student_RV.shape
    student_RV = student_RV.contiguous()
    teacher = student_RV if teacher_RV is None else teacher_RV.contiguous()
    losses_R2 = student_RV.new_empty(n_rows, 2, dtype=torch.float32)
    gradient_RV = student_RV.new_empty(n_rows, classes, dtype=dtype)
    block = min(BLOCK, max(32, triton.next_power_of_2(classes)))
    if n_rows:
        distillation_kernel[(n_rows,)](
            student_RV,
            teacher,
            labels_R.contiguous(),
            losses_R2,
            gradient_RV,
            classes,
            float(kl),
            float(ce),
            float(temperature),
            ignored,
            HAS_TEACHER=teacher_RV is not None,
            BLOCK=block,
            num_warps=max(1, min(WARPS, block // 256)),
        )
    return losses_R2, gradient_RV
