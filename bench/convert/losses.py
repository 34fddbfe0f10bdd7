"""Losses of a conversion: distances of captured layers, and the distribution over the next token without its full matrix.

Shape legend: N tokens, D width, V vocabulary, B batch, T time, H heads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.distillation import IGNORED, distillation_rows

CHUNK_BYTES = 1 << 29
"""Bytes of the student's logits that exist at a time, some 2,730 tokens with 49k classes; the teacher's are as many."""
MIN_CHUNK = 128


def layer_loss(kind: str, student: Tensor, teacher: Tensor) -> Tensor:
    """Distance of a layer's output from the teacher's, in fp32.

    Args:
        kind: mse, the mean over elements; or l2, the mean over tokens of the Euclidean norm.
        student: [B, T, D].
        teacher: the same shape.
    """
    difference = student.float() - teacher.float()
    return difference.square().mean() if kind == "mse" else difference.norm(dim=-1).mean()


def weights_loss(kind: str, student_BHTT: Tensor, teacher_BHTT: Tensor) -> Tensor:
    """Distance of attention matrices, in fp32.

    Args:
        kind: frobenius, the mean over heads of the norm of the difference (Bick et al. 2024, MOHAWK); or
            cross_entropy, the mean over rows of -sum teacher log student (Zhang et al. 2024, Hedgehog).
        student_BHTT: rows sum to one for cross_entropy.
        teacher_BHTT: softmax weights.
    """
    student, teacher = student_BHTT.float(), teacher_BHTT.float()
    if kind == "frobenius":
        return torch.linalg.matrix_norm(student - teacher).mean()
    return -(teacher * student.clamp_min(1e-8).log()).sum(-1).mean()


def next_token_loss(
    hidden_ND: Tensor,
    head_VD: Tensor,
    targets_N: Tensor,
    *,
    ce: float,
    kl: float,
    z: float = 0.0,
    teacher_ND: Tensor | None = None,
    teacher_head_VD: Tensor | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Kl * KL(teacher || student) + ce * cross-entropy + z * (log of softmax's normaliser)^2, means over tokens with a target.

    Logits are made chunk by chunk and their gradient with them, in fp32, so memory does not grow with N x V.

    Args:
        hidden_ND: the student's last hidden states.
        head_VD: the student's output matrix.
        targets_N: int64 next tokens; -100 masks a token out of both terms.
        ce: weight of the cross-entropy.
        kl: weight of the divergence, times temperature squared (Hinton et al. 2015).
        z: weight of the squared logarithm of the normaliser, which keeps logits from drifting (Chowdhery et al. 2022, z-loss).
        teacher_ND: the teacher's last hidden states; None if kl is 0.
        teacher_head_VD: the teacher's output matrix.
        temperature: of both distributions in the divergence.

    Returns:
        The loss, and [KL, cross-entropy] without their weights and without gradient.
    """
    return _NextToken.apply(hidden_ND, head_VD, targets_N, teacher_ND, teacher_head_VD, ce, kl, z, temperature)


class _NextToken(torch.autograd.Function):
    """The gradient is computed with the loss, while the logits of a chunk are there."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        targets: Tensor,
        teacher: Tensor | None,
        teacher_head: Tensor | None,
        ce: float,
        kl: float,
        z: float,
        temperature: float,
    ) -> tuple[Tensor, Tensor]:
        share = 1.0 / (targets != IGNORED).sum().clamp_min(1)
        needs_hidden, needs_head = ctx.needs_input_grad[:2]
        d_hidden = torch.empty_like(hidden) if needs_hidden else None
        d_head = torch.zeros_like(head, dtype=torch.float32) if needs_head else None
        sums, squares = hidden.new_zeros(2, dtype=torch.float32), hidden.new_zeros((), dtype=torch.float32)
        weight = head.to(hidden.dtype)
        teacher_weight = None if teacher is None or teacher_head is None else teacher_head.to(teacher.dtype)
        size = _chunk(len(hidden), len(head))
        for start in range(0, len(hidden), size):
            rows = slice(start, start + size)
            logits = _fp32_product(hidden[rows], weight)
            wanted = None if teacher is None or teacher_weight is None else _fp32_product(teacher[rows], teacher_weight)
            named = {"kl": kl, "ce": ce, "temperature": temperature, "dtype": hidden.dtype}
            losses, gradient = distillation_rows(logits, wanted, targets[rows], **named)
            sums += losses.sum(0)
            if z:
                square, slope = _squared_normalizer(logits, targets[rows])
                squares += square
                gradient += z * slope.to(gradient.dtype)
            if d_hidden is not None:
                d_hidden[rows] = gradient @ weight
            if d_head is not None:
                d_head += gradient.t() @ hidden[rows]
        ctx.save_for_backward(d_hidden, d_head, share)
        ctx.head_dtype = head.dtype
        parts = sums * share
        ctx.mark_non_differentiable(parts)
        return kl * parts[0] + ce * parts[1] + z * squares * share, parts

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        d_hidden, d_head, share = ctx.saved_tensors
        d_loss = grad_outputs[0] * share
        return (
            None if d_hidden is None else d_hidden * d_loss.to(d_hidden.dtype),
            None if d_head is None else (d_head * d_loss).to(ctx.head_dtype),
            *(None,) * 7,
        )


def _chunk(n_tokens: int, n_classes: int) -> int:
    """Tokens of a chunk: chunks of equal size as near as may be, a multiple of MIN_CHUNK, which products like."""
    count = max(1, round(n_tokens * 4 * n_classes / CHUNK_BYTES))
    return MIN_CHUNK * -(-n_tokens // (count * MIN_CHUNK))


def _squared_normalizer(logits_NV: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
    """The sum over tokens with a target of (log sum_v e^logit)^2, and its gradient [N, V]."""
    normalizer_N1 = logits_NV.logsumexp(-1, keepdim=True) * (targets_N != IGNORED)[:, None]
    return normalizer_N1.square().sum(), 2 * normalizer_N1 * logits_NV.softmax(-1)


def _fp32_product(a_ND: Tensor, b_VD: Tensor) -> Tensor:
    """The product a b^T in fp32: rounded to bf16 it would move a logit of 16 by 0.06."""
    if a_ND.is_cuda and a_ND.dtype is torch.bfloat16:
        return torch.mm(a_ND, b_VD.t(), out_dtype=torch.float32)
    return (a_ND @ b_VD.t()).float()


def shift_targets(tokens_BT: Tensor) -> Tensor:
    """Next tokens [B T] of packed sequences; the last of each has none."""
    return F.pad(tokens_BT[:, 1:], (0, 1), value=IGNORED).flatten()
