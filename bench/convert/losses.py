"""Losses of a conversion: distances of captured layers, and the distribution over the next token without its full matrix.

Shape legend: N tokens, D width, V vocabulary, C tokens of a chunk, B batch, T time, H heads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK = 1024
"""Tokens whose logits exist at a time: 1024 x 49k x 4 bytes = 200 MB."""
IGNORED = -100


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
    teacher_ND: Tensor | None = None,
    teacher_head_VD: Tensor | None = None,
    temperature: float = 1.0,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """Kl * KL(teacher || student) + ce * cross-entropy, each a mean over the tokens that have a target.

    Logits are made chunk by chunk and their gradient with them, in fp32, so memory does not grow with N x V.

    Args:
        hidden_ND: the student's last hidden states.
        head_VD: the student's output matrix.
        targets_N: int64 next tokens; -100 masks a token out of both terms.
        ce: weight of the cross-entropy.
        kl: weight of the divergence, times temperature squared (Hinton et al. 2015).
        teacher_ND: the teacher's last hidden states; None if kl is 0.
        teacher_head_VD: the teacher's output matrix.
        temperature: of both distributions in the divergence.
        chunk: C.

    Returns:
        The loss, and [KL, cross-entropy] without their weights and without gradient.
    """
    return _NextToken.apply(hidden_ND, head_VD, targets_N, teacher_ND, teacher_head_VD, ce, kl, temperature, chunk)


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
        temperature: float,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        count = (targets != IGNORED).sum().clamp_min(1)
        needs_hidden, needs_head = ctx.needs_input_grad[:2]
        d_hidden = torch.zeros_like(hidden) if needs_hidden else None
        d_head = torch.zeros_like(head, dtype=torch.float32) if needs_head else None
        sums = hidden.new_zeros(2, dtype=torch.float32)
        low = hidden.dtype
        weight = head.to(low)
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            known = (targets[rows] != IGNORED).float()[:, None]
            logits = (hidden[rows] @ weight.t()).float()
            gradient = torch.zeros_like(logits)
            index = targets[rows].clamp_min(0)[:, None]
            log_p = logits.log_softmax(-1)
            sums[1] -= (log_p.gather(1, index) * known).sum()
            if ce:
                gradient += ce * log_p.exp()
                gradient.scatter_add_(1, index, torch.full_like(index, -ce, dtype=gradient.dtype))
            if teacher is not None and teacher_head is not None:
                wanted = (teacher[rows] @ teacher_head.to(teacher.dtype).t()).float()
                log_q = (wanted / temperature).log_softmax(-1)
                log_s = log_p if temperature == 1 else (logits / temperature).log_softmax(-1)
                q = log_q.exp()
                sums[0] += temperature**2 * ((q * (log_q - log_s)).sum(-1, keepdim=True) * known).sum()
                gradient += kl * temperature * (log_s.exp() - q)
            gradient = (gradient * (known / count)).to(low)
            if d_hidden is not None:
                d_hidden[rows] = gradient @ weight
            if d_head is not None:
                d_head += (gradient.t() @ hidden[rows]).float()
        ctx.save_for_backward(d_hidden, d_head)
        ctx.head_dtype = head.dtype
        parts = sums / count
        ctx.mark_non_differentiable(parts)
        return kl * parts[0] + ce * parts[1], parts

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        d_loss: Tensor = grad_outputs[0]
        d_hidden, d_head = ctx.saved_tensors
        return (
            None if d_hidden is None else d_hidden * d_loss.to(d_hidden.dtype),
            None if d_head is None else (d_head * d_loss).to(ctx.head_dtype),
            *(None,) * 7,
        )


def shift_targets(tokens_BT: Tensor) -> Tensor:
    """Next tokens [B T] of packed sequences; the last of each has none."""
    return F.pad(tokens_BT[:, 1:], (0, 1), value=IGNORED).flatten()
