"""Cases of the norms between layers, for the interpreter and for a GPU."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.dispatch import use_backend
from kernels.norms import layer_norm, norm_pair, stream_norm
from tests.kernels.oracle import SINGLE, SIXTEEN_BIT, poisoned, require_close

SHAPES = ((1, 1, 24), (2, 3, 5), (3, 70, 33), (2, 65, 128))
"""Batch, length and width: less than a tile, broken tiles, more than one program."""


def inputs(shape: tuple[int, int, int], dtype: torch.dtype, norms: int) -> dict[str, Tensor]:
    """A residual stream in `dtype`, off zero, and fp32 parameters."""
    tensors = {"r": (torch.randn(shape) + 0.5).to(dtype)}
    for index in range(norms):
        tensors |= {f"weight{index}": torch.randn(shape[-1]), f"bias{index}": torch.randn(shape[-1])}
    return tensors


def rows_of(batch: int, length: int) -> Tensor:
    """Distinct positions in no order, and one more that repeats the first: padding, which gets no gradient."""
    some = torch.stack([torch.randperm(length)[: max(1, length // 3)] for _ in range(batch)])
    return torch.cat((some, some[:, :1]), 1)


def _gradients(leaves: dict[str, Tensor], outputs: dict[str, Tensor], weights: dict[str, Tensor]) -> dict[str, Tensor]:
    loss = sum((outputs[name] * weight.to(outputs[name])).sum() for name, weight in weights.items())
    found = torch.autograd.grad(loss, list(leaves.values()))
    return outputs | {f"d{name}": gradient for name, gradient in zip(leaves, found, strict=True)}


def check_layer_norm(shape: tuple[int, int, int], device: str, dtype: torch.dtype, backend: str) -> None:
    """Output and all gradients against torch's own in fp64."""
    tensors, weights = inputs(shape, dtype, 1), {"y": torch.randn(shape)}

    def run(leaves: dict[str, Tensor], call) -> dict[str, Tensor]:
        return _gradients(leaves, {"y": call(leaves["r"], leaves["weight0"], leaves["bias0"])}, weights)

    with use_backend(backend), poisoned():
        leaves = {name: tensor.to(device).requires_grad_() for name, tensor in tensors.items()}
        got = run(leaves, lambda x, *norm: layer_norm(x, norm))
    true = run(
        {name: tensor.double().requires_grad_() for name, tensor in tensors.items()},
        lambda x, *norm: F.layer_norm(x, shape[-1:], *norm),
    )
    assert got["y"].dtype == dtype
    require_close(got, true, SINGLE if dtype == torch.float32 else SIXTEEN_BIT)


def check_pair(shape: tuple[int, int, int], device: str, dtype: torch.dtype, backend: str, *, at_rows: bool) -> None:
    """Both outputs and all gradients against fp64; chosen positions may repeat where they have no gradient."""
    batch, length, width = shape
    rows = rows_of(batch, length) if at_rows else None
    tensors, weights = inputs(shape, dtype, 2), {"s": torch.randn(shape), "y": torch.randn(shape)}
    if rows is not None:
        weights |= {name: torch.randn(*rows.shape, width) for name in ("s", "picked")}
        weights["s"][:, -1] = weights["picked"][:, -1] = 0

    def run(leaves: dict[str, Tensor], call) -> dict[str, Tensor]:
        r, *norms = leaves.values()
        return _gradients(leaves, dict(zip(("s", "y", "picked"), call(r, norms[:2], norms[2:]), strict=False)), weights)

    def definition(r: Tensor, first, second) -> tuple[Tensor, ...]:
        s = r + F.layer_norm(r, (width,), *first)
        y = F.layer_norm(s, (width,), *second)
        if rows is None:
            return s, y
        return s.gather(1, rows[..., None].expand(-1, -1, width)), y, y.gather(1, rows[..., None].expand(-1, -1, width))

    with use_backend(backend), poisoned():
        leaves = {name: tensor.to(device).requires_grad_() for name, tensor in tensors.items()}
        chosen = None if rows is None else rows.to(device)
        got = run(leaves, lambda r, *norms: [out for out in norm_pair(r, *norms, chosen) if out is not None])
    true = run({name: tensor.double().requires_grad_() for name, tensor in tensors.items()}, definition)
    assert got["s"].dtype == got["y"].dtype == dtype
    require_close(got, true, 2 * SINGLE if dtype == torch.float32 else SIXTEEN_BIT)


def check_stream(shape: tuple[int, int, int], device: str, dtype: torch.dtype, backend: str) -> None:
    """The RMS norm of a stream and its gradients against fp64; chosen positions may repeat where they have no gradient."""
    batch, length, width = shape
    rows = rows_of(batch, length)
    tensors = {"r": (torch.randn(shape) + 0.5).to(dtype), "weight": torch.randn(width)}
    weights = {"y": torch.randn(shape)} | {name: torch.randn(*rows.shape, width) for name in ("r", "picked")}
    weights["r"][:, -1] = weights["picked"][:, -1] = 0

    def run(leaves: dict[str, Tensor], call) -> dict[str, Tensor]:
        r, y, picked = call(leaves["r"], leaves["weight"])
        loss = sum((x * weights[name].to(x)).sum() for name, x in (("r", r), ("y", y), ("picked", picked)))
        dr, dweight = torch.autograd.grad(loss, list(leaves.values()))
        return {"r": r, "y": y, "picked": picked, "dr": dr, "dweight": dweight}

    def definition(r: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        y, at = F.rms_norm(r, (width,), weight, 1e-5), rows[..., None].expand(-1, -1, width)
        return r.gather(1, at), y, y.gather(1, at)

    with use_backend(backend), poisoned():
        leaves = {name: tensor.to(device).requires_grad_() for name, tensor in tensors.items()}
        got = run(leaves, lambda r, weight: stream_norm(r, weight, rows.to(device)))
    true = run({name: tensor.double().requires_grad_() for name, tensor in tensors.items()}, definition)
    assert got["r"].dtype == got["y"].dtype == got["picked"].dtype == dtype
    require_close(got, true, SINGLE if dtype == torch.float32 else SIXTEEN_BIT)


def check_members(device: str, backend: str) -> None:
    """Members with parameters of their own are one call and equal the loop."""
    r = torch.randn(3, 2, 21, 8, device=device, requires_grad=True)
    parameters = [torch.randn(3, 8, device=device, requires_grad=True) for _ in range(4)]
    rows = torch.stack([rows_of(2, 21) for _ in range(3)]).to(device)
    leaves = (r, *parameters)

    def call(r: Tensor, *rest: Tensor) -> Tensor:
        s, y, picked = norm_pair(r, rest[:2], rest[2:4], rest[4] if len(rest) > 4 else None)
        more = 0.0 if picked is None else picked.exp().sum()
        if picked is not None:
            more = more + sum(x.sin().sum() for x in stream_norm(r, rest[0], rest[4]))
        return s.sin().sum() + y.cos().sum() + layer_norm(r, rest[:2]).square().sum() + more

    with use_backend(backend), poisoned():
        for more in ((), (rows[..., :-1],)):
            together = torch.vmap(call)(r, *parameters, *more)
            alone = torch.stack([call(*(tensor[i] for tensor in (r, *parameters, *more))) for i in range(3)])
            torch.testing.assert_close(together, alone)
            torch.testing.assert_close(*(torch.autograd.grad(y.sum(), leaves) for y in (together, alone)), rtol=1e-4, atol=1e-4)
