"""Cases of the Triton selective scan, for the interpreter and for a GPU."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.dispatch import use_backend
from kernels.reference import scan_reference
from kernels.scan import gated_selective_scan, selective_scan
from tests.kernels.oracle import poisoned, require_close

SINGLE = {"drate": 1e-4, "ddt": 3e-5, "other": 1e-5}
SIXTEEN_BIT = {"drate": 2e-2, "ddt": 2e-2, "other": 5e-3}
NAMES = ("dx", "ddt", "drate", "db", "dc", "dstate")


def draw(
    batch: int, length: int, width: int, n_states: int, *, strength: float = 1.0, leading: tuple[int, ...] = ()
) -> list[Tensor]:
    """x, dt, rate, b, c and an initial state; decays of exp(-strength) are typical, and some time steps are zero."""
    shapes = ((batch, length, width),) * 2 + ((width, n_states),) + ((batch, length, n_states),) * 2 + ((batch, width, n_states),)
    tensors = [torch.randn(*leading, *shape) for shape in shapes]
    tensors[1] = tensors[1].abs()
    tensors[1][..., ::3, :] = 0
    tensors[2] = strength * tensors[2].abs()
    return tensors


def by_definition(x: Tensor, dt: Tensor, rate: Tensor, b: Tensor, c: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The recurrence token by token."""
    h = scan_reference(torch.exp(-dt[..., None] * rate), (dt * x)[..., None] * b[:, :, None], state)
    return (h * c[:, :, None]).sum(-1), h[:, -1]


def with_gradients(call, leaves: list[Tensor], weight: Tensor, final_weight: Tensor, names=NAMES) -> dict[str, Tensor]:
    """Outputs and the gradients of a random functional of both."""
    y, final = call(*leaves)
    total = (y * weight.to(y)).sum() + (final * final_weight.to(final)).sum()
    return {"y": y, "final": final} | dict(zip(names, torch.autograd.grad(total, leaves), strict=True))


def check(shape: tuple[int, int, int, int], device: str, dtype: torch.dtype, *, strength: float = 1.0) -> None:
    """Outputs and all gradients against fp64; x, b and c in `dtype`, the rest in fp32 as in the mixer."""
    tensors = draw(*shape, strength=strength)
    narrow = (dtype, torch.float32, torch.float32, dtype, dtype, torch.float32)
    rounded = [tensor.to(kind) for tensor, kind in zip(tensors, narrow, strict=True)]
    weights = torch.randn(shape[:3]), torch.randn(shape[0], shape[2], shape[3])
    leaves = [tensor.to(device).requires_grad_() for tensor in rounded]
    with use_backend("triton"), poisoned():
        got = with_gradients(selective_scan, leaves, *(weight.to(device) for weight in weights))
    assert got["y"].dtype == got["dx"].dtype == got["db"].dtype == dtype
    exact = [tensor.double().requires_grad_() for tensor in rounded]
    true = with_gradients(by_definition, exact, *weights)
    require_close(got, true, SINGLE if dtype == torch.float32 else SIXTEEN_BIT)


def check_stepped(shape: tuple[int, int, int, int], device: str, dtype: torch.dtype) -> None:
    """Time steps before their bias and softplus, in `dtype` too; as `check`."""
    x, _, rate, b, c, state = draw(*shape)
    narrow = [x, 2 * torch.randn(x.shape) - 1, b, c]
    leaves = [tensor.to(dtype) for tensor in narrow] + [rate, state, torch.randn(shape[2]), torch.randn(shape[2])]
    weights = torch.randn(x.shape), torch.randn(state.shape)

    def call(x, raw_dt, b, c, rate, state, bias, skip) -> tuple[Tensor, Tensor]:
        return selective_scan(x, raw_dt, rate, b, c, state, dt_bias_D=bias, skip_D=skip)

    def defined(x, raw_dt, b, c, rate, state, bias, skip) -> tuple[Tensor, Tensor]:
        y, final = by_definition(x, F.softplus(raw_dt + bias), rate, b, c, state)
        return y + skip * x, final

    names = ("dx", "ddt", "db", "dc", "drate", "dstate", "dbias", "dskip")
    with use_backend("triton"), poisoned():
        ours = [tensor.to(device).requires_grad_() for tensor in leaves]
        got = with_gradients(call, ours, *(weight.to(device) for weight in weights), names)
    assert got["y"].dtype == got["ddt"].dtype == dtype
    true = with_gradients(defined, [tensor.double().requires_grad_() for tensor in leaves], *weights, names)
    require_close(got, true, SINGLE if dtype == torch.float32 else SIXTEEN_BIT)


def check_gated(shape: tuple[int, int, int, int], device: str, dtype: torch.dtype) -> None:
    """Mamba's whole block between its projections, with a gate that lies in rows of twice its width; as `check`."""
    batch, length, width, _ = shape
    x, _, rate, b, c, state = draw(*shape)
    narrow = [x, 2 * torch.randn(x.shape), b, c, torch.randn(batch, length, 2 * width)]
    leaves = [tensor.to(dtype) for tensor in narrow] + [rate, state, torch.randn(width), torch.randn(width)]
    weights = torch.randn(x.shape), torch.randn(state.shape)

    def call(x, raw_dt, b, c, gates, rate, state, bias, skip) -> tuple[Tensor, Tensor]:
        around = {"dt_bias_D": bias, "skip_D": skip, "gate_BTD": gates[..., width:]}
        return gated_selective_scan(x, raw_dt, rate, b, c, state, **around)

    def defined(x, raw_dt, b, c, gates, rate, state, bias, skip) -> tuple[Tensor, Tensor]:
        y, final = by_definition(x, F.softplus(raw_dt + bias), rate, b, c, state)
        return (y + skip * x) * F.silu(gates[..., width:]), final

    names = ("dx", "ddt", "db", "dc", "dgate", "drate", "dstate", "dbias", "dskip")
    with use_backend("triton"), poisoned():
        ours = [tensor.to(device).requires_grad_() for tensor in leaves]
        got = with_gradients(call, ours, *(weight.to(device) for weight in weights), names)
    assert got["y"].dtype == got["dx"].dtype == got["dgate"].dtype == dtype
    true = with_gradients(defined, [tensor.double().requires_grad_() for tensor in leaves], *weights, names)
    require_close(got, true, SINGLE if dtype == torch.float32 else SIXTEEN_BIT)


def check_members(device: str, shape: tuple[int, int, int, int] = (2, 17, 3, 2), dtype: torch.dtype = torch.float32) -> None:
    """Members with rates of their own are one call and equal the loop; without a state, as in training."""
    kinds = dtype, torch.float32, torch.float32, dtype, dtype
    leaves = [tensor.to(device, kind).requires_grad_() for tensor, kind in zip(draw(*shape, leading=(3,)), kinds, strict=False)]
    bias, skip = (torch.randn(3, shape[2], device=device, requires_grad=True) for _ in range(2))
    weight = torch.randn(3, *shape[:3], device=device)

    def call(x: Tensor, dt: Tensor, rate: Tensor, b: Tensor, c: Tensor, bias: Tensor, skip: Tensor) -> Tensor:
        return selective_scan(x, dt, rate, b, c)[0] + selective_scan(x, dt, rate, b, c, dt_bias_D=bias, skip_D=skip)[0]

    with use_backend("triton"), poisoned():
        together = torch.vmap(call)(*leaves, bias, skip)
        alone = torch.stack([call(*own) for own in zip(*leaves, bias, skip, strict=True)])
        found = [torch.autograd.grad((y * weight).sum(), (*leaves, bias, skip)) for y in (together, alone)]
    torch.testing.assert_close(together, alone)
    torch.testing.assert_close(*found)


def check_shared_input(device: str) -> None:
    """Members that share their input and differ in their rates."""
    x, dt, _, b, c, state = (tensor.to(device) for tensor in draw(2, 17, 3, 2))
    rates = torch.rand(3, 3, 2, device=device, requires_grad=True)
    with use_backend("triton"):
        together, finals = torch.vmap(selective_scan, (None, None, 0, None, None, None))(x, dt, rates, b, c, state)
        alone = [selective_scan(x, dt, rate, b, c, state) for rate in rates]
        torch.testing.assert_close(together, torch.stack([y for y, _ in alone]))
        torch.testing.assert_close(finals, torch.stack([final for _, final in alone]))
        both = (torch.autograd.grad(y.square().sum(), rates)[0] for y in (together, torch.stack([y for y, _ in alone])))
    torch.testing.assert_close(*both)
