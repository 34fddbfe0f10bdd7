"""Packed sequences of any recurrence in the forms that run on a CPU."""

import pytest
import torch

from kernels.dispatch import use_backend
from kernels.recurrence import linear_recurrence
from tests.kernels.cases_packing import GATES, check_packed

BOUNDS = (0, 5, 6, 80, 97)


@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("delta", [False, True])
def test_packed_sequences_are_separate_ones(backend, gate, delta):
    with use_backend(backend):
        check_packed(linear_recurrence, gate, state=gate != "none", bounds=BOUNDS, delta=delta)


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ([0, 4, 9], "rise from 0 to 10"),
        ([0, 4, 4, 10], "no sequence may be empty"),
        ([1, 10], "rise from 0 to 10"),
        ([0], r"it must be \[N \+ 1\]"),
    ],
)
def test_bounds_that_are_none(bounds, message):
    x = torch.randn(1, 10, 1, 8)
    with pytest.raises(ValueError, match=message):
        linear_recurrence(x, x, x, cu_seqlens=torch.tensor(bounds))


def test_other_bad_packing():
    x, bounds = torch.randn(1, 10, 1, 8), torch.tensor([0, 4, 10])
    with pytest.raises(ValueError, match="the batch is one row of packed sequences"):
        linear_recurrence(*[x.expand(2, -1, -1, -1)] * 3, cu_seqlens=bounds)
    with pytest.raises(ValueError, match="it must be int32 or int64"):
        linear_recurrence(x, x, x, cu_seqlens=bounds.float())
    with pytest.raises(ValueError, match=r"state has shape \(1, 1, 8, 8\); .* it is \(2, 1, 8, 8\)"):
        linear_recurrence(x, x, x, cu_seqlens=bounds, state_BHKV=torch.zeros(1, 1, 8, 8))
