"""The vector-gate kernels on a CUDA device against the token loop in fp64, in every dtype, shape class and gate."""

from __future__ import annotations

import pytest
import torch

from kernels import _replay
from kernels.dispatch import use_backend
from kernels.recurrence import linear_recurrence
from kernels.reference import linear_recurrence_reference
from kernels.vector_gates import vector_gate, vector_gate_hopper_launch
from tests.gpu.compiled import require_nothing_new
from tests.kernels import cases_vector_gate as cases
from tests.kernels.oracle import rms_error

pytestmark = pytest.mark.gpu

# batch, length, heads, key width, value width
SHAPES = (
    (32, 1, 2, 16, 16),
    (2, 200, 2, 64, 64),
    (1, 300, 2, 128, 128),
    (2, 129, 4, 128, 64),
    (1, 75, 1, 60, 100),
    (1, 130, 1, 64, 65),
    (1, 100, 1, 256, 256),
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gate", cases.GATES)
@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_token_loop(shape: tuple[int, int, int, int, int], delta: bool, gate: str, dtype: torch.dtype) -> None:
    for state in (False, True):
        cases.check(shape, gate, "cuda", dtype, delta=delta, state=state)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gate", cases.GATES_OF_PAIRS)
@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
def test_diagonal_plus_rank_one(shape: tuple[int, int, int, int, int], gate: str, dtype: torch.dtype) -> None:
    cases.check_dplr(shape, gate, "cuda", dtype, state=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("delta", [False, True])
def test_split_equals_whole(delta: bool, dtype: torch.dtype) -> None:
    cases.check_split((0, 1, 64, 83, 150), "cuda", dtype, delta=delta)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gate", cases.GATES)
def test_few_heads_are_walked_in_segments(gate: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vector_gate, "SEGMENT", 1)
    with _replay.forgetful():
        for state in (False, True):
            cases.check((1, 300, 2, 128, 128), gate, "cuda", dtype, delta=False, state=state)


@pytest.mark.parametrize("gate", cases.GATES)
@pytest.mark.parametrize(
    "shape", [(9, 130, 16, 128, 128), (5, 130, 16, 64, 64), (4, 130, 16, 128, 96), (1, 1100, 1, 128, 128)], ids=str
)
@pytest.mark.parametrize("delta", [False, True])
def test_walks_of_hopper(shape: tuple[int, int, int, int, int], delta: bool, gate: str) -> None:
    """All columns of wide heads in a program, of narrow ones, and half of them."""
    for state in (False, True):
        cases.check(shape, gate, "cuda", torch.bfloat16, delta=delta, state=state)


@pytest.mark.parametrize("gate", cases.GATES)
@pytest.mark.parametrize("width", [64, 128])
def test_segments_of_the_delta_rule(width: int, gate: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last one is shorter."""
    monkeypatch.setattr(vector_gate_hopper_launch, "FEW_WIDE", 2)
    with _replay.forgetful():
        for state in (False, True):
            cases.check((1, 1100, 1, width, width), gate, "cuda", torch.bfloat16, delta=True, state=state)


@pytest.mark.parametrize("delta", [False, True])
def test_plain_walks(delta: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vector_gate_hopper_launch, "fit", lambda *_: False)
    with _replay.forgetful():
        cases.check((2, 200, 2, 128, 128), "weak", "cuda", torch.bfloat16, delta=delta, state=True)


@pytest.mark.parametrize("delta", [False, True])
def test_members(delta: bool) -> None:
    cases.check_members("cuda", delta=delta)
    cases.check_nested_gradients("cuda")


def test_many_heads_and_long_sequences() -> None:
    with use_backend("triton"), torch.no_grad():
        many = torch.randn(70_000, 3, 1, 16, device="cuda", dtype=torch.bfloat16)
        decay = -torch.rand(70_000, 3, 1, 16, device="cuda")
        o, _ = linear_recurrence(many, many, many, log_decay=decay)
        tail = [x[-7:].double() for x in (many, decay)]
        assert rms_error(o[-7:], linear_recurrence_reference(*[tail[0]] * 3, log_decay=tail[1])[0]) < 5e-3
        long = torch.randn(1, 1_000_000, 20, 128, device="cuda", dtype=torch.bfloat16)  # more than 2^31 elements
        decay = torch.full_like(long, -0.5)
        o, _ = linear_recurrence(long, long, long, log_decay=decay)
        tail = [x[:, -100:].double() for x in (long, decay)]
        want, _ = linear_recurrence_reference(*[tail[0]] * 3, log_decay=tail[1])
        assert rms_error(o[:, -10:], want[:, -10:]) < 5e-3


def test_a_new_batch_length_or_head_count_compiles_nothing() -> None:
    from kernels.vector_gates import (
        vector_gate_gradient,
        vector_gate_hopper,
        vector_gate_hopper_back,
        vector_gate_prepare,
        vector_gate_solve,
        vector_gate_walk,
    )

    kernels = (
        vector_gate_prepare.prepare_kernel,
        vector_gate_solve.solve_kernel,
        vector_gate_walk.walk_kernel,
        vector_gate_walk.reverse_kernel,
        vector_gate_hopper.walk_kernel,
        vector_gate_hopper_back.reverse_kernel,
        vector_gate_gradient.gradient_kernel,
    )

    def run(batch: int, length: int, heads: int) -> None:
        drawn = cases.draw((batch, length, heads, 64, 64), "weak", delta=True, state=False)
        narrow = {name: x.bfloat16() if name in cases.NARROW else x for name, x in drawn.items()}
        with use_backend("triton"):
            cases.with_gradients(linear_recurrence, {name: x.cuda().requires_grad_() for name, x in narrow.items()})

    require_nothing_new(kernels, run, (2, 64, 2), (1, 1, 1), (3, 77, 5), (16, 1024, 16))


@pytest.mark.parametrize("delta", [False, True])
def test_inside_a_cuda_graph(delta: bool) -> None:
    drawn = cases.draw((2, 200, 2, 64, 64), "weak", delta=delta, state=False)
    tensors = {name: x.cuda().bfloat16() for name, x in drawn.items()}
    with use_backend("triton"):
        want = cases.call(linear_recurrence, tensors)[0]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            o = cases.call(linear_recurrence, tensors)[0]
    graph.replay()
    assert torch.equal(o, want)
