"""Cases of the Triton cross entropy, for the interpreter and for a GPU."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from kernels.cross_entropy import IGNORED, labelled_cross_entropy
from kernels.dispatch import use_backend
from kernels.labelled_head import labelled_head
from kernels.values import checked_values
from tests.kernels.oracle import SINGLE, SIXTEEN_BIT, poisoned, require_close

SHAPES = ((1, 1), (3, 2), (5, 7), (4, 257), (2, 8192), (3, 20_001), (0, 5))


def check_rows(rows: int, classes: int, device: str, dtype: torch.dtype) -> None:
    """Losses, predictions and gradients against fp64, with an ignored row and a row that is partly -inf."""
    logits = (3 * torch.randn(rows, classes)).to(dtype)
    labels = torch.randint(classes, (rows,))
    if rows > 1:
        labels[1] = IGNORED
    if rows > 2:
        logits[2, : classes - 1] = float("-inf")
        labels[2] = classes - 1
    weight = torch.rand(rows) + 0.5
    leaf = logits.to(device).requires_grad_()
    with use_backend("triton"), poisoned():
        loss, predicted = labelled_cross_entropy(leaf, labels.to(device))
        (gradient,) = torch.autograd.grad(loss, leaf, weight.to(device))
    exact = logits.double().requires_grad_()
    true = F.cross_entropy(exact, labels, ignore_index=IGNORED, reduction="none")
    (true_gradient,) = torch.autograd.grad(true, exact, weight.double())
    assert loss.dtype == torch.float32
    assert gradient.dtype == dtype
    assert torch.equal(predicted.cpu(), logits.argmax(-1))
    if rows:
        # a small loss or gradient is the difference of numbers of the size of the logits or of 1
        torch.testing.assert_close(loss.double().cpu(), true, rtol=SINGLE, atol=1e-6)
        if dtype == torch.float32:
            torch.testing.assert_close(gradient.double().cpu(), true_gradient, rtol=SINGLE, atol=1e-6)
        else:
            require_close({"gradient": gradient}, {"gradient": true_gradient}, SIXTEEN_BIT)


def check_head(rows: int, classes: int, device: str, dtype: torch.dtype) -> None:
    """Losses, predictions and both gradients of the head that owns its logits, against fp64, with an ignored row."""
    width = 6
    h, weight = torch.randn(rows, width).to(dtype), torch.randn(classes, width).to(dtype)
    labels = torch.randint(classes, (rows,))
    if rows > 1:
        labels[1] = IGNORED
    scale = torch.rand(rows) + 0.5

    def run(leaves: list[torch.Tensor], call) -> dict[str, torch.Tensor]:
        loss = call(*leaves)
        gradients = torch.autograd.grad(loss, leaves, scale.to(loss))
        return dict(zip(("loss", "dh", "dweight"), (loss, *gradients), strict=True))

    leaves = [tensor.to(device).requires_grad_() for tensor in (h, weight)]
    with use_backend("triton"), poisoned():
        got = run(leaves, lambda h, w: labelled_head(h, w, labels.to(device))[0])
        predicted = labelled_head(*leaves, labels.to(device))[1]
    logits = h.double() @ weight.double().T
    true = run(
        [tensor.double().requires_grad_() for tensor in (h, weight)],
        lambda h, w: F.cross_entropy(h @ w.T, labels, ignore_index=IGNORED, reduction="none"),
    )
    assert (got["loss"].dtype, got["dh"].dtype, got["dweight"].dtype) == (torch.float32, dtype, dtype)
    if dtype == torch.float32:
        assert torch.equal(predicted.cpu(), logits.argmax(-1))
    if rows and classes > 1:
        require_close(got, true, SINGLE if dtype == torch.float32 else 2 * SIXTEEN_BIT)


def check_members(device: str) -> None:
    """One call for all members, whichever argument they share; a scalar's expanded gradient comes back right."""
    logits, labels = torch.randn(3, 5, 11, device=device, requires_grad=True), torch.randint(11, (3, 5), device=device)
    with use_backend("triton"), poisoned():
        for axes in ((0, 0), (0, None), (1, 0)):
            own_logits = logits if axes[0] == 0 else logits.transpose(0, 1)
            own_labels = labels if axes[1] == 0 else labels[0]
            loss, predicted = torch.vmap(labelled_cross_entropy, axes)(own_logits, own_labels)
            (gradient,) = torch.autograd.grad(loss.sum(), logits)
            exact = logits.double()
            true = F.cross_entropy(exact.flatten(0, 1), own_labels.expand(3, 5).flatten(), reduction="none").view(3, 5)
            (true_gradient,) = torch.autograd.grad(true.sum(), logits)
            assert torch.equal(predicted, logits.argmax(-1))
            require_close({"loss": loss, "gradient": gradient}, {"loss": true, "gradient": true_gradient}, SINGLE)


def check_faults(device: str) -> None:
    """NaN and labels outside of the classes give NaN, in their own row only; an ignored NaN row gives zero."""
    logits = torch.randn(4, 300, device=device)
    logits[0, 7] = logits[3, 0] = float("nan")
    labels = torch.tensor([1, 300, 2, IGNORED], device=device)
    leaf = logits.requires_grad_()
    with use_backend("triton"), poisoned(), checked_values(False):
        loss, _ = labelled_cross_entropy(leaf, labels)
        (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    assert loss.isnan().tolist() == [True, True, False, False]
    assert gradient.isnan().any(-1).tolist() == [True, True, False, False]
    assert loss[3] == 0
    assert (gradient[3] == 0).all()
