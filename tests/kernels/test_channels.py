"""What works channel by channel: the gated long convolution in its torch form, linear maps and the choice of positions."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels.channels import from_channels, to_channels
from kernels.conv import gated_long_conv
from kernels.rows import pick_rows, pick_times
from tests.kernels import cases_channels as cases
from tests.kernels.followed_channels import followed
from tests.kernels.oracle import require_close


@pytest.mark.parametrize("case", [*cases.CASES, (3, 2, 2, 300, 20)])
def test_gated_long_conv(case: tuple[int, ...]):
    leaves = cases.in_fp64(cases.leaves_of(case, "cpu", torch.float64))
    weight = torch.randn(len(leaves["qkv"]) // 3, *case[2:4], dtype=torch.float64)
    got = cases.differentiated(gated_long_conv(*leaves.values()), leaves, weight)
    for name, tensor in cases.differentiated(cases.definition(leaves), leaves, weight).items():
        torch.testing.assert_close(got[name], tensor)


@pytest.mark.parametrize("case", cases.CASES)
def test_what_follows_the_kernels_has_the_definitions_sums(case: tuple[int, ...]):
    leaves, weight = drawn(case, torch.float64)
    own = cases.in_fp64(leaves)
    require_close(followed(leaves, weight, torch.float64), cases.differentiated(cases.definition(own), own, weight), 1e-12)


FAULTS = {
    "a bias off by 2 %": lambda own: own | {"dbias": one_off(own["dbias"])},
    "a filter of keys off by 2 %": lambda own: own | {"dshift": torch.cat((1.02 * own["dshift"][:1], own["dshift"][1:]))},
    "sums kept in 16 bits": lambda own: own | {"dbias": own["dbias"].bfloat16()},
    "sums of gradients as stored": lambda own: own | {"dbias": own["dqkv"].sum((1, 2))},
}
"""What may not pass where sums cancel, made of results that are right."""


@pytest.mark.parametrize("fault", FAULTS.values(), ids=list(FAULTS))
@pytest.mark.parametrize("case", [(2, 1, 2, 256, 32), (1, 7, 130, 192, 40)])
def test_a_small_fault_of_a_sum_that_cancels_is_seen(case: tuple[int, ...], fault: Callable):
    leaves, weight = drawn(case, torch.bfloat16)
    right = followed(leaves, weight, torch.bfloat16)
    cases.require_right(right, leaves, weight)
    with pytest.raises(AssertionError, match=r"dbias|dshift"):
        cases.require_right(fault(right), leaves, weight)


def drawn(case: tuple[int, ...], dtype: torch.dtype) -> tuple[dict[str, Tensor], Tensor]:
    """Arguments and the gradient of an output."""
    return cases.leaves_of(case, "cpu", dtype), torch.randn(case[0] * case[1], *case[2:4]).to(dtype)


def one_off(gradients: Tensor) -> Tensor:
    """With the one in the middle of their sizes 2 % too large."""
    off = gradients.clone()
    off[off.abs().argsort()[len(off) // 2]] *= 1.02
    return off


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning", "ignore:Torchinductor does not support:UserWarning")
def test_compiled_gradients_of_the_torch_form():
    leaves = cases.leaves_of((2, 2, 3, 20, 9), "cpu", torch.float32)
    compiled = torch.compile(gated_long_conv, fullgraph=True)
    got, want = (
        torch.autograd.grad(call(*leaves.values()).square().sum(), list(leaves.values())) for call in (compiled, gated_long_conv)
    )
    for found, true in zip(got, want, strict=True):
        torch.testing.assert_close(found, true, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("members", [None, 1, 3])
@pytest.mark.parametrize("way", ["to", "from"])
def test_linear_maps_and_the_layout_of_their_gradients(way: str, members: int | None):
    stack = () if members is None else (members,)
    x = torch.randn(*stack, *((7, 4) if way == "to" else (4, 7)), dtype=torch.float64, requires_grad=True)
    weight = torch.randn(*stack, 5, 4, dtype=torch.float64, requires_grad=True)
    call = {"to": to_channels, "from": from_channels}[way]
    got = call(x, weight) if members is None else torch.vmap(call)(x, weight)
    true = weight @ x.mT if way == "to" else x.mT @ weight.mT
    torch.testing.assert_close(got, true)
    dy = torch.randn_like(true)
    gradients = torch.autograd.grad(got, (x, weight), dy)
    for found, want in zip(gradients, torch.autograd.grad(true, (x, weight), dy), strict=True):
        torch.testing.assert_close(found, want)
        assert found.is_contiguous()


def test_positions_are_picked_as_from_rows():
    x = torch.randn(2, 5, 3, 9, dtype=torch.float64, requires_grad=True)
    rows = torch.stack([torch.stack([torch.randperm(9)[:4] for _ in range(3)]) for _ in range(2)])
    got = torch.vmap(pick_times)(x, rows)
    true = torch.vmap(pick_rows)(x.permute(0, 2, 3, 1), rows)
    assert torch.equal(got, true)
    dy = torch.randn_like(got)
    (found,), (want,) = torch.autograd.grad(got, x, dy), torch.autograd.grad(true, x, dy)
    assert torch.equal(found, want)
    assert found.is_contiguous()


def test_channels_that_are_no_heads():
    with pytest.raises(ValueError, match="qkv has 8 channels; a filter of 2 heads needs a multiple of 6"):
        gated_long_conv(torch.randn(8, 2, 4), torch.randn(8), torch.randn(2, 4), torch.randn(2, 3))
