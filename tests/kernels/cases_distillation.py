"""Cases of the Triton distillation rows, for the interpreter and for a GPU."""

from __future__ import annotations

import torch

from kernels.dispatch import use_backend
from kernels.distillation import IGNORED, distillation_rows
from kernels.values import checked_values
from tests.kernels.oracle import SINGLE, SIXTEEN_BIT, poisoned, require_close

SHAPES = ((1, 2), (3, 7), (4, 257), (2, 8192), (3, 20_001), (0, 5))
SETTINGS = ((1.0, 0.0, 1.0), (0.0, 1.0, 1.0), (0.7, 0.3, 2.0))


def exact_rows(
    student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor, kl: float, ce: float, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses and gradient by autograd in fp64, from the definition."""
    leaf = student.double().cpu().requires_grad_()
    labels = labels.cpu()
    known = labels != IGNORED
    log_q = (teacher.double().cpu() / temperature).log_softmax(-1)
    log_s = (leaf / temperature).log_softmax(-1)
    divergence = temperature**2 * (log_q.exp() * (log_q - log_s)).sum(-1) * known
    cross = -leaf.log_softmax(-1).gather(1, labels.clamp_min(0)[:, None])[:, 0] * known
    (gradient,) = torch.autograd.grad((kl * divergence + ce * cross).sum(), leaf)
    return torch.stack((divergence, cross), -1).detach(), gradient


def check_rows(rows: int, classes: int, setting: tuple[float, float, float], device: str, dtype: torch.dtype) -> None:
    """Losses and gradient against fp64, with an ignored row."""
    kl, ce, temperature = setting
    student, teacher = (3 * torch.randn(rows, classes)).to(dtype), (3 * torch.randn(rows, classes)).to(dtype)
    labels = torch.randint(classes, (rows,))
    if rows > 1:
        labels[1] = IGNORED
    with use_backend("triton"), poisoned():
        losses, gradient = distillation_rows(
            student.to(device), teacher.to(device), labels.to(device), kl=kl, ce=ce, temperature=temperature
        )
    true, true_gradient = exact_rows(student, teacher, labels, kl, ce, temperature)
    assert losses.dtype == torch.float32
    assert gradient.dtype == dtype
    if rows:
        torch.testing.assert_close(losses.double().cpu(), true, rtol=10 * SINGLE, atol=1e-5)
        bound = SINGLE if dtype == torch.float32 else SIXTEEN_BIT
        require_close({"gradient": gradient}, {"gradient": true_gradient}, bound)
        assert not rows > 1 or (gradient[1] == 0).all()


def check_without_a_teacher(device: str) -> None:
    """Cross entropy alone; a label outside of the classes gives NaN in its own row."""
    student, labels = torch.randn(3, 300), torch.tensor([5, 300, IGNORED])
    with use_backend("triton"), poisoned(), checked_values(False):
        losses, gradient = distillation_rows(student.to(device), None, labels.to(device), kl=0.0, ce=2.0, dtype=torch.float32)
    true, true_gradient = exact_rows(student, student, labels.clamp_max(299), 0.0, 2.0, 1.0)
    assert losses[:, 0].abs().max() == 0
    assert losses[1, 1].isnan()
    torch.testing.assert_close(losses[::2, 1].double().cpu(), true[::2, 1], rtol=1e-5, atol=1e-6)
    require_close({"gradient": gradient[::2]}, {"gradient": true_gradient[::2]}, SINGLE)
