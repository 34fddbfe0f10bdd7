"""The torch form of the labelled cross entropy, and what its Triton form takes on sm_90."""

import pytest
import torch
from torch.nn import functional as F

from kernels.between.cross_entropy_triton import (
    IN_PLACE_BLOCK,
    block_and_warps,
    cross_entropy_backward,
    cross_entropy_forward,
    cross_entropy_in_place,
)
from kernels.cross_entropy import IGNORED, labelled_cross_entropy
from kernels.labelled_head import labelled_head
from tests.kernels.offline import compile_sm90


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_torch_form(dtype: torch.dtype):
    logits = torch.randn(6, 9).to(dtype).requires_grad_()
    labels = torch.tensor([0, 3, IGNORED, 8, 1, 1])
    loss, predicted = labelled_cross_entropy(logits, labels)
    wide = logits.detach().double()
    true = wide.logsumexp(-1) - wide[torch.arange(6), labels.clamp(min=0)]
    true[2] = 0
    assert loss.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(loss.double(), true, rtol=1e-5, atol=1e-6)
    assert torch.equal(predicted, logits.argmax(-1))
    assert not predicted.requires_grad
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    expected = (wide.softmax(-1) - F.one_hot(labels.clamp(min=0), 9)) * (labels >= 0)[:, None]
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-2, atol=1e-2 if dtype == torch.bfloat16 else 1e-6)


def test_members_equal_the_loop():
    logits, labels = torch.randn(3, 5, 9), torch.randint(-1, 9, (3, 5))
    labels[labels < 0] = IGNORED
    loss, predicted = torch.vmap(labelled_cross_entropy)(logits, labels)
    for i in range(3):
        alone = labelled_cross_entropy(logits[i], labels[i])
        torch.testing.assert_close((loss[i], predicted[i]), alone)


def test_bad_input_is_one_sentence():
    with pytest.raises(ValueError, match=r"labels has shape \(3,\); with logits of shape \(2, 3\) it is \(2,\)"):
        labelled_cross_entropy(torch.randn(2, 3), torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match=r"logits have shape \(3,\); cross entropy takes \[rows, classes\]"):
        labelled_cross_entropy(torch.randn(3), torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match="labels is on meta and logits on cpu; move them to one device"):
        labelled_cross_entropy(torch.randn(2, 3), torch.zeros(2, dtype=torch.long, device="meta"))
    with pytest.raises(ValueError, match="labels has dtype"):
        labelled_cross_entropy(torch.randn(2, 3), torch.zeros(2))


@pytest.mark.parametrize("dtype", ["*bf16+", "*fp16+", "*fp32+"])
@pytest.mark.parametrize("classes", [50, 1000, 8192, 100_000])
def test_compiles_for_sm90_without_spills(classes: int, dtype: str):
    block, warps = block_and_warps(classes)
    count = "i32" if classes % 16 else "i32+"
    rows = {"labels_ptr": "*i64+", "logsumexp_ptr": "*fp32+", "n_classes": count, "ignored": "i32", "BLOCK": block}
    forward = {"logits_ptr": dtype, "loss_ptr": "*fp32+", "predicted_ptr": "*i64+"}
    backward = {"logits_ptr": dtype, "dlogits_ptr": dtype, "dloss_ptr": "*fp32+", "dloss_stride": "i32"}
    for kernel, arguments in ((cross_entropy_forward, forward), (cross_entropy_backward, backward)):
        used = compile_sm90(kernel, rows | arguments, warps=warps)
        assert used.spilled == 0
        assert used.registers <= 80, "fewer than three programs of 256 threads fit an SM"
        assert used.shared <= 1024


@pytest.mark.parametrize("dtype", ["*bf16+", "*fp32+"])
def test_the_form_in_place_compiles_for_sm90_without_spills(dtype: str):
    arguments = {"logits_ptr": dtype, "labels_ptr": "*i64+", "loss_ptr": "*fp32+", "predicted_ptr": "*i64+"}
    numbers = {"n_classes": "i32+", "ignored": "i32", "BLOCK": IN_PLACE_BLOCK}
    used = compile_sm90(cross_entropy_in_place, arguments | numbers, warps=4)
    assert used.spilled == 0
    assert used.registers <= 128, "fewer than four programs of 128 threads fit an SM"


def test_the_torch_form_of_the_head():
    h, weight = torch.randn(6, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    labels = torch.tensor([0, 3, IGNORED, 8, 1, 1])
    loss, predicted = labelled_head(h, weight, labels)
    want, want_predicted = labelled_cross_entropy(h @ weight.T, labels)
    torch.testing.assert_close(loss, want)
    assert torch.equal(predicted, want_predicted)
    with pytest.raises(ValueError, match=r"weight has shape \(9, 4\); with h of shape \(6, 3\) it is \(9, 3\)"):
        labelled_head(h[:, :3], weight, labels)
