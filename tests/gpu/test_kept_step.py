"""The fused decoding step of a window that keeps keys on a CUDA device: exact in every dtype, in place and replayed."""

from __future__ import annotations

import pytest
import torch

from kernels.kept_step import Kept, kept_step
from kernels.step import states_in_place
from kernels.window_step import Stored
from tests.kernels import cases_kept_step as cases
from tests.kernels.oracle import in_dtypes

pytestmark = pytest.mark.gpu

LARGE = ((33, 3, 1, 182, 4, 512, 64, 64), (9, 6, 2, 700, 0, 2000, 128, 128), (6, 8, 1, 130, 20, 70, 256, 256))


@pytest.mark.parametrize(("shape", "dtype"), in_dtypes((*cases.SHAPES, *LARGE)), ids=str)
def test_equals_the_definition(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    cases.check(shape, "cuda", dtype)


def test_storage_in_another_dtype() -> None:
    cases.check(cases.SHAPES[0], "cuda", torch.bfloat16, stored_dtype=torch.float32)


def test_replayed_steps_are_a_sequence() -> None:
    """A captured step on storage in place, replayed, goes on from where it was."""
    q, k, v, score, stored, kept = cases.draw(LARGE[0], device="cuda", dtype=torch.bfloat16)
    held = Stored(*(x.clone() for x in stored)), Kept(*(x.clone() for x in kept))
    want = (stored, kept)
    for _ in range(9):
        y, *want = kept_step(q, k, v, score, *want)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), states_in_place():
        with torch.cuda.stream(side):
            kept_step(q, k, v, score, *held)
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph):
            again, *_ = kept_step(q, k, v, score, *held)
    for _ in range(8):
        graph.replay()
    assert torch.equal(again, y)
    for a, b in zip((*held[0], *held[1]), (*want[0], *want[1]), strict=True):
        assert torch.equal(a, b)
