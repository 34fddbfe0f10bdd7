"""A window's fused decoding step on a CUDA device: exact in every dtype, and in place while other programs run."""

from __future__ import annotations

import pytest
import torch

from kernels.step import states_in_place
from kernels.window_step import Stored, window_step
from tests.kernels import cases_window_step as cases
from tests.kernels.oracle import in_dtypes

pytestmark = pytest.mark.gpu

LARGE = ((64, 9, 3, 187, 4, 64, 64), (16, 16, 16, 1023, 0, 128, 128), (8, 8, 1, 130, 20, 256, 256))


@pytest.mark.parametrize(("shape", "dtype"), in_dtypes((*cases.SHAPES, *LARGE)), ids=str)
def test_equals_the_definition(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    cases.check(shape, "cuda", dtype)


def test_storage_in_another_dtype() -> None:
    cases.check(LARGE[0], "cuda", torch.bfloat16, stored_dtype=torch.float32)


def test_replayed_steps_are_a_sequence() -> None:
    """A captured step on storage in place, replayed, goes on from where it was."""
    q, k, v, stored = cases.draw(LARGE[0], device="cuda", dtype=torch.bfloat16)
    held = Stored(*(None if x is None else x.clone() for x in stored))
    want = stored
    for _ in range(9):
        y, want = window_step(q, k, v, want, window=188)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), states_in_place():
        with torch.cuda.stream(side):
            window_step(q, k, v, held, window=188)
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph):
            again, _ = window_step(q, k, v, held, window=188)
    for _ in range(8):
        graph.replay()
    assert torch.equal(again, y)
    for a, b in zip(held, want, strict=True):
        assert a is None or torch.equal(a, b)
