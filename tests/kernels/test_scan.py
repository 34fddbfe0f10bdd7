"""The elementwise scans against their token loops."""

import pytest
import torch

from kernels.reference import scan_reference
from kernels.scan import _slices, scan, selective_scan

LENGTHS = (1, 2, 3, 15, 16, 17, 64, 65, 130)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("with_state", [False, True])
def test_scan(length, with_state):
    torch.manual_seed(length)
    a = torch.rand(2, length, 3, dtype=torch.float64)
    a[:, ::3] = 0
    tensors = [a.requires_grad_(), torch.randn(2, length, 3, dtype=torch.float64, requires_grad=True)]
    if with_state:
        tensors.append(torch.randn(2, 3, dtype=torch.float64, requires_grad=True))
    got, expected = scan(*tensors), scan_reference(*tensors)
    torch.testing.assert_close(got, expected)
    weight = torch.randn_like(got)
    both = (torch.autograd.grad((h * weight).sum(), tensors, materialize_grads=True) for h in (got, expected))
    for found, true in zip(*both, strict=True):
        torch.testing.assert_close(found, true)


def selective_reference(x, dt, rate, b, c, state):
    decay = torch.exp(-dt[..., None] * rate)
    h = scan_reference(decay, (dt * x)[..., None] * b[:, :, None], state)
    return (h * c[:, :, None]).sum(-1), h[:, -1]


def draw(length, strength, batch=3):
    torch.manual_seed(length)
    shapes = ((batch, length, 4), (batch, length, 4), (4, 2), (batch, length, 2), (batch, length, 2), (batch, 4, 2))
    tensors = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    tensors[1], tensors[2] = tensors[1].abs(), strength * tensors[2].abs()
    return [t.requires_grad_() for t in tensors]


@pytest.mark.parametrize("strength", [0.0, 1.0, 100.0])
@pytest.mark.parametrize("length", LENGTHS)
def test_selective_scan(length, strength):
    tensors = draw(length, strength)
    (y, final), (y_true, final_true) = selective_scan(*tensors), selective_reference(*tensors)
    torch.testing.assert_close(y, y_true)
    torch.testing.assert_close(final, final_true)
    weight = torch.randn_like(y)
    pairs = ((y, final), (y_true, final_true))
    both = (torch.autograd.grad((o * weight).sum() + f.sin().sum(), tensors) for o, f in pairs)
    for found, true in zip(*both, strict=True):
        torch.testing.assert_close(found, true, rtol=1e-9, atol=1e-10)


def test_selective_scan_without_state():
    *tensors, state = draw(17, 1.0)
    y, final = selective_scan(*tensors)
    assert final is None
    torch.testing.assert_close(y, selective_scan(*tensors, torch.zeros_like(state))[0])


def test_slices_cover_the_batch():
    x, rate = torch.arange(10.0)[:, None, None].expand(10, 256, 64), torch.ones(64, 8)
    parts = [part for (part,) in _slices(rate, x)]
    assert len(parts) > 1
    assert torch.equal(torch.cat(parts), x)
