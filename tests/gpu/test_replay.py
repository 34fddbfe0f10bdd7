"""A call that repeats what was noted of an earlier one gives what the operators' own Python gives, for every timed kernel."""

from __future__ import annotations

import pytest
import torch

from bench.throughput.draws import Draw
from bench.throughput.kernels import OPERATIONS
from bench.throughput.names import KERNELS, KernelName
from bench.throughput.problem import Problem, Tensors
from kernels import _replay
from tests.kernels.oracle import poisoned

pytestmark = pytest.mark.gpu

BATCH, LENGTH, HEADS, WIDTH = 64, 256, 2, 64


def outcome(problem: Problem) -> Tensors:
    """Outputs and gradients."""
    return problem.run(problem.call, problem.leaves(), gradients=True)


@pytest.mark.parametrize("name", [name for name in KERNELS if name != "attention"])
def test_repeated_calls(name: KernelName) -> None:
    draw = Draw(torch.device("cuda"), torch.bfloat16, torch.Generator("cuda").manual_seed(0))
    shape = KERNELS[name].shape(BATCH, LENGTH, HEADS, WIDTH)
    one, other = (OPERATIONS[name].problem(shape, "train", draw) for _ in range(2))
    _replay.forget()
    wanted = outcome(one)
    outcome(one)  # watched
    with poisoned():
        got, got_other = outcome(one), outcome(other)
    plans = [plan for repeated in _replay.functions() for plan in repeated.plans.values()]
    assert any(isinstance(plan, _replay.Plan) for plan in plans)
    assert not any(isinstance(plan, _replay.Unseen) for plan in plans)
    _replay.forget()
    wanted_other = outcome(other)
    for x, want in ((got, wanted), (got_other, wanted_other)):
        for key in want:
            torch.testing.assert_close(x[key], want[key], rtol=0, atol=0)
