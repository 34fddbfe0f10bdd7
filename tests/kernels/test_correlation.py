"""Sums of products at every distance against the sum that defines them, and as one graph with gradients of members."""

import itertools

import pytest
import torch
from torch import Tensor

from kernels.correlation import _fast_size, correlation

CASES = [(1, 1, 1), (4, 4, 4), (5, 9, 3), (9, 5, 12), (3, 2, 7), (64, 64, 64), (40, 40, 17), (32, 32, 32)]
"""Lengths of a and b, and lags: more of them than b is long, too."""


def direct(a: Tensor, b: Tensor, lags: int) -> Tensor:
    """The definition."""
    y = torch.zeros(len(a), lags, dtype=a.dtype)
    for lag, n in itertools.product(range(lags), range(a.shape[1])):
        if n + lag < b.shape[1]:
            y[:, lag] += a[:, n] * b[:, n + lag]
    return y


def leaves_of(case: tuple[int, int, int], *members: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Fresh rows."""
    a, b = (torch.randn(*members, 3, length, dtype=dtype) for length in case[:2])
    return a.requires_grad_(), b.requires_grad_()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_sum(case):
    a, b = leaves_of(case)
    got, true = correlation(a, b, case[2]), direct(a, b, case[2])
    weight = torch.randn_like(true)
    torch.testing.assert_close(got, true)
    torch.testing.assert_close(torch.autograd.grad(got, (a, b), weight), torch.autograd.grad(true, (a, b), weight))


def test_stays_in_fp32_under_autocast():
    a, b = leaves_of((300, 300, 256), dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got = correlation(a, b, 256)
    weight = torch.randn_like(got)
    own = torch.autograd.grad(got, (a, b), weight)
    exact = [x.detach().double().requires_grad_() for x in (a, b)]
    true = direct(exact[0], exact[1], 256)
    for x, y in zip((got, *own), (true, *torch.autograd.grad(true, exact, weight.double())), strict=True):
        assert x.dtype == torch.float32
        assert (x - y).norm() < 1e-6 * y.norm()


@pytest.mark.parametrize("members", [1, 3])
def test_members_are_one_graph(members):
    a, b = leaves_of((20, 20, 9), members)

    def mapped(a: Tensor, b: Tensor) -> Tensor:
        return torch.vmap(lambda a, b: correlation(a, b, 9))(a, b)

    got = torch.compile(mapped, backend="aot_eager", fullgraph=True)(a, b)
    true = torch.stack([direct(*pair, 9) for pair in zip(a, b, strict=True)])
    weight = torch.randn_like(true)
    torch.testing.assert_close(got, true)
    torch.testing.assert_close(torch.autograd.grad(got, (a, b), weight), torch.autograd.grad(true, (a, b), weight))


def test_sizes():
    for least in range(1, 3000):
        size = _fast_size(least)
        assert least <= size <= max(4, least * 5 // 4 + 1)


def test_bad_input():
    with pytest.raises(ValueError, match="b has shape"):
        correlation(torch.zeros(3, 4), torch.zeros(2, 4), 1)
    with pytest.raises(ValueError, match="lags=0"):
        correlation(torch.zeros(3, 4), torch.zeros(3, 4), 0)
