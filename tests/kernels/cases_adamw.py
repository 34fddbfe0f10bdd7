"""Cases of the fleet's AdamW step, for the interpreter and for a GPU."""

from __future__ import annotations

import torch

from kernels.adamw import adamw_step
from kernels.dispatch import use_backend
from tests.kernels.oracle import SINGLE, require_close

SHAPES = ((1, 1), (2, 7), (3, 1024), (2, 2500))
DECAY = 0.1


def check_steps(members: int, parameters: int, device: str, backend: str) -> None:
    """Three steps against the algorithm in fp64, one member with a rate of zero; nothing but the arguments is kept."""
    rates = torch.linspace(0, 0.05, members, dtype=torch.float64) if members > 1 else torch.tensor([0.05], dtype=torch.float64)
    weights = torch.randn(members, parameters, dtype=torch.float64)
    first, second = torch.zeros_like(weights), torch.zeros_like(weights)
    got = [tensor.float().to(device) for tensor in (weights, first, second)]
    steps = torch.zeros(members, device=device)
    for step in range(1, 4):
        gradient = torch.randn(members, parameters, dtype=torch.float64)
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        weights = weights - rates[:, None] * DECAY * weights
        weights = weights - rates[:, None] * (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
        with use_backend(backend):
            adamw_step(got[0], gradient.float().to(device), *got[1:], rates.float().to(device), steps, weight_decay=DECAY)
    names = ("weights", "first", "second")
    require_close(dict(zip(names, got, strict=True)), dict(zip(names, (weights, first, second), strict=True)), SINGLE)
    assert steps.tolist() == [3] * members
