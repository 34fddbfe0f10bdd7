"""The chunked recurrences against their token loops in fp64: values, states and all gradients; then fp32 and stability."""

import pytest
import torch
from torch.nn import functional as F

from kernels.chunked import dplr_recurrence, linear_recurrence
from kernels.chunks.chunk_decay import Lift
from kernels.reference import dplr_reference, linear_recurrence_reference

LENGTHS = (1, 2, 15, 16, 17, 63, 64, 65, 130)
DECAYS = ("none", "constant", "scalar", "vector", "strong scalar", "strong vector", "zero", "bursts")
BATCH, HEADS, KEY, VALUE = 2, 2, 4, 5


def draw(length, decay, seed=0, dtype=torch.float64):
    """Inputs of the recurrence by argument name; keys have unit length, as the delta rule wants."""
    g = torch.Generator().manual_seed(seed + length)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    gates = normal(BATCH, length, HEADS, KEY).abs()
    rare = (torch.rand(BATCH, length, HEADS, KEY, generator=g) > 0.8).double()
    log_decay = {
        "none": None,
        "constant": -gates[0, 0, :, 0],
        "scalar": -gates[..., 0],
        "vector": -gates,
        "strong scalar": -10 - 40 * gates[..., 0],
        "strong vector": -10 - 40 * gates,
        "zero": torch.zeros_like(gates),
        "bursts": -60 * rare,
    }[decay]
    q, k, v = normal(BATCH, length, HEADS, KEY), normal(BATCH, length, HEADS, KEY), normal(BATCH, length, HEADS, VALUE)
    tensors = {"q": q, "k": F.normalize(k, dim=-1), "v": v, "log_decay": log_decay}
    tensors["beta_BTH"] = torch.rand(BATCH, length, HEADS, generator=g, dtype=torch.float64)
    tensors["state_BHKV"] = normal(BATCH, HEADS, KEY, VALUE)
    return {name: None if x is None else x.to(dtype).requires_grad_() for name, x in tensors.items()}


def call(function, tensors):
    """Calls with q, k, v by position, the rest by name; what is None is left out."""
    named = {name: x for name, x in tensors.items() if name not in ("q", "k", "v") and x is not None}
    return function(tensors["q"], tensors["k"], tensors["v"], **named)


def gradients(outputs, tensors):
    leaves = [x for x in tensors.values() if x is not None]
    g = torch.Generator().manual_seed(1)
    loss = sum((o * torch.randn(o.shape, generator=g, dtype=torch.float64).to(o.dtype)).sum() for o in outputs)
    return torch.autograd.grad(loss, leaves, materialize_grads=True, allow_unused=True)


def error(got, expected):
    got, expected = got.detach(), expected.detach()
    return float((got - expected).abs().max() / expected.abs().max().clamp_min(1e-3))


def assert_equal(function, reference, tensors, tolerance):
    outputs, expected = call(function, tensors), call(reference, tensors)
    if tensors.get("state_BHKV") is None:
        assert outputs[1] is None
        outputs, expected = outputs[:1], expected[:1]
    found = [error(a, b) for a, b in zip(outputs, expected, strict=True)]
    both = zip(gradients(outputs, tensors), gradients(expected, tensors), strict=True)
    found += [error(a, b) for a, b in both]
    assert max(found) < tolerance, found


@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("beta", [None, 1.0, 2.0])
@pytest.mark.parametrize("decay", DECAYS)
def test_linear_recurrence(decay, beta, with_state):
    for length in LENGTHS:
        tensors = draw(length, decay)
        tensors["beta_BTH"] = None if beta is None else (beta * tensors["beta_BTH"]).detach().requires_grad_()
        if not with_state:
            tensors["state_BHKV"] = None
        assert_equal(linear_recurrence, linear_recurrence_reference, tensors, 1e-9)


@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("decay", ["vector", "strong vector", "zero", "bursts"])
def test_dplr(decay, with_state):
    for length in LENGTHS:
        tensors = draw(length, decay)
        kappa, rate = tensors["k"].detach(), tensors.pop("beta_BTH").detach()[..., None]
        tensors["log_decay_BTHK"] = tensors.pop("log_decay")
        tensors["a_BTHK"] = (-rate * kappa).requires_grad_()
        tensors["b_BTHK"] = kappa.clone().requires_grad_()
        if not with_state:
            tensors["state_BHKV"] = None
        assert_equal(dplr_recurrence, dplr_reference, tensors, 1e-9)


@pytest.mark.parametrize("decay", ["none", "scalar"])
def test_grouped_queries(decay):
    tensors = draw(70, decay)
    tensors["q"], tensors["k"] = (x[:, :, :1].detach().requires_grad_() for x in (tensors["q"], tensors["k"]))
    tensors["beta_BTH"] = None
    assert_equal(linear_recurrence, linear_recurrence_reference, tensors, 1e-9)


@pytest.mark.parametrize("chunk", [4, 16, 128])
@pytest.mark.parametrize("decay", ["none", "scalar", "vector"])
def test_chunk_length_does_not_matter(decay, chunk):
    tensors = draw(70, decay)
    assert_equal(lambda *a, **k: linear_recurrence(*a, chunk=chunk, **k), linear_recurrence_reference, tensors, 1e-9)


@pytest.mark.parametrize("decay", ["none", "scalar"])
def test_lift(decay):
    """Scores in closed form give what the features give: here phi(x) = x (x) x, whose product is the square."""
    tensors = draw(70, decay)
    tensors["beta_BTH"] = None
    tensors["state_BHKV"] = torch.randn(BATCH, HEADS, KEY * KEY, VALUE, dtype=torch.float64, requires_grad=True)

    def features(x):
        return (x[..., :, None] * x[..., None, :]).flatten(-2)

    def reference(q, k, v, **named):
        return linear_recurrence_reference(features(q), features(k), v, **named)

    lift = Lift(features, torch.square)
    assert_equal(lambda *a, **k: linear_recurrence(*a, lift=lift, chunk=16, **k), reference, tensors, 1e-9)


@pytest.mark.parametrize("beta", [False, True])
@pytest.mark.parametrize("decay", DECAYS)
def test_single_precision(decay, beta):
    tensors = draw(130, decay, dtype=torch.float32)
    exact = {name: None if x is None else x.detach().double() for name, x in tensors.items()}
    if not beta:
        tensors["beta_BTH"] = exact["beta_BTH"] = None
    for got, expected in zip(call(linear_recurrence, tensors), call(linear_recurrence_reference, exact), strict=True):
        # Cumulated logs of a few thousand carry an absolute error of some 1e-4.
        assert error(got.double(), expected) < (1e-3 if decay in ("bursts", "strong scalar", "strong vector") else 1e-5)


@pytest.mark.parametrize("strength", [0.0, 1e-3, 10.0, 50.0, 1000.0])
@pytest.mark.parametrize("vector", [False, True])
def test_long_and_strong_stay_finite(vector, strength):
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 1000, 2, 8), F.normalize(torch.randn(1, 1000, 2, 8), dim=-1), torch.randn(1, 1000, 2, 8)
    log_decay = (-strength * torch.rand(1, 1000, 2, 8)[..., slice(None) if vector else 0]).requires_grad_()
    beta, q, k = (2 * torch.rand(1, 1000, 2)).requires_grad_(), q.requires_grad_(), k.requires_grad_()
    for write in (None, beta):
        o, final = linear_recurrence(q, k, v, log_decay=log_decay, beta_BTH=write, state_BHKV=torch.zeros(1, 2, 8, 8))
        assert o.isfinite().all()
        assert final.isfinite().all()
        grads = torch.autograd.grad(o.square().mean() + final.square().mean(), (q, k, log_decay))
        assert all(g.isfinite().all() for g in grads)


def test_narrow_dtypes_are_computed_in_fp32():
    tensors = draw(70, "vector", dtype=torch.float32)
    narrow = {name: x.detach().bfloat16() for name, x in tensors.items()}
    with torch.autocast("cpu", torch.bfloat16):
        o, final = call(linear_recurrence, narrow)
    assert o.dtype == final.dtype == torch.bfloat16
    expected, _ = call(linear_recurrence, {name: x.float() for name, x in narrow.items()})
    torch.testing.assert_close(o, expected.bfloat16())


def test_state_splits_anywhere():
    tensors = {name: x.detach() for name, x in draw(130, "vector").items()}
    whole, final = call(linear_recurrence, tensors)
    state, outputs = tensors["state_BHKV"], []
    for a, b in ((0, 1), (1, 66), (66, 67), (67, 130)):
        part = {name: x[:, a:b] for name, x in tensors.items() if name != "state_BHKV"}
        o, state = call(linear_recurrence, part | {"state_BHKV": state})
        outputs.append(o)
    torch.testing.assert_close(torch.cat(outputs, dim=1), whole)
    torch.testing.assert_close(state, final)
