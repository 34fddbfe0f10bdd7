"""Inputs of the recurrence, with and without the delta rule, and its Triton forms in fp32 against the token loop in fp64."""

import torch
from torch.func import vmap
from torch.nn import functional as F

from kernels.recurrence import linear_recurrence
from kernels.reference import linear_recurrence_reference
from tests.kernels.oracle import SINGLE, rms_error


def draw(shape, gate, *, state, beta=None, seed=0, dtype=torch.float64):
    """Without `beta` no delta rule; with it keys of unit length, and write strengths up to it."""
    batch, length, groups, heads, k_dim, v_dim = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    def uniform():
        return torch.rand(batch, length, heads, generator=generator, dtype=torch.float64)

    rates = normal(batch, length, heads).abs()
    decays = {"none": None, "constant": -rates[0, 0], "scalar": -rates, "strong": -10 * uniform(), "zero": 0 * rates}
    decays["rare"] = torch.where(torch.arange(length)[None, :, None] % 19 == 7, -20.0, -rates / 8)
    q, k = (normal(batch, length, groups, k_dim) for _ in range(2))
    tensors = {
        "q": q,
        "k": k * k_dim**-0.5 if beta is None else F.normalize(k, dim=-1),
        "v": normal(batch, length, heads, v_dim),
        "beta_BTH": None if beta is None else beta * uniform(),
        "log_decay": decays[gate],
        "state_BHKV": normal(batch, heads, k_dim, v_dim) if state else None,
    }
    return {name: x.to(dtype).requires_grad_() for name, x in tensors.items() if x is not None}


def call(function, tensors):
    o, final = function(tensors["q"], tensors["k"], tensors["v"], **{n: x for n, x in tensors.items() if n not in ("q", "k", "v")})
    return (o,) if final is None else (o, final)


def weighted(outputs):
    generator = torch.Generator().manual_seed(1)
    return sum((o * torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.dtype)).sum() for o in outputs)


def run(function, tensors):
    outputs = call(function, tensors)
    return [x.detach() for x in (*outputs, *torch.autograd.grad(weighted(outputs), list(tensors.values())))]


def check(shape, gate, *, state, beta=None):
    exact = draw(shape, gate, state=state, beta=beta)
    single = {name: x.detach().float().requires_grad_() for name, x in exact.items()}
    got, want = run(linear_recurrence, single), run(linear_recurrence_reference, exact)
    if not state:
        want.pop(1)  # the definition returns its state in any case
        want[1:] = torch.autograd.grad(weighted(call(linear_recurrence_reference, exact)[:1]), list(exact.values()))
    for name, a, b in zip(["o", *(["final"] if state else []), *exact], got, want, strict=True):
        # Gradients of strong decays are small differences of large sums.
        assert rms_error(a, b) <= (1e-3 if name == "log_decay" else SINGLE), (shape, name)


def check_vmap(members):
    """Mapped over members in fp32 against one after the other: outputs and gradients."""
    names, count = list(members[0]), len(members)
    stacked = {name: torch.stack([m[name].detach() for m in members]).requires_grad_() for name in names}
    mapped = vmap(lambda *values: call(linear_recurrence, dict(zip(names, values, strict=True))))(*stacked.values())
    got = torch.autograd.grad(weighted(mapped), list(stacked.values()))
    looped = [torch.stack(parts) for parts in zip(*(call(linear_recurrence, m) for m in members), strict=True)]
    want = torch.autograd.grad(weighted(looped), [m[name] for name in names for m in members])
    for a, b in zip(mapped, looped, strict=True):
        torch.testing.assert_close(a, b)
    for index, name in enumerate(names):
        alone = torch.stack(want[count * index : count * (index + 1)])
        torch.testing.assert_close(got[index], alone, rtol=1e-4, atol=1e-5, msg=name)
