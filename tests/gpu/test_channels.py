"""The gated long convolution on a CUDA device: exact in 16 bits, as members, and captured in a graph."""

from __future__ import annotations

import pytest
import torch

from kernels.conv import gated_long_conv
from kernels.dispatch import watched
from tests.kernels import cases_channels as cases

pytestmark = pytest.mark.gpu

LARGE = ((2, 5, 300, 256, 256), (1, 7, 130, 192, 40), (2, 64, 4, 200, 200))
"""The last has as many channels as a mixer, and so no gradient of so few numbers that all may cancel."""


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", [*cases.CASES, *LARGE], ids=str)
def test_equals_the_definition(case: tuple[int, ...], dtype: torch.dtype) -> None:
    """Close to the kernels' roundings followed in fp64, and within 5e-3 of fp64 without roundings; see `cases.require_right`.

    On an H200, bf16, these roundings alone put the gradients of 6 to 21 biases up to 9.2e-3 from fp64, so the second limit is
    theirs there. At a mixer's width, 384 biases, it is 5e-3 for every tensor.
    """
    cases.check(case, "cuda", dtype)


def test_members() -> None:
    cases.check_members("cuda")


def test_in_a_graph() -> None:
    leaves = cases.leaves_of((2, 8, 3, 200, 20), "cuda", torch.bfloat16)
    with torch.no_grad(), watched() as seen:
        want = gated_long_conv(*leaves.values())
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = gated_long_conv(*leaves.values())
    graph.replay()
    assert seen["gated_long_conv"] == "triton"
    assert torch.equal(got, want)
