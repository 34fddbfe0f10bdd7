"""Values that are wider than the walks of the delta rule: their parts are heads, and nothing else changes."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from kernels import chunked, recurrence
from kernels.delta_rule import delta_op

NAMES = ("q", "k", "v", "beta_BTH", "log_decay", "state_BHKV")


def draw(gate: str | None) -> dict[str, torch.Tensor | None]:
    """Two heads of values, 192 and so 2 x 96 wide, that share one of queries and keys, in fp64."""
    g = torch.Generator().manual_seed(0)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=g, dtype=torch.float64)

    q, k = (F.normalize(normal(2, 37, 1, 12), dim=-1) for _ in range(2))
    decay = {None: None, "constant": -normal(1, 2).abs() / 8, "scalar": -normal(2, 37, 2).abs() / 8}[gate]
    given = q, k, normal(2, 37, 2, 192), torch.rand(2, 37, 2, generator=g, dtype=torch.float64), decay, normal(2, 2, 12, 192)
    return {name: None if x is None else x.requires_grad_() for name, x in zip(NAMES, given, strict=True)}


@pytest.mark.parametrize("gate", [None, "constant", "scalar"])
def test_parts_of_wide_values_are_heads(gate: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    widths = []

    def narrow(q, k, v, beta, log_decay, state, return_state):
        widths.append(v.shape[2:])
        decay = log_decay if log_decay is None or log_decay.ndim == 3 else log_decay[0]
        return chunked.linear_recurrence(q, k, v, chunk=16, log_decay=decay, beta_BTH=beta, state_BHKV=state)

    monkeypatch.setattr(delta_op, "delta_rule", narrow)
    found = []
    for function in (recurrence._delta_rule, narrow):
        given = draw(gate)
        q, k, v, beta, decay, state = given.values()
        o, final = function(q, k, v, beta, decay, state, True)
        weight = torch.linspace(-1, 1, o.numel(), dtype=torch.float64).view(o.shape)
        inputs = [x for x in given.values() if x is not None]
        grads = torch.autograd.grad((o * weight).sum() + final.square().sum(), inputs)
        found.append((o, final, *grads))
    assert widths == [(4, 96), (2, 192)]
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10)
