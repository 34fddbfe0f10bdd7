"""The long convolution by Toeplitz products on a CUDA device: exact in 16 bits, as members, and captured in a graph."""

from __future__ import annotations

import pytest
import torch

from kernels.conv import long_conv
from kernels.dispatch import watched
from tests.gpu.compiled import require_nothing_new
from tests.kernels import cases_long_conv as cases

pytestmark = pytest.mark.gpu

SHAPES = (*cases.SHAPES, (3, 300, 5, 300), (2, 2048, 4, 2048), (70, 64, 1000, 64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_definition(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    cases.check(shape, "cuda", dtype)


def test_members() -> None:
    cases.check_members("cuda")


def test_in_a_graph() -> None:
    x = torch.randn(2, 200, 16, device="cuda", dtype=torch.bfloat16)
    taps = torch.randn(16, 200, device="cuda")
    with torch.no_grad(), watched() as seen:
        want = long_conv(x, taps)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = long_conv(x, taps)
    graph.replay()
    assert seen["long_conv"] == "triton"
    assert torch.equal(got, want)


def test_new_sizes_compile_nothing() -> None:
    from kernels.convolutions.long_conv_triton import toeplitz_kernel

    def run(batch: int, length: int, width: int) -> None:
        x, taps = torch.randn(batch, length, width, device="cuda", dtype=torch.bfloat16), torch.randn(width, length, device="cuda")
        long_conv(x, taps)

    require_nothing_new((toeplitz_kernel,), run, (2, 100, 4), (1, 1, 1), (3, 640, 5), (16, 64, 16))
