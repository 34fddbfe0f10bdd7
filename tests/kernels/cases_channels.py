"""Cases of the convolutions that work channel by channel, for the interpreter and for a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.conv import channel_short_conv, gated_long_conv
from kernels.dispatch import use_backend
from tests.kernels.oracle import SINGLE, SIXTEEN_BIT, poisoned, require_close

GATED = (
    (1, 1, 1, 5, 0, 0),
    (2, 2, 2, 70, 300, 0),
    (2, 3, 3, 64, 9, 0),
    (1, 2, 70, 100, 0, 1),
    (2, 1, 33, 200, 100, 2),
    (2, 1, 2, 256, 32, 0),
)
"""Channels of a head, heads, sequences, length, taps of the shift and place of the queries: whole and broken chunks and tiles."""
SHORT = ((1, 1, 1, 1), (3, 2, 5, 3), (2, 33, 65, 4), (1, 3, 1024, 2))
"""Channels, sequences, length and taps: runs that end within a sequence and within a program."""


def convolved(x_DBT: Tensor, taps_DL: Tensor) -> Tensor:
    """The sum over earlier tokens, one tap after the other."""
    y, length = torch.zeros_like(x_DBT), x_DBT.shape[-1]
    for lag in range(min(taps_DL.shape[-1], length)):
        earlier = torch.cat((torch.zeros_like(x_DBT[..., :lag]), x_DBT[..., : length - lag]), -1)
        y = y + earlier * taps_DL[:, lag, None, None]
    return y


def gated(leaves: dict[str, Tensor], q: int) -> Tensor:
    """The definition of `gated_long_conv`."""
    parts = [*(leaves["qkv"] + leaves["bias"][:, None, None]).chunk(3)]
    queries, keys, values = parts.pop(q), *parts
    keys = convolved(keys, leaves["shift"]) if "shift" in leaves else keys
    heads = len(leaves["filter"])
    per_head = [part.unflatten(0, (-1, heads)) for part in (queries, keys, values)]
    queries, keys, values = per_head
    return torch.cat([_read(queries, keys, value, leaves["filter"]) for value in values])


def _read(queries: Tensor, keys: Tensor, value: Tensor, taps: Tensor) -> Tensor:
    """The output of one channel of each head."""
    return torch.stack([q * convolved(k * value, taps) for q, k in zip(queries, keys, strict=True)]).sum(0)


def short(leaves: dict[str, Tensor]) -> Tensor:
    """The definition of `channel_short_conv`."""
    return convolved(leaves["x"] + leaves["bias"][:, None, None], leaves["weight"].flip(1))


def gated_leaves(case: tuple[int, ...], device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Fresh arguments: those that are projected in `dtype`, parameters in fp32."""
    width, heads, batch, length, n_taps, _ = case
    leaves = {
        "qkv": torch.randn(3 * width * heads, batch, length, device=device).to(dtype),
        "bias": torch.randn(3 * width * heads, device=device),
        "filter": torch.randn(heads, length, device=device) / length**0.5,
    }
    if n_taps:
        leaves["shift"] = torch.randn(width * heads, n_taps, device=device) / n_taps**0.5
    return {name: leaf.requires_grad_() for name, leaf in leaves.items()}


def short_leaves(case: tuple[int, ...], device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """The same of the short convolution."""
    width, batch, length, taps = case
    x = torch.randn(width, batch, length, device=device).to(dtype)
    leaves = {"x": x, "bias": torch.randn(width, device=device), "weight": torch.randn(width, taps, device=device)}
    return {name: leaf.requires_grad_() for name, leaf in leaves.items()}


def differentiated(y: Tensor, leaves: dict[str, Tensor], weight: Tensor) -> dict[str, Tensor]:
    """Output and gradients."""
    gradients = torch.autograd.grad((y * weight.to(y)).sum(), list(leaves.values()))
    return {"y": y} | {f"d{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}


def in_fp64(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies for the definition."""
    return {name: leaf.detach().double().cpu().requires_grad_() for name, leaf in leaves.items()}


def called(leaves: dict[str, Tensor], q: int) -> Tensor:
    """`gated_long_conv` of leaves."""
    return gated_long_conv(leaves["qkv"], leaves["bias"], leaves["filter"], leaves.get("shift"), q=q)


def check_gated(case: tuple[int, ...], device: str, dtype: torch.dtype) -> None:
    """Output and gradients against fp64, fresh memory poisoned; repeats are equal to the bit."""
    leaves, q = gated_leaves(case, device, dtype), case[-1]
    weight = torch.randn(len(leaves["qkv"]) // 3, *case[2:4], device=device).to(dtype)
    with use_backend("triton"), poisoned():
        got = [differentiated(called(leaves, q), leaves, weight) for _ in range(3)]
    assert all(torch.equal(tensor, again[name]) for again in got[1:] for name, tensor in got[0].items())
    true = in_fp64(leaves)
    require_close(got[0], differentiated(gated(true, q), true, weight.double().cpu()), SIXTEEN_BIT)


def check_short(case: tuple[int, ...], device: str, dtype: torch.dtype) -> None:
    """The same of the short convolution."""
    leaves = short_leaves(case, device, dtype)
    weight = torch.randn(case[:3], device=device).to(dtype)
    with use_backend("triton"), poisoned():
        got = [differentiated(channel_short_conv(**_named(leaves)), leaves, weight) for _ in range(3)]
    assert all(torch.equal(tensor, again[name]) for again in got[1:] for name, tensor in got[0].items())
    true = in_fp64(leaves)
    tolerance = SINGLE if dtype == torch.float32 else SIXTEEN_BIT
    require_close(got[0], differentiated(short(true), true, weight.double().cpu()), tolerance)


def _named(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"x_DBT": leaves["x"], "bias_D": leaves["bias"], "weight_DK": leaves["weight"]}


def check_members(device: str) -> None:
    """Members with parameters of their own are one launch and come out as they do alone; so they do compiled."""
    members = [gated_leaves((2, 2, 3, 20, 9, 0), device, torch.float16) for _ in range(2)]
    stacked = {name: torch.stack([leaves[name].detach() for leaves in members]).requires_grad_() for name in members[0]}
    mapped = torch.vmap(lambda leaves: called(leaves, 0))
    with use_backend("triton"), poisoned():
        y = mapped(stacked)
        together = torch.autograd.grad(y.float().square().sum(), list(stacked.values()))
        compiled = torch.compile(mapped, backend="aot_eager", fullgraph=True)(stacked)
        again = torch.autograd.grad(compiled.float().square().sum(), list(stacked.values()))
        for index, leaves in enumerate(members):
            alone = called(leaves, 0)
            own = torch.autograd.grad(alone.float().square().sum(), list(leaves.values()))
            assert torch.equal(alone, y[index])
            assert all(torch.equal(a[index], b) for a, b in zip(together, own, strict=True))
    assert torch.equal(compiled, y)
    assert all(torch.equal(a, b) for a, b in zip(together, again, strict=True))
