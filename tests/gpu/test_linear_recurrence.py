"""The Triton walks on a CUDA device against the token loop in fp64, in every dtype, shape class and gate."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch

from kernels.dispatch import use_backend
from kernels.recurrence import linear_recurrence
from kernels.reference import linear_recurrence_reference
from kernels.walks import walk_hopper_plan
from kernels.walks.walk import Inputs
from kernels.walks.walk_pieces import n_segments
from tests.gpu.compiled import require_nothing_new

pytestmark = pytest.mark.gpu

# batch, length, groups, heads, key width, value width
SHAPES = (
    (2, 1, 1, 1, 16, 16),
    (2, 200, 2, 2, 64, 64),
    (1, 300, 2, 2, 128, 128),
    (2, 129, 1, 4, 128, 64),
    (1, 75, 1, 1, 60, 100),
    (1, 130, 1, 1, 64, 65),
    (1, 100, 1, 1, 256, 256),
)
GATES = ("none", "constant", "scalar", "strong", "zero")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def draw(shape: tuple[int, ...], gate: str, dtype: torch.dtype, *, state: bool) -> dict[str, torch.Tensor]:
    """Inputs in the dtype given; decays and states stay in fp32, as mixers have them."""
    batch, length, groups, heads, k_dim, v_dim = shape
    g = torch.Generator("cuda").manual_seed(length)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=g, device="cuda")

    rates = normal(batch, length, heads).abs()
    decays = {"constant": -rates[0, 0] / 8, "scalar": -rates / 8, "zero": 0 * rates}
    decays["strong"] = -10 * torch.rand(batch, length, heads, generator=g, device="cuda")
    tensors = {
        "q": normal(batch, length, groups, k_dim).to(dtype),
        "k": (normal(batch, length, groups, k_dim) * k_dim**-0.5).to(dtype),
        "v": normal(batch, length, heads, v_dim).to(dtype),
    }
    if gate != "none":
        tensors["log_decay"] = decays[gate]
    if state:
        tensors["state_BHKV"] = normal(batch, heads, k_dim, v_dim)
    return {name: x.requires_grad_() for name, x in tensors.items()}


def outputs_and_gradients(function, tensors: dict[str, torch.Tensor], *, state: bool) -> list[torch.Tensor]:
    named = {name: x for name, x in tensors.items() if name not in ("q", "k", "v")}
    o, final = function(tensors["q"], tensors["k"], tensors["v"], **named)
    results = [o, final] if state else [o]
    g = torch.Generator("cuda").manual_seed(1)
    weights = [torch.randn(x.shape, generator=g, device="cuda", dtype=torch.float32) for x in results]
    loss = sum(
        (x.to(torch.promote_types(x.dtype, torch.float32)) * w.to(x.dtype)).sum() for x, w in zip(results, weights, strict=True)
    )
    return [x.detach() for x in (*results, *torch.autograd.grad(loss, list(tensors.values())))]


def rms_error(got: torch.Tensor, want: torch.Tensor) -> float:
    assert torch.isfinite(got).all()
    return float((got.double() - want).square().mean().sqrt() / want.square().mean().sqrt().clamp_min(1e-9))


@pytest.mark.parametrize("k_dim", [8, 16, 64, 128])
@pytest.mark.parametrize("v_dim", [16, 64])
def test_wide_values_beside_narrow_keys(k_dim: int, v_dim: int) -> None:
    """Mamba-2 under autocast: values and their gradients in fp32, queries and keys in bf16."""
    tensors = draw((2, 130, 1, 4, k_dim, v_dim), "scalar", torch.bfloat16, state=True)
    tensors["v"] = tensors["v"].detach().float().requires_grad_()
    exact = {name: x.detach().double().requires_grad_() for name, x in tensors.items()}
    with use_backend("triton"):
        got = outputs_and_gradients(linear_recurrence, tensors, state=True)
    want = outputs_and_gradients(linear_recurrence_reference, exact, state=True)
    for name, x, y in zip(("o", "final", *tensors), got, want, strict=True):
        assert rms_error(x, y) < (2e-2 if name == "log_decay" else 5e-3), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_token_loop(shape: tuple[int, ...], gate: str, dtype: torch.dtype) -> None:
    for state in (False, True):
        tensors = draw(shape, gate, dtype, state=state)
        exact = {name: x.detach().double().requires_grad_() for name, x in tensors.items()}
        with use_backend("triton"):
            got = outputs_and_gradients(linear_recurrence, tensors, state=state)
            again = outputs_and_gradients(linear_recurrence, tensors, state=state)
        want = outputs_and_gradients(linear_recurrence_reference, exact, state=state)
        for name, a, b, c in zip(["o", *(["final"] if state else []), *tensors], got, want, again, strict=True):
            assert torch.equal(a, c), f"{name} differs from run to run"
            exact_limit, rough_limit = (1e-3, 2e-2) if name == "log_decay" else (2e-5, 5e-3)
            limit = exact_limit if dtype == torch.float32 else rough_limit
            if gate == "constant" and name == "log_decay":
                assert float((a - b).norm()) <= limit * size_of_terms(exact, state=state), (state, a, b)
                continue
            assert rms_error(a, b) < limit or float(b.abs().max()) < 1e-6, (name, state, rms_error(a, b))


def size_of_terms(tensors: dict[str, torch.Tensor], *, state: bool) -> float:
    """The gradient of a constant decay is a sum over tokens of terms that nearly cancel: the norm over heads of their sizes' sum.

    Rounding makes each term wrong by its share, and neighbours are wrong alike, since each is a sum over all later tokens.
    """
    own = {name: x.detach().clone().requires_grad_() for name, x in tensors.items()}
    batch, length = own["q"].shape[:2]
    own["log_decay"] = own["log_decay"].detach().expand(batch, length, -1).clone().requires_grad_()
    gradients = outputs_and_gradients(linear_recurrence_reference, own, state=state)
    decay = gradients[(2 if state else 1) + list(own).index("log_decay")]
    return float(decay.abs().sum((0, 1)).norm())


@pytest.mark.parametrize("gate", ["none", "constant", "scalar", "strong"])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(("k_dim", "v_dim"), [(64, 64), (128, 128), (128, 64)])
def test_segments_of_long_rows(k_dim: int, v_dim: int, groups: int, gate: str) -> None:
    """Of plain walks where heads share keys, of those for Hopper where not."""
    shape = (1, 1600, groups, 2, k_dim, v_dim)
    k, v = torch.empty(1, 1600, groups, k_dim), torch.empty(1, 1600, 2, v_dim)
    assert n_segments(k, v) == walk_hopper_plan.share_out(Inputs(k, k, v, None, None, None)).number == 3
    agree_with_torch(shape, gate)


@pytest.mark.parametrize("gate", ["scalar", "strong"])
@pytest.mark.parametrize("shape", [(1, 8192, 2, 2, 128, 128), (1, 8192, 1, 2, 64, 64), (1, 4096, 1, 4, 128, 64)], ids=str)
def test_errors_do_not_grow_with_the_length(shape: tuple[int, ...], gate: str) -> None:
    """Gradients of decays are sums over later tokens, which start anew at segments, runs of kept chunks and chunks that forget."""
    agree_with_torch(shape, gate)


@pytest.mark.parametrize("gate", ["none", "constant", "scalar", "strong"])
@pytest.mark.parametrize("shape", [(9, 577, 1, 16, 128, 64), (1, 1600, 2, 8, 128, 64), (1, 1100, 1, 4, 72, 24)], ids=str)
def test_heads_that_share_keys(shape: tuple[int, ...], gate: str) -> None:
    """Whole rows of many heads, and segments; states between chunks are kept."""
    agree_with_torch(shape, gate)


@pytest.mark.parametrize("shape", [(2, 3000, 16, 16, 128, 128), (2, 3000, 16, 16, 64, 64), (4, 1500, 1, 16, 128, 64)], ids=str)
def test_fifty_runs_are_equal_to_the_bit(shape: tuple[int, ...]) -> None:
    tensors = draw(shape, "scalar", torch.bfloat16, state=True)
    with use_backend("triton"):
        first = outputs_and_gradients(linear_recurrence, tensors, state=True)
        for _ in range(49):
            again = outputs_and_gradients(linear_recurrence, tensors, state=True)
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("gate", ["none", "constant", "scalar", "strong"])
@pytest.mark.parametrize(("k_dim", "v_dim"), [(64, 64), (128, 128), (96, 128)])
def test_more_heads_than_multiprocessors(k_dim: int, v_dim: int, gate: str) -> None:
    """Narrow heads share one, two programs at a time."""
    agree_with_torch((24, 577, 16, 16, k_dim, v_dim), gate)


def agree_with_torch(shape: tuple[int, ...], gate: str) -> None:
    """Three runs to the bit, and all results with the torch form in fp64."""
    tensors = draw(shape, gate, torch.bfloat16, state=True)
    exact = {name: x.detach().double().requires_grad_() for name, x in tensors.items()}
    with use_backend("triton"):
        got = outputs_and_gradients(linear_recurrence, tensors, state=True)
        repeats = [outputs_and_gradients(linear_recurrence, tensors, state=True) for _ in range(2)]
    with use_backend("chunked"):
        want = outputs_and_gradients(linear_recurrence, exact, state=True)
    for name, a, b, *same in zip(("o", "final", *tensors), got, want, *repeats, strict=True):
        assert all(torch.equal(a, c) for c in same), f"{name} differs from run to run"
        if name == "log_decay" and gate == "constant":
            continue
        assert rms_error(a, b) < (2e-2 if name == "log_decay" else 5e-3), (name, rms_error(a, b))


@pytest.mark.parametrize(("k_dim", "v_dim"), [(64, 64), (128, 128), (128, 64)])
def test_the_plain_walks_where_copies_cannot_be_described(k_dim: int, v_dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What other devices run for every 16-bit head; Hopper only for fp16, widths that 8 does not divide, and packed sequences."""
    for suits in ("suits", "suits_forward", "fits"):
        monkeypatch.setattr(walk_hopper_plan, suits, lambda _: False)
    for shape, gate in (((1, 300, 1, 4, k_dim, v_dim), "scalar"), ((2, 129, 2, 2, k_dim, v_dim), "strong")):
        tensors = draw(shape, gate, torch.bfloat16, state=True)
        exact = {name: x.detach().double().requires_grad_() for name, x in tensors.items()}
        with use_backend("triton"):
            got = outputs_and_gradients(linear_recurrence, tensors, state=True)
        want = outputs_and_gradients(linear_recurrence_reference, exact, state=True)
        for name, a, b in zip(("o", "final", *tensors), got, want, strict=True):
            assert rms_error(a, b) < (2e-2 if name == "log_decay" else 5e-3), (shape, name, rms_error(a, b))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gate", ["none", "scalar", "strong"])
def test_packed_sequences_are_separate_ones(gate: str, dtype: torch.dtype) -> None:
    bounds = (0, 1, 65, 300, 364)
    tensors = draw((1, bounds[-1], 2, 2, 64, 64), gate, dtype, state=True)
    tensors["state_BHKV"] = torch.randn(len(bounds) - 1, 2, 64, 64, device="cuda").requires_grad_()
    packed = partial(linear_recurrence, cu_seqlens=torch.tensor(bounds, device="cuda"))

    def apart(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **named: torch.Tensor):
        parts = []
        for n, (start, stop) in enumerate(itertools.pairwise(bounds)):
            own = {"state_BHKV": named["state_BHKV"][n : n + 1]}
            if "log_decay" in named:
                own["log_decay"] = named["log_decay"][:, start:stop]
            parts.append(linear_recurrence(q[:, start:stop], k[:, start:stop], v[:, start:stop], **own))
        return torch.cat([o for o, _ in parts], 1), torch.cat([final for _, final in parts])

    with use_backend("triton"):
        got = outputs_and_gradients(packed, tensors, state=True)
    exact = {name: x.detach().double().requires_grad_() for name, x in tensors.items()}
    with use_backend("chunked"):
        want = outputs_and_gradients(apart, exact, state=True)
    for name, a, b in zip(("o", "final", *tensors), got, want, strict=True):
        rough = 2e-2 if name == "log_decay" else 5e-3
        assert rms_error(a, b) < ((1e-3 if name == "log_decay" else 2e-5) if dtype == torch.float32 else rough), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_split_equals_whole(dtype: torch.dtype) -> None:
    tensors = {name: x.detach() for name, x in draw((2, 300, 2, 2, 64, 64), "scalar", dtype, state=True).items()}
    with use_backend("triton"):
        whole, final = linear_recurrence(
            *(tensors[n] for n in "qkv"), log_decay=tensors["log_decay"], state_BHKV=tensors["state_BHKV"]
        )
        state, pieces = tensors["state_BHKV"], []
        for start, stop in itertools.pairwise((0, 1, 64, 131, 300)):
            q, k, v, decay = (tensors[n][:, start:stop] for n in ("q", "k", "v", "log_decay"))
            piece, state = linear_recurrence(q, k, v, log_decay=decay, state_BHKV=state)
            pieces.append(piece)
    assert rms_error(torch.cat(pieces, 1), whole.double()) < 5e-3
    assert rms_error(state, final.double()) < 5e-3


def test_many_heads_and_long_sequences() -> None:
    with use_backend("triton"), torch.no_grad():
        many = torch.randn(70_000, 3, 1, 16, device="cuda", dtype=torch.bfloat16)
        o, _ = linear_recurrence(many, many, many)
        assert rms_error(o[-7:], linear_recurrence_reference(*[many[-7:].double()] * 3)[0]) < 5e-3
        long = torch.randn(1, 1_000_000, 20, 128, device="cuda", dtype=torch.bfloat16)  # more than 2^31 elements
        decay = torch.full((20,), -0.5, device="cuda")
        o, _ = linear_recurrence(long, long, long, log_decay=decay)
        tail = long[:, -100:].double()
        want, _ = linear_recurrence_reference(tail, tail, tail, log_decay=decay.double())
        assert rms_error(o[:, -10:], want[:, -10:]) < 5e-3


def test_a_new_batch_length_or_head_count_compiles_nothing() -> None:
    from kernels.walks import (
        walk_decays_triton,
        walk_forward_triton,
        walk_gradients_triton,
        walk_hopper,
        walk_hopper_back,
        walk_hopper_states,
    )

    gradients = (walk_gradients_triton.backward_kernel, walk_decays_triton.decay_gradient_kernel)
    hopper = (walk_hopper.forward_kernel, walk_hopper_back.backward_kernel, walk_hopper_states.states_kernel)
    kernels = (walk_forward_triton.forward_kernel, *gradients, *hopper)

    def run(batch: int, length: int, heads: int) -> None:
        q, k, v = (torch.randn(batch, length, heads, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
        decay = -torch.rand(batch, length, heads, device="cuda")
        with use_backend("triton"):
            o, _ = linear_recurrence(q, k, v, log_decay=decay.requires_grad_())
        o.float().sum().backward()

    require_nothing_new(kernels, run, (2, 64, 2), (1, 1, 1), (3, 77, 5), (16, 1024, 16), (1, 2048, 3), (1, 1024, 100))


def test_inside_a_cuda_graph() -> None:
    q, k, v = (torch.randn(2, 200, 2, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    with use_backend("triton"):
        want, _ = linear_recurrence(q, k, v)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            o, _ = linear_recurrence(q, k, v)
    graph.replay()
    assert torch.equal(o, want)
