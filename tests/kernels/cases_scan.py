"""Cases of the Triton elementwise scan, for the interpreter and for a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.dispatch import use_backend
from kernels.reference import scan_reference
from kernels.scan import scan
from tests.kernels.oracle import SINGLE, SIXTEEN_BIT, poisoned, require_close


def draw(shape: tuple[int, ...], *, with_state: bool) -> list[Tensor]:
    """Factors in [0, 1), zeros among them, inputs, and an initial state if asked for."""
    a = torch.rand(shape)
    a[:, ::3] = 0
    state = [torch.randn(shape[0], *shape[2:])] if with_state else []
    return [a, torch.randn(shape), *state]


def check(shape: tuple[int, ...], device: str, dtype: torch.dtype, *, with_state: bool) -> None:
    """States and all gradients against fp64."""
    tensors = [tensor.to(dtype) for tensor in draw(shape, with_state=with_state)]
    weight = torch.randn(shape)

    def run(leaves: list[Tensor], function) -> dict[str, Tensor]:
        h = function(*leaves)
        gradients = torch.autograd.grad((h * weight.to(h)).sum(), leaves)
        return {"h": h} | dict(zip(("da", "dx", "dstate"), gradients, strict=False))

    with use_backend("triton"), poisoned():
        got = run([tensor.to(device).requires_grad_() for tensor in tensors], scan)
    true = run([tensor.double().requires_grad_() for tensor in tensors], scan_reference)
    assert all(tensor.dtype == dtype for tensor in got.values())
    require_close(got, true, SINGLE if dtype == torch.float32 else SIXTEEN_BIT)


def check_members(device: str) -> None:
    """Members are one call and equal the loop; shared factors get the sum of their gradients."""
    a, x, state = (tensor.to(device).requires_grad_() for tensor in draw((6, 19, 3), with_state=True))
    weight = torch.randn(3, 2, 19, 3, device=device)
    with use_backend("triton"), poisoned():
        own_x, own_state = x.unflatten(0, (3, 2)), state.unflatten(0, (3, 2))
        together = torch.vmap(scan, (None, 0, 0))(a[:2], own_x, own_state)
        alone = torch.stack([scan(a[:2], own_x[i], own_state[i]) for i in range(3)])
        found = [torch.autograd.grad((h * weight).sum(), (a, x, state), retain_graph=True) for h in (together, alone)]
    torch.testing.assert_close(together, alone)
    torch.testing.assert_close(*found)
