"""Distillation at the output layer: divergence from a teacher and cross entropy of rows of logits, with their gradient.

With a large vocabulary these rows are the largest tensors of a training step, so loss and gradient are computed together,
reading student and teacher twice and writing once.

Shape legend: R rows, V classes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels._arguments import INDICES, check_arguments
from kernels.backends import TWO
from kernels.dispatch import pick
from kernels.values import check_labels, is_checking

IGNORED = -100
"""The label of a row that has none: its losses and its gradient are zero."""


def distillation_rows(
    student_RV: Tensor,
    teacher_RV: Tensor | None,
    labels_R: Tensor,
    *,
    kl: float,
    ce: float,
    temperature: float = 1.0,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Losses of each row, and the gradient of kl * T^2 KL(teacher || student) + ce * cross entropy with the label.

    Args:
        student_RV: logits; computed in fp32 or better.
        teacher_RV: the teacher's, of the same dtype; None leaves the divergence out.
        labels_R: int64, 0 to V - 1 or `IGNORED`.
        kl: weight of the divergence in the gradient.
        ce: weight of the cross entropy in the gradient.
        temperature: T of both distributions in the divergence (Hinton et al. 2015).
        dtype: of the gradient; None for that of the logits.

    Returns:
        [R, 2] in fp32 or better, T^2 KL and cross entropy without their weights, and the gradient [R, V]. Neither carries a
        gradient of its own.

    Raises:
        ValueError: shapes do not match.
    """
    if student_RV.dim() != 2:
        raise ValueError(f"logits have shape {tuple(student_RV.shape)}; distillation takes [rows, classes]")
    shape = tuple(student_RV.shape)
    expected = {"labels": (labels_R, shape[:1]), "teacher": (teacher_RV, shape)}
    check_arguments(student_RV, expected, first="logits", dtypes={"labels": INDICES}, values=False)
    if is_checking():
        check_labels("labels", labels_R, shape[1], IGNORED)
    dtype = student_RV.dtype if dtype is None else dtype
    with torch.no_grad():
        if pick("distillation_rows", student_RV, backends=TWO) == "triton":
            from kernels.between.distillation_triton import rows

            with torch.cuda.device_of(student_RV):  # Triton launches on the current device
                return rows(student_RV, teacher_RV, labels_R, kl, ce, temperature, dtype, IGNORED)
        return _torch_rows(student_RV, teacher_RV, labels_R, kl, ce, temperature, dtype)


def _torch_rows(
    student: Tensor, teacher: Tensor | None, labels: Tensor, kl: float, ce: float, temperature: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(student.dtype, torch.float32)
    known_R1 = (labels != IGNORED)[:, None]
    label_R1 = labels.clamp_min(0)[:, None]
    log_p = student.to(wide).log_softmax(-1)
    cross = -log_p.gather(1, label_R1)
    gradient = ce * log_p.exp()
    gradient.scatter_add_(1, label_R1, torch.full_like(cross, -ce))
    divergence = torch.zeros_like(cross)
    if teacher is not None:
        log_q = (teacher.to(wide) / temperature).log_softmax(-1)
        log_s = log_p if temperature == 1 else (student.to(wide) / temperature).log_softmax(-1)
        q = log_q.exp()
        divergence = temperature**2 * (q * (log_q - log_s)).sum(-1, keepdim=True)
        gradient += kl * temperature * (log_s.exp() - q)
    return torch.cat((divergence, cross), 1) * known_R1, (gradient * known_R1).to(dtype)
