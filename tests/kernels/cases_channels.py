"""Cases of the convolutions that work channel by channel, for the interpreter and for a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.conv import gated_long_conv
from kernels.dispatch import use_backend
from tests.kernels.followed_channels import followed
from tests.kernels.oracle import SIXTEEN_BIT, poisoned, require_close, rms_error

CASES = (
    (1, 1, 1, 5, 1),
    (2, 2, 2, 70, 300),
    (2, 3, 3, 64, 9),
    (1, 2, 70, 100, 100),
    (2, 1, 33, 200, 65),
    (2, 1, 2, 256, 32),
)
"""Channels of a head, heads, sequences, length and taps of the shift: whole and broken chunks and tiles."""
TURNED = {torch.bfloat16: 5e-4, torch.float16: 2e-4}
"""How far a kernel may be from its own roundings followed in fp64, since some fall the other way after sums in fp32."""
FEW = 100
"""Gradients of fewer numbers than these may all cancel, and what rounded terms leave of them can be further off than 5e-3."""


def convolved(x_DBT: Tensor, taps_DL: Tensor) -> Tensor:
    """The sum over earlier tokens, one tap after the other."""
    y, length = torch.zeros_like(x_DBT), x_DBT.shape[-1]
    for lag in range(min(taps_DL.shape[-1], length)):
        earlier = torch.cat((torch.zeros_like(x_DBT[..., :lag]), x_DBT[..., : length - lag]), -1)
        y = y + earlier * taps_DL[:, lag, None, None]
    return y


def definition(leaves: dict[str, Tensor]) -> Tensor:
    """The sums of `gated_long_conv`."""
    queries, keys, values = (leaves["qkv"] + leaves["bias"][:, None, None]).chunk(3)
    per_head = (part.unflatten(0, (-1, len(leaves["filter"]))) for part in (queries, convolved(keys, leaves["shift"]), values))
    queries, keys, values = per_head
    return torch.cat([_read(queries, keys, value, leaves["filter"]) for value in values])


def _read(queries: Tensor, keys: Tensor, value: Tensor, taps: Tensor) -> Tensor:
    """The output of one channel of each head."""
    return torch.stack([q * convolved(k * value, taps) for q, k in zip(queries, keys, strict=True)]).sum(0)


def leaves_of(case: tuple[int, ...], device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Fresh arguments: what is projected in `dtype`, parameters in fp32."""
    width, heads, batch, length, n_taps = case
    leaves = {
        "qkv": torch.randn(3 * width * heads, batch, length, device=device).to(dtype),
        "bias": torch.randn(3 * width * heads, device=device),
        "filter": torch.randn(heads, length, device=device) / length**0.5,
        "shift": torch.randn(width * heads, n_taps, device=device) / n_taps**0.5,
    }
    return {name: leaf.requires_grad_() for name, leaf in leaves.items()}


def differentiated(y: Tensor, leaves: dict[str, Tensor], weight: Tensor) -> dict[str, Tensor]:
    """Output and gradients."""
    gradients = torch.autograd.grad((y * weight.to(y)).sum(), list(leaves.values()))
    return {"y": y} | {f"d{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}


def in_fp64(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies for the definition."""
    return {name: leaf.detach().double().cpu().requires_grad_() for name, leaf in leaves.items()}


def check(case: tuple[int, ...], device: str, dtype: torch.dtype) -> None:
    """Output and gradients, fresh memory poisoned; repeats are equal to the bit."""
    leaves = leaves_of(case, device, dtype)
    weight = torch.randn(len(leaves["qkv"]) // 3, *case[2:4], device=device).to(dtype)
    with use_backend("triton"), poisoned():
        got = [differentiated(gated_long_conv(*leaves.values()), leaves, weight) for _ in range(3)]
    assert all(torch.equal(tensor, again[name]) for again in got[1:] for name, tensor in got[0].items())
    require_right(got[0], leaves, weight)


def require_right(got: dict[str, Tensor], leaves: dict[str, Tensor], weight: Tensor) -> None:
    """Everything within `TURNED` of the kernels' roundings followed in fp64, and within 5e-3 of the definition without any.

    Gradients of fewer than `FEW` biases or taps of the shift may be further from the definition than 5e-3, but not by more than
    1.1 times what these roundings alone are: 9.2e-3 for six biases whose gradients cancel, on draws of a GPU.
    """
    own, exact = followed(leaves, weight, weight.dtype), in_fp64(leaves)
    true = differentiated(definition(exact), exact, weight.double().cpu())
    few = {name: 1.1 * rms_error(own[name], true[name]) for name in ("dbias", "dshift") if own[name].numel() < FEW}
    require_close(got, own, TURNED[weight.dtype])
    require_close(got, true, {"other": SIXTEEN_BIT} | {name: max(SIXTEEN_BIT, allowed) for name, allowed in few.items()})


def check_members(device: str) -> None:
    """Members with parameters of their own are one launch and come out as they do alone; so they do compiled."""
    members = [leaves_of((2, 2, 3, 20, 9), device, torch.float16) for _ in range(2)]
    stacked = {name: torch.stack([leaves[name].detach() for leaves in members]).requires_grad_() for name in members[0]}
    mapped = torch.vmap(lambda leaves: gated_long_conv(*leaves.values()))
    with use_backend("triton"), poisoned():
        y = mapped(stacked)
        together = torch.autograd.grad(y.float().square().sum(), list(stacked.values()))
        compiled = torch.compile(mapped, backend="aot_eager", fullgraph=True)(stacked)
        again = torch.autograd.grad(compiled.float().square().sum(), list(stacked.values()))
        for index, leaves in enumerate(members):
            alone = gated_long_conv(*leaves.values())
            own = torch.autograd.grad(alone.float().square().sum(), list(leaves.values()))
            assert torch.equal(alone, y[index])
            assert all(torch.equal(a[index], b) for a, b in zip(together, own, strict=True))
    assert torch.equal(compiled, y)
    assert all(torch.equal(a, b) for a, b in zip(together, again, strict=True))
