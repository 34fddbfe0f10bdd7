"""Packed sequences against the same sequences one by one, for every form of the recurrence."""

import itertools

import torch

from kernels.reference import linear_recurrence_reference
from tests.kernels.oracle import SINGLE, rms_error

GATES = ("none", "constant", "scalar", "strong", "vector")


def draw_packed(gate, *, state, bounds, delta=False):
    """One row of sequences, two heads; keys of one group unless a gate forbids it."""
    generator = torch.Generator().manual_seed(3)
    length, heads, k_dim, v_dim = bounds[-1], 2, 16, 20
    groups = heads if gate == "vector" or delta else 1

    def normal(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    rates = normal(1, length, heads).abs()
    decays = {"none": None, "constant": -rates[0, 0], "scalar": -rates, "strong": -5 * rates}
    decays["vector"] = -normal(1, length, heads, k_dim).abs()
    keys = normal(1, length, groups, k_dim)
    tensors = {
        "q": normal(1, length, groups, k_dim),
        "k": keys / keys.norm(dim=-1, keepdim=True),
        "v": normal(1, length, heads, v_dim),
        "log_decay": decays[gate],
        "beta_BTH": normal(1, length, heads).sigmoid() if delta else None,
        "state_BHKV": normal(len(bounds) - 1, heads, k_dim, v_dim) if state else None,
    }
    return {name: x for name, x in tensors.items() if x is not None}


def one_by_one(tensors, bounds):
    """Outputs in one row, and the states of all sequences, by the token loop."""
    outputs, states = [], []
    for n, (start, stop) in enumerate(itertools.pairwise(bounds)):
        parts = {name: x[:, start:stop] if x.ndim > 1 else x for name, x in tensors.items() if name != "state_BHKV"}
        if "state_BHKV" in tensors:
            parts["state_BHKV"] = tensors["state_BHKV"][n : n + 1]
        q, k, v = (parts.pop(name) for name in "qkv")
        o, final = linear_recurrence_reference(q, k, v, **parts)
        outputs.append(o)
        states.append(final)
    return torch.cat(outputs, 1), torch.cat(states)


def check_packed(function, gate, *, state, bounds, delta=False):
    """Outputs, final states and all gradients."""
    exact = {name: x.requires_grad_() for name, x in draw_packed(gate, state=state, bounds=bounds, delta=delta).items()}
    single = {name: x.detach().float().requires_grad_() for name, x in exact.items()}
    given = dict(single)
    q, k, v = (given.pop(name) for name in "qkv")
    got = function(q, k, v, **given, cu_seqlens=torch.tensor(bounds))
    want = one_by_one(exact, bounds)
    assert (got[1] is None) == (not state)
    pairs = [(a, b) for a, b in zip(got, want, strict=True) if a is not None]
    weights = [torch.randn(b.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64) for _, b in pairs]
    losses = [sum((x * w.to(x.dtype)).sum() for x, w in zip(side, weights, strict=True)) for side in zip(*pairs, strict=True)]
    gradients = zip(
        torch.autograd.grad(losses[0], list(single.values())), torch.autograd.grad(losses[1], list(exact.values())), strict=True
    )
    for name, (a, b) in zip(("o", "final")[: len(pairs)] + tuple(exact), (*pairs, *gradients), strict=True):
        assert rms_error(a, b) <= (1e-3 if name == "log_decay" else SINGLE), name
