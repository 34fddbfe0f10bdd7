"""The Triton decoding step on a CUDA device: exact in every dtype, in a graph, beyond grid limits, compiled once."""

from __future__ import annotations

import pytest
import torch

from kernels.dispatch import use_backend
from kernels.step import recurrent_step, states_in_place
from tests.gpu.compiled import require_nothing_new
from tests.kernels import cases_step as cases

pytestmark = pytest.mark.gpu

SHAPES = ((2, 2, 4, 64, 64), (1, 3, 3, 128, 128), (3, 1, 2, 60, 100), (2, 1, 1, 256, 256), (1, 1, 2, 273, 65))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("option", cases.OPTIONS, ids=str)
def test_equals_the_definition(option: tuple[str, bool], dtype: torch.dtype) -> None:
    for shape in SHAPES:
        cases.check(shape, option, "cuda", dtype)


@pytest.mark.parametrize("state", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bit_state(state: torch.dtype) -> None:
    cases.check((2, 2, 4, 128, 64), ("vector", True), "cuda", torch.bfloat16, state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rank_one(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    cases.check_rank_one(shape, "cuda", dtype)


def test_more_heads_than_a_grid_axis_may_have() -> None:
    cases.check((700, 100, 100, 16, 16), ("scalar", True), "cuda", torch.bfloat16)


def test_replayed_steps_are_a_sequence() -> None:
    """A captured step on a state in place, replayed, goes on from where it was."""
    tensors = cases.draw((2, 2, 2, 64, 64), "scalar", delta=True, device="cuda", dtype=torch.float32, state=torch.float32)
    want = dict(tensors)
    with use_backend("triton"):
        for _ in range(3):
            want["state"] = cases.step(want)["state"]
        before = tensors["state"].clone()
        graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), states_in_place():
            cases.step(tensors)
            torch.cuda.synchronize()
            with torch.cuda.graph(graph):
                cases.step(tensors)
        tensors["state"].copy_(before)
        for _ in range(3):
            graph.replay()
    assert torch.equal(tensors["state"], want["state"])


def test_new_batches_and_heads_compile_nothing() -> None:
    from kernels.steps.step_triton import step_kernel

    def run(batch: int, heads: int) -> None:
        state = torch.zeros(batch, heads, 32, 32, device="cuda")
        q, k, v = torch.randn(3, batch, heads, 32, device="cuda", dtype=torch.bfloat16)
        recurrent_step(q, k, v, state, beta_BH=torch.rand(batch, heads, device="cuda"))

    require_nothing_new((step_kernel,), run, (2, 2), (1, 1), (3, 4), (16, 16))
