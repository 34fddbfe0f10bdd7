"""The Triton walks in fp32 against the token loop in fp64: outputs, states, gradients; then vmap, compile, bad input."""

import itertools
import math
from contextlib import ExitStack, contextmanager
from unittest import mock

import pytest
import torch
from torch.func import vmap

from kernels.dispatch import use_backend
from kernels.recurrence import linear_recurrence
from kernels.reference import linear_recurrence_reference
from kernels.walks import walk_config, walk_crossings, walk_decays, walk_grouped, walk_pieces
from tests.kernels.cases_packing import check_packed
from tests.kernels.cases_recurrence import call, check, check_vmap, draw, run
from tests.kernels.oracle import SINGLE, poisoned, rms_error

# batch, length, groups, heads, key width, value width
SHAPES = ((1, 1, 1, 1, 16, 16), (2, 75, 1, 2, 20, 33), (1, 130, 2, 4, 16, 40), (1, 64, 1, 1, 72, 16))
GATES = ("none", "constant", "scalar", "strong", "zero")


@pytest.fixture(autouse=True)
def _triton_and_poison():
    with use_backend("triton"), poisoned():
        yield


@contextmanager
def plan(name):
    """Keys and values together, and rows in segments, at sizes that the interpreter can do."""
    turned = "turned" in name
    config = walk_config.Config(16, 16, 4, 1, turned=turned)
    together = walk_config.Backward(config, config if turned else None, together=True)
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(walk_decays, "DECAY_ROWS", 64))
        if "together" in name:
            stack.enter_context(mock.patch.object(walk_config, "BACKWARD_32", {(64, 64): together}))
            stack.enter_context(mock.patch.object(walk_config, "FP32", {64: config}))
        if "segments" in name:
            stack.enter_context(mock.patch.object(walk_pieces, "SHORTEST_SEGMENT", 14))
            stack.enter_context(mock.patch.object(walk_pieces, "MULTIPLE", 16))
        if "grouped" in name:
            stack.enter_context(mock.patch.object(walk_grouped, "CHUNK", 16))
            stack.enter_context(mock.patch.object(walk_grouped, "RUN", 1))
            stack.enter_context(mock.patch.object(walk_grouped, "suits", lambda *_: True))
        yield


@pytest.mark.parametrize(
    ("name", "gate"),
    [
        ("together", "strong"),
        ("segments", "constant"),
        ("together in segments", "scalar"),
        ("together in segments", "rare"),
        ("together in segments", "none"),
        ("together, turned, in segments", "none"),
        ("together, turned", "strong"),
        ("grouped", "none"),
        ("grouped", "constant"),
        ("grouped", "strong"),
        ("grouped", "rare"),
        ("grouped in segments", "scalar"),
    ],
)
def test_every_plan_equals_the_token_loop(name, gate):
    with plan(name):
        check((2, 45, 1, 2, 20, 33), gate, state=gate != "none")


@pytest.mark.parametrize("reads", [0, 1])
@pytest.mark.parametrize("gate", ["constant", "scalar"])
def test_sums_of_decays_start_anew_behind_chunks_that_forget(gate, reads):
    """What is wrong behind the end of such a chunk is not carried to its tokens, nor to those before."""
    chunk, blocks = 16, 64
    generator = torch.Generator().manual_seed(0)
    parts = torch.randn(2, 2, 3, 150, generator=generator)
    steps = -torch.rand(2, 150, 3, generator=generator) / 16
    steps[0, 70, 1], steps[1, 23, 0], steps[1, 24, 2] = -17.0, -1e5, -15.0  # 2^-24 is exp(-16.6)
    log_decay = torch.tensor([[-0.1, -1.1, -1.0], [-1.2, -0.2, -0.3]]) if gate == "constant" else steps
    with mock.patch.object(walk_decays, "DECAY_ROWS", blocks):
        found = walk_decays.decay_gradient(walk_decays.RowSums(parts, reads, chunk), log_decay, None, None, None, torch.float32)
    tokens = log_decay if gate == "scalar" else log_decay[:, None].expand(2, 150, 3)
    want = torch.stack([carried(*parts[:, b, h].double(), tokens[b, :, h], chunk, reads) for b in range(2) for h in range(3)])
    want = want.view(2, 3, 150).transpose(1, 2)
    torch.testing.assert_close(found, (want.sum(1) if gate == "constant" else want).float(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("ends", [False, True])
def test_sums_of_decays_start_anew_at_segments(ends):
    """From the state behind each and its gradient, whatever was summed in later ones."""
    generator = torch.Generator().manual_seed(0)
    (batch, pieces, heads, span, length), widths = (2, 3, 2, 32, 80), (40, 31)
    states = torch.randn(2, batch, pieces, heads, *widths, generator=generator)
    decays = -torch.rand(batch, pieces, heads, generator=generator)
    parts = torch.randn(2, batch, heads, length, generator=generator)
    final, dfinal = torch.randn(2, batch, heads, *widths, generator=generator)
    sums = walk_decays.RowSums(parts, 0, 16, walk_crossings.Segments(*states, decays, span))
    given = (final, dfinal) if ends else (None, None)
    with mock.patch.object(walk_decays, "DECAY_ROWS", 32):
        found = walk_decays.decay_gradient(sums, torch.zeros(batch, length, heads), None, *given, torch.float32)
    (entering, added), gradient, want = states.double(), dfinal.double() * ends, torch.empty(batch, heads, length).double()
    for piece in reversed(range(pieces)):
        own, behind = slice(piece * span, (piece + 1) * span), final if piece == pieces - 1 else entering[:, piece + 1]
        within = parts.double().sum(0)[..., own].flip(2).cumsum(2).flip(2)
        want[..., own] = within + (behind * gradient).sum((2, 3))[..., None]
        gradient = gradient * decays[:, piece].double().exp2()[..., None, None] + added[:, piece]
    assert rms_error(found.transpose(1, 2), want) <= SINGLE


@pytest.mark.parametrize("ends", [False, True])
def test_what_crosses_runs_of_chunks(ends):
    """Products of states that are kept between chunks; the last run is short."""
    generator = torch.Generator().manual_seed(0)
    kept, dkept = torch.randn(2, 2, 5, 2, 40, 31, generator=generator).half()
    final, dfinal = torch.randn(2, 2, 2, 40, 31, generator=generator)
    found = walk_crossings.Chunks(kept, dkept, 2, 32).crossing(*((final, dfinal) if ends else (None, None)), torch.float16)
    states = torch.stack((kept[:, 2], kept[:, 4], final), 1).double()
    gradients = torch.stack((dkept[:, 1], dkept[:, 3], dfinal.half() * ends), 1).double()
    assert rms_error(found, (states * gradients).sum((-2, -1))) <= SINGLE


@pytest.mark.parametrize("first", [False, True])
def test_states_that_enter_segments(first):
    generator = torch.Generator().manual_seed(0)
    sums, decays = torch.randn(2, 3, 2, 40, 31, generator=generator), -torch.rand(2, 3, 2, generator=generator)
    given = torch.randn(2, 2, 40, 31, generator=generator) if first else None
    found = walk_crossings.entering_states(sums, decays, given)
    want = torch.zeros(2, 2, 40, 31).double() if given is None else given.double()
    for piece in range(2):
        want = want * decays[:, piece].double().exp2()[..., None, None] + sums[:, piece]
        assert rms_error(found[:, piece + 1], want) <= SINGLE


def carried(reads_T, rest_T, log_decay_T, chunk, reads):
    """The sums, chunk by chunk from the last one on."""
    sums_T, later = torch.empty_like(reads_T), 0.0
    for start in reversed(range(0, len(sums_T), chunk)):
        own = slice(start, start + chunk)
        if reads and log_decay_T[own].sum() / math.log(2) < -24:
            later = -rest_T[own].sum()
        sums_T[own] = later + (reads_T + rest_T)[own].flip(0).cumsum(0).flip(0)
        later = sums_T[start]
    return sums_T


def test_heads_of_several_groups():
    with plan("grouped"), mock.patch.object(walk_grouped, "PROGRAMS", 8):
        check((1, 20, 2, 8, 4, 5), "scalar", state=True)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("state", [False, True])
def test_equals_the_token_loop(gate, state):
    for shape in SHAPES:
        check(shape, gate, state=state)


@pytest.mark.parametrize("name", ["whole", "together"])
@pytest.mark.parametrize(("gate", "state"), [("none", False), ("constant", True), ("strong", True)])
def test_packed_sequences_are_separate_ones(name, gate, state):
    with plan(name):
        check_packed(linear_recurrence, gate, state=state, bounds=(0, 1, 18, 58, 74))


def test_torch_accepts_packed_sequences():
    tensors = draw((1, 20, 1, 2, 16, 16), "scalar", state=False, dtype=torch.float32)
    bounds, states = torch.tensor([0, 7, 20]), torch.randn(2, 2, 16, 16)
    torch.library.opcheck(torch.ops.mixer_bench.linear_recurrence.default, (*tensors.values(), states, bounds, True))


def test_split_equals_whole():
    tensors = draw((1, 90, 1, 2, 16, 16), "scalar", state=True, dtype=torch.float32)
    tensors = {name: x.detach() for name, x in tensors.items()}
    whole, final = call(linear_recurrence, tensors)
    pieces, state = [], tensors["state_BHKV"]
    for start, stop in itertools.pairwise((0, 1, 37, 64, 90)):
        part = {name: x[:, start:stop] for name, x in tensors.items() if name != "state_BHKV"} | {"state_BHKV": state}
        piece, state = call(linear_recurrence, part)
        pieces.append(piece)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state, final, rtol=1e-4, atol=1e-5)


def test_strided_views_need_no_copy():
    qkv = torch.randn(2, 40, 3, 2, 16)
    q, k, v = qkv.unbind(2)
    got, _ = linear_recurrence(q, k, v)
    want, _ = linear_recurrence_reference(q.double(), k.double(), v.double())
    assert rms_error(got, want) <= SINGLE


def test_the_future_is_never_read():
    tensors = {name: x.detach() for name, x in draw((1, 80, 1, 1, 16, 16), "scalar", state=False, dtype=torch.float32).items()}
    before, _ = call(linear_recurrence, tensors)[0], None
    for name in ("q", "k", "v"):
        tensors[name] = tensors[name].clone()
        tensors[name][:, 71:] = 1e4
    after = call(linear_recurrence, tensors)[0]
    assert torch.equal(before[:, :71], after[:, :71])


@pytest.mark.parametrize("gate", ["none", "constant", "scalar"])
def test_vmap_equals_loop(gate):
    members = [draw((2, 20, 1, 2, 16, 16), gate, state=True, seed=seed, dtype=torch.float32) for seed in range(3)]
    check_vmap(members)


def test_vmap_with_shared_keys_and_nested_gradients():
    tensors = {name: x.detach() for name, x in draw((2, 20, 1, 1, 16, 16), "constant", state=False, dtype=torch.float32).items()}
    queries = torch.randn(3, *tensors["q"].shape)

    def loss(q):
        return call(linear_recurrence, tensors | {"q": q})[0].square().sum()

    got = vmap(torch.func.grad(loss))(queries)
    for member, q in zip(got, queries, strict=True):
        torch.testing.assert_close(member, torch.func.grad(loss)(q), rtol=1e-4, atol=1e-5)


def test_compiles_without_graph_breaks():
    tensors = draw((1, 20, 1, 1, 16, 16), "scalar", state=True, dtype=torch.float32)
    want = run(linear_recurrence, tensors)
    got = run(torch.compile(linear_recurrence, backend="aot_eager", fullgraph=True), tensors)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_torch_accepts_the_operator():
    tensors = draw((2, 20, 1, 2, 16, 16), "scalar", state=True, dtype=torch.float32)
    torch.library.opcheck(torch.ops.mixer_bench.linear_recurrence.default, (*tensors.values(), None, True))


def test_a_state_that_nobody_asked_for_has_no_gradient():
    """It is empty, and kernels would read a whole one."""
    tensors = [x.detach().requires_grad_() for x in draw((1, 20, 1, 1, 16, 16), "none", state=False, dtype=torch.float32).values()]
    o, final, _ = torch.ops.mixer_bench.linear_recurrence(*tensors, None, None, None, False)
    got = torch.autograd.grad(o.sum() + final.sum(), tensors, retain_graph=True)
    for a, b in zip(got, torch.autograd.grad(o.sum(), tensors), strict=True):
        assert torch.equal(a, b)


def test_what_the_kernels_lack_is_said():
    x = torch.randn(1, 4, 1, 300)
    with pytest.raises(ValueError, match="head dim 300 is above 256"):
        linear_recurrence(x, x, x)
    with pytest.raises(ValueError, match="float64"):
        linear_recurrence(*[torch.randn(1, 4, 1, 16, dtype=torch.float64)] * 3)
