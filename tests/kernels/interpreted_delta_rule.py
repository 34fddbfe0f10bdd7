"""The Triton delta rule in fp32 against the token loop in fp64: outputs, states, gradients; then vmap, compile."""

import itertools

import pytest
import torch
from torch.func import vmap
from torch.nn import functional as F

from kernels.delta_rule import delta
from kernels.dispatch import use_backend
from kernels.recurrence import linear_recurrence
from kernels.reference import linear_recurrence_reference
from tests.kernels.interpreted_linear_recurrence import call, run, weighted
from tests.kernels.oracle import SINGLE, poisoned, rms_error

# batch, length, groups, heads, key width, value width
SHAPES = ((1, 1, 1, 1, 16, 16), (2, 19, 1, 1, 20, 16), (1, 34, 1, 2, 16, 33))
GATES = ("none", "constant", "scalar", "strong", "zero")


def draw(shape, gate, *, state, beta=1.0, seed=0, dtype=torch.float64):
    batch, length, groups, heads, k_dim, v_dim = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    rates = normal(batch, length, heads).abs()
    log_decay = {
        "none": None,
        "constant": -rates[0, 0],
        "scalar": -rates,
        "strong": -10 * torch.rand(batch, length, heads, generator=generator, dtype=torch.float64),
        "zero": 0 * rates,
    }[gate]
    tensors = {
        "q": normal(batch, length, groups, k_dim),
        "k": F.normalize(normal(batch, length, groups, k_dim), dim=-1),
        "v": normal(batch, length, heads, v_dim),
        "beta_BTH": beta * torch.rand(batch, length, heads, generator=generator, dtype=torch.float64),
        "log_decay": log_decay,
        "state_BHKV": normal(batch, heads, k_dim, v_dim) if state else None,
    }
    return {name: x.to(dtype).requires_grad_() for name, x in tensors.items() if x is not None}


def assert_equal(shape, gate, *, state, beta=1.0):
    exact = draw(shape, gate, state=state, beta=beta)
    single = {name: x.detach().float().requires_grad_() for name, x in exact.items()}
    got, want = run(linear_recurrence, single), run(linear_recurrence_reference, exact)
    if not state:
        want.pop(1)  # the definition returns its state in any case
        want[1:] = torch.autograd.grad(weighted(call(linear_recurrence_reference, exact)[:1]), list(exact.values()))
    for name, a, b in zip(["o", *(["final"] if state else []), *exact], got, want, strict=True):
        # Gradients of strong decays are small differences of large sums.
        assert rms_error(a, b) <= (1e-3 if name == "log_decay" else SINGLE), (shape, name)


@pytest.fixture(autouse=True)
def _triton_and_poison():
    with use_backend("triton"), poisoned():
        yield


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("state", [False, True])
def test_equals_the_token_loop(gate, state):
    for shape in SHAPES:
        assert_equal(shape, gate, state=state)


@pytest.mark.parametrize(("gate", "beta"), [("none", 2.0), ("strong", 1.0), ("scalar", 0.0)])
def test_the_shapes_of_sixteen_bit(gate, beta, monkeypatch):
    """Chunks of 64, whose inverse is merged from blocks, and tiles that end inside a head."""
    monkeypatch.setattr(delta, "FP32", delta.SIXTEEN_BIT)
    assert_equal((1, 66, 1, 1, 16, 40), gate, state=True, beta=beta)
    assert_equal((1, 66, 1, 1, 70, 70), gate, state=False, beta=beta)


@pytest.mark.parametrize(("v_dim", "operands"), [(32, torch.float16), (130, torch.float32)])
def test_half_precision(v_dim, operands):
    """Few key columns and beta up to 2 make couplings large; wide heads take fp32 operands."""
    shape = (1, 66 if v_dim == 32 else 18, 1, 1, 8, v_dim)
    tensors = {name: x.detach().half() for name, x in draw(shape, "scalar", state=True, beta=2.0).items()}
    assert delta.operand_dtype(tensors["q"], tensors["k"], tensors["v"]) == operands
    got = run(linear_recurrence, {name: x.requires_grad_() for name, x in tensors.items()})
    want = run(linear_recurrence_reference, {name: x.detach().double().requires_grad_() for name, x in tensors.items()})
    for a, b in zip(got, want, strict=True):
        assert rms_error(a, b) <= 5e-3


def test_split_equals_whole():
    tensors = draw((1, 20, 1, 1, 16, 16), "scalar", state=True, dtype=torch.float32)
    tensors = {name: x.detach() for name, x in tensors.items()}
    whole, final = call(linear_recurrence, tensors)
    pieces, state = [], tensors["state_BHKV"]
    for start, stop in itertools.pairwise((0, 1, 16, 20)):
        part = {name: x[:, start:stop] for name, x in tensors.items() if name != "state_BHKV"} | {"state_BHKV": state}
        piece, state = call(linear_recurrence, part)
        pieces.append(piece)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state, final, rtol=1e-4, atol=1e-5)


def test_the_future_is_never_read():
    tensors = {name: x.detach() for name, x in draw((1, 26, 1, 1, 16, 16), "scalar", state=False, dtype=torch.float32).items()}
    before = call(linear_recurrence, tensors)[0]
    for name in ("q", "k", "v", "beta_BTH"):
        tensors[name] = torch.cat((tensors[name][:, :23], tensors[name][:, 23:].flip(1)), 1)
    after = call(linear_recurrence, tensors)[0]
    assert not torch.equal(before, after)
    assert torch.equal(before[:, :23], after[:, :23])


@pytest.mark.parametrize("gate", ["none", "constant", "scalar"])
def test_vmap_equals_loop(gate):
    members = [draw((2, 18, 1, 2, 16, 16), gate, state=True, seed=seed, dtype=torch.float32) for seed in range(2)]
    names = list(members[0])
    stacked = {name: torch.stack([m[name].detach() for m in members]).requires_grad_() for name in names}
    mapped = vmap(lambda *values: call(linear_recurrence, dict(zip(names, values, strict=True))))(*stacked.values())
    got = torch.autograd.grad(weighted(mapped), list(stacked.values()))
    looped = [torch.stack(parts) for parts in zip(*(call(linear_recurrence, m) for m in members), strict=True)]
    want = torch.autograd.grad(weighted(looped), [m[name] for name in names for m in members])
    for a, b in zip(mapped, looped, strict=True):
        torch.testing.assert_close(a, b)
    for index, name in enumerate(names):
        torch.testing.assert_close(got[index], torch.stack(want[2 * index : 2 * index + 2]), rtol=1e-4, atol=1e-5, msg=name)


def test_gradients_inside_of_vmap():
    tensors = {name: x.detach() for name, x in draw((2, 18, 1, 1, 16, 16), "constant", state=False, dtype=torch.float32).items()}
    queries = torch.randn(2, *tensors["q"].shape)

    def loss(q):
        return call(linear_recurrence, tensors | {"q": q})[0].square().sum()

    got = vmap(torch.func.grad(loss))(queries)
    for member, q in zip(got, queries, strict=True):
        torch.testing.assert_close(member, torch.func.grad(loss)(q), rtol=1e-4, atol=1e-5)


def test_gradients_of_the_final_state_alone():
    exact = draw((1, 18, 1, 1, 16, 16), "scalar", state=True)
    single = {name: x.detach().float().requires_grad_() for name, x in exact.items()}
    used = [name for name in exact if name != "q"]
    pairs = [(linear_recurrence, single), (linear_recurrence_reference, exact)]
    got, want = (torch.autograd.grad(weighted(call(f, x)[1:]), [x[name] for name in used]) for f, x in pairs)
    for name, a, b in zip(used, got, want, strict=True):
        assert rms_error(a, b) <= SINGLE, name


def test_nothing_is_kept_without_gradients(monkeypatch):
    kept = []
    forward = delta.forward

    def watched(*args, keep, **named):
        kept.append(keep)
        return forward(*args, keep=keep, **named)

    monkeypatch.setattr(delta, "forward", watched)
    tensors = draw((1, 18, 1, 1, 16, 16), "scalar", state=True, dtype=torch.float32)
    call(linear_recurrence, {name: x.detach() for name, x in tensors.items()})
    with torch.no_grad():
        call(linear_recurrence, tensors)
    call(linear_recurrence, tensors)
    assert kept == [False, False, True]


def test_compiles_without_graph_breaks():
    tensors = draw((1, 18, 1, 1, 16, 16), "scalar", state=True, dtype=torch.float32)
    want = run(linear_recurrence, tensors)
    got = run(torch.compile(linear_recurrence, backend="aot_eager", fullgraph=True), tensors)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_torch_accepts_the_operator():
    tensors = draw((2, 18, 1, 2, 16, 16), "scalar", state=True, dtype=torch.float32)
    torch.library.opcheck(torch.ops.mixer_bench.delta_rule.default, (*tensors.values(), True, False))
