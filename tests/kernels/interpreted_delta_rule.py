"""The Triton delta rule in fp32 against the token loop in fp64: outputs, states, gradients; then vmap, compile."""

import itertools
from functools import partial

import pytest
import torch
from torch.func import vmap

from kernels.delta_rule import delta
from kernels.dispatch import use_backend
from kernels.recurrence import linear_recurrence
from kernels.reference import linear_recurrence_reference
from tests.kernels import cases_recurrence as cases
from tests.kernels.cases_recurrence import call, run, weighted
from tests.kernels.oracle import SINGLE, poisoned, rms_error

# batch, length, groups, heads, key width, value width
SHAPES = ((1, 1, 1, 1, 16, 16), (2, 19, 1, 1, 20, 16), (1, 34, 1, 2, 16, 33))
GATES = ("none", "constant", "scalar", "strong", "zero")

draw = partial(cases.draw, beta=1.0)
assert_equal = partial(cases.check, beta=1.0)


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
    cases.check_vmap(members)


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
