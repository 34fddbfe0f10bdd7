"""Cases of reading a sequence for a few queries, for the interpreter and for a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.dispatch import use_backend
from kernels.rows import read_rows
from tests.kernels.oracle import SINGLE, SIXTEEN_BIT, poisoned, require_close

SHAPES = ((1, 1, 1, 1, 1), (2, 2, 3, 7, 5), (2, 1, 20, 70, 33), (1, 3, 7, 64, 64))
"""Batch, heads, rows, length and width: broken and whole tiles of rows and tokens."""
WEIGHTS = (("softmax", None), ("taylor", 1e-6), ("taylor", None))


def by_definition(q: Tensor, x: Tensor, rows: Tensor, weights: str, eps: float | None, window: int | None) -> Tensor:
    """Row by row."""
    batch, heads, most, width = q.shape
    out = torch.zeros(batch, heads, most, width, dtype=q.dtype)
    for b, h, m in torch.cartesian_prod(*(torch.arange(n) for n in (batch, heads, most))).reshape(-1, 3).tolist():
        last = int(rows[b, m])
        seen = x[b, 0 if window is None else max(0, last - window + 1) : last + 1]
        scores = seen @ q[b, h, m]
        found = scores.exp() / scores.exp().sum() if weights == "softmax" else 1 + scores + scores**2 / 2
        out[b, h, m] = (found if eps is None else found / (found.sum() + eps)) @ seen
    return out


def check(
    shape: tuple[int, int, int, int, int], kind: tuple[str, float | None], window: int | None, device: str, dtype: torch.dtype
) -> None:
    """Sums and both gradients against fp64."""
    batch, heads, most, length, width = shape
    tensors = {
        "q": (torch.randn(batch, heads, most, width) * width**-0.5).to(dtype),
        "x": torch.randn(batch, length, width).to(dtype),
    }
    rows, weight = torch.randint(length, (batch, most)), torch.randn(batch, heads, most, width)

    def run(leaves: dict[str, Tensor], call) -> dict[str, Tensor]:
        y = call(leaves["q"], leaves["x"])
        gradients = torch.autograd.grad((y * weight.to(y)).sum(), list(leaves.values()))
        return {"y": y} | {f"d{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}

    weights, eps = kind
    with use_backend("triton"), poisoned():
        leaves = {name: tensor.to(device).requires_grad_() for name, tensor in tensors.items()}
        got = run(leaves, lambda q, x: read_rows(q, x, rows.to(device), weights=weights, eps=eps, window=window))
    true = run(
        {name: tensor.double().requires_grad_() for name, tensor in tensors.items()},
        lambda q, x: by_definition(q, x, rows, weights, eps, window),
    )
    assert got["y"].dtype == dtype
    require_close(got, true, SINGLE if dtype == torch.float32 else 2 * SIXTEEN_BIT)


def check_torch_form(shape: tuple[int, int, int, int, int], kind: tuple[str, float | None], window: int | None) -> None:
    """The form that a CPU runs, in fp64."""
    batch, heads, most, length, width = shape
    q, x = torch.randn(batch, heads, most, width, dtype=torch.float64), torch.randn(batch, length, width, dtype=torch.float64)
    rows = torch.randint(length, (batch, most))
    weights, eps = kind
    got = read_rows(q, x, rows, weights=weights, eps=eps, window=window)
    require_close({"y": got}, {"y": by_definition(q, x, rows, weights, eps, window)}, 1e-12)


def check_members(device: str) -> None:
    """Members are one call and equal the loop."""
    q = torch.randn(3, 2, 1, 4, 8, device=device, requires_grad=True)
    x = torch.randn(3, 2, 9, 8, device=device, requires_grad=True)
    rows = torch.randint(9, (3, 2, 4), device=device)

    def call(q: Tensor, x: Tensor, rows: Tensor) -> Tensor:
        return read_rows(q, x, rows, weights="softmax")

    with use_backend("triton"), poisoned():
        together = torch.vmap(call)(q, x, rows)
        alone = torch.stack([call(q[i], x[i], rows[i]) for i in range(3)])
        torch.testing.assert_close(together, alone)
        torch.testing.assert_close(*(torch.autograd.grad(y.sin().sum(), (q, x)) for y in (together, alone)))
