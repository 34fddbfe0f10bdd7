"""The Triton delta rule on a CUDA device against the token loop in fp64, in every dtype, shape class and gate."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn import functional as F

from kernels.dispatch import use_backend
from kernels.recurrence import linear_recurrence
from kernels.reference import linear_recurrence_reference
from tests.gpu.compiled import require_nothing_new
from tests.gpu.test_linear_recurrence import outputs_and_gradients, rms_error

pytestmark = pytest.mark.gpu

# batch, length, groups, heads, key width, value width
SHAPES = (
    (2, 1, 1, 1, 16, 16),
    (2, 200, 2, 2, 64, 64),
    (1, 300, 2, 2, 128, 128),
    (2, 129, 1, 4, 128, 64),
    (1, 75, 1, 1, 60, 100),
    (1, 130, 1, 1, 64, 65),
    (34, 70, 2, 2, 128, 128),
    (1, 100, 1, 1, 256, 256),
    (1, 70, 1, 1, 64, 256),
    (2, 150, 2, 4, 128, 256),
)
GATES = ("none", "constant", "scalar", "strong", "zero")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Relative RMS errors: of outputs and states, of gradients, of the gradient of the decays, in fp32 and in 16 bit.
LIMITS = {"log_decay": (1e-3, 2e-2), "other": (2e-5, 5e-3), "gradient": (2e-5, 8e-3), "beta_BTH": (2e-5, 2e-2)}


def draw(shape: tuple[int, ...], gate: str, dtype: torch.dtype, *, state: bool, beta: float = 1.0) -> dict[str, torch.Tensor]:
    """Inputs in the dtype given, keys of unit length; decays, betas and states stay in fp32, as mixers have them."""
    batch, length, groups, heads, k_dim, v_dim = shape
    g = torch.Generator("cuda").manual_seed(length)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=g, device="cuda")

    rates = normal(batch, length, heads).abs()
    decays = {"constant": -rates[0, 0] / 8, "scalar": -rates / 8, "zero": 0 * rates}
    decays["strong"] = -10 * torch.rand(batch, length, heads, generator=g, device="cuda")
    tensors = {
        "q": F.normalize(normal(batch, length, groups, k_dim), dim=-1).to(dtype),
        "k": F.normalize(normal(batch, length, groups, k_dim), dim=-1).to(dtype),
        "v": normal(batch, length, heads, v_dim).to(dtype),
        "beta_BTH": beta * torch.rand(batch, length, heads, generator=g, device="cuda"),
    }
    if gate != "none":
        tensors["log_decay"] = decays[gate]
    if state:
        tensors["state_BHKV"] = normal(batch, heads, k_dim, v_dim)
    return {name: x.requires_grad_() for name, x in tensors.items()}


def check(tensors: dict[str, torch.Tensor], dtype: torch.dtype, *, state: bool) -> None:
    exact = {name: x.detach().double().requires_grad_() for name, x in tensors.items()}
    with use_backend("triton"):
        got = outputs_and_gradients(linear_recurrence, tensors, state=state)
        again = outputs_and_gradients(linear_recurrence, tensors, state=state)
    want = outputs_and_gradients(linear_recurrence_reference, exact, state=state)
    outputs = ["o", *(["final"] if state else [])]
    for name, a, b, c in zip([*outputs, *tensors], got, want, again, strict=True):
        assert torch.equal(a, c), f"{name} differs from run to run"
        limits = LIMITS.get(name, LIMITS["other" if name in outputs else "gradient"])
        limit = limits[0] if dtype == torch.float32 else limits[1]
        assert rms_error(a, b) < limit or float(b.abs().max()) < 1e-6, (name, state, rms_error(a, b))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_token_loop(shape: tuple[int, ...], gate: str, dtype: torch.dtype) -> None:
    for state in (False, True):
        check(draw(shape, gate, dtype, state=state), dtype, state=state)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_negative_eigenvalues(dtype: torch.dtype) -> None:
    check(draw((2, 200, 2, 2, 64, 64), "scalar", dtype, state=True, beta=2.0), dtype, state=True)


@pytest.mark.parametrize("gate", ["none", "constant", "scalar"])
@pytest.mark.parametrize(
    "shape", [(4, 900, 2, 8, 64, 64), (2, 600, 1, 2, 32, 32), (9, 130, 8, 8, 128, 128), (6, 130, 4, 8, 128, 128)], ids=str
)
def test_forward_walks_of_hopper(shape: tuple[int, ...], gate: str) -> None:
    """Couplings made beside the walk for longer than there is room for; programs with all columns of wide heads, and with half."""
    for state in (False, True):
        check(draw(shape, gate, torch.bfloat16, state=state), torch.bfloat16, state=state)


@pytest.mark.parametrize("gate", ["none", "constant", "scalar", "strong", "zero"])
@pytest.mark.parametrize("width", [64, 128])
def test_segments(width: int, gate: str) -> None:
    """Long and alone enough to be cut on Hopper; the last segment is shorter, and some decays leave nothing of their beginning."""
    length = 1700 if width == 64 else 4200 if gate == "none" else 2200  # wide heads are cut into eight segments at least, or four
    for state in (False, True):
        check(draw((1, length, 1, 2, width, width), gate, torch.bfloat16, state=state), torch.bfloat16, state=state)


def test_no_write_at_all() -> None:
    tensors = draw((1, 100, 1, 2, 64, 64), "scalar", torch.float32, state=True, beta=0.0)
    check(tensors, torch.float32, state=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_split_equals_whole(dtype: torch.dtype) -> None:
    tensors = {name: x.detach() for name, x in draw((2, 300, 2, 2, 64, 64), "scalar", dtype, state=True).items()}

    def run(start: int, stop: int, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        q, k, v, beta, decay = (tensors[n][:, start:stop] for n in ("q", "k", "v", "beta_BTH", "log_decay"))
        return linear_recurrence(q, k, v, beta_BTH=beta, log_decay=decay, state_BHKV=state)

    with use_backend("triton"):
        whole, final = run(0, 300, tensors["state_BHKV"])
        state, pieces = tensors["state_BHKV"], []
        for start, stop in itertools.pairwise((0, 1, 64, 131, 300)):
            piece, state = run(start, stop, state)
            pieces.append(piece)
    assert rms_error(torch.cat(pieces, 1), whole.double()) < 5e-3
    assert rms_error(state, final.double()) < 5e-3


def test_many_heads_and_long_sequences() -> None:
    with use_backend("triton"), torch.no_grad():
        many = F.normalize(torch.randn(70_000, 3, 1, 16, device="cuda"), dim=-1).bfloat16()
        beta = torch.rand(70_000, 3, 1, device="cuda")
        o, _ = linear_recurrence(many, many, many, beta_BTH=beta)
        some = many[-7:].double()
        assert rms_error(o[-7:], linear_recurrence_reference(some, some, some, beta_BTH=beta[-7:].double())[0]) < 5e-3
        long = F.normalize(torch.randn(1, 1_000_000, 20, 128, device="cuda", dtype=torch.bfloat16), dim=-1)  # > 2^31 elements
        decay, beta = torch.full((20,), -0.5, device="cuda"), torch.rand(1, 1_000_000, 20, device="cuda")
        o, _ = linear_recurrence(long, long, long, log_decay=decay, beta_BTH=beta)
        tail = long[:, -100:].double()
        want, _ = linear_recurrence_reference(tail, tail, tail, log_decay=decay.double(), beta_BTH=beta[:, -100:].double())
        assert rms_error(o[:, -10:], want[:, -10:]) < 5e-3


# Forms of the Hopper walks: heads fill the chip, narrow and wide; few wide heads; sequences that are cut.
REPEATED = [
    (1024, 256, 2, 64),
    (64, 300, 4, 128),
    (2, 2048, 16, 128),
    (2, 2048, 16, 64),
    (1, 4096, 8, 128),
    (64, 300, 4, (128, 64)),
]


@pytest.mark.parametrize("gate", ["none", "scalar"])
@pytest.mark.parametrize("shape", REPEATED, ids=str)
def test_repeats_are_equal_to_the_bit(shape, gate) -> None:
    """What depends on which copy lands first shows in one call of many."""
    batch, length, heads, width = shape
    k_dim, v_dim = width if isinstance(width, tuple) else (width, width)
    tensors = draw((batch, length, heads, heads, k_dim, v_dim), gate, torch.bfloat16, state=False)
    decay, beta = tensors.get("log_decay"), tensors["beta_BTH"]

    def forward() -> torch.Tensor:
        return linear_recurrence(tensors["q"], tensors["k"], tensors["v"], log_decay=decay, beta_BTH=beta)[0]

    def both() -> list[torch.Tensor]:
        o = forward()
        return [o, *torch.autograd.grad(o, list(tensors.values()), torch.ones_like(o))]

    with use_backend("triton"):
        first = both()
        with torch.no_grad():
            wanted = forward()
        for turn in range(300):
            with torch.no_grad():
                assert torch.equal(forward(), wanted), turn
            if turn % 10 == 0:
                assert all(map(torch.equal, both(), first)), turn


def test_a_new_batch_length_or_head_count_compiles_nothing() -> None:
    from kernels.delta_rule import (
        delta_coupling_triton,
        delta_hopper_backward,
        delta_hopper_carry,
        delta_hopper_couple,
        delta_hopper_transposed,
        delta_triton,
    )
    from kernels.delta_rule.delta_gradients_triton import gradients_kernel

    kernels = (
        delta_coupling_triton.coupling_kernel,
        delta_triton.forward_kernel,
        delta_triton.reverse_kernel,
        gradients_kernel,
        delta_hopper_carry.carry_kernel,
        delta_hopper_couple.couple_kernel,
        delta_hopper_transposed.forward_kernel,
        delta_hopper_backward.backward_kernel,
    )

    def run(batch: int, length: int, heads: int) -> None:
        q, k, v = (torch.randn(batch, length, heads, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
        decay, beta = -torch.rand(batch, length, heads, device="cuda"), torch.rand(batch, length, heads, device="cuda")
        with use_backend("triton"):
            o, _ = linear_recurrence(q, k, v, log_decay=decay.requires_grad_(), beta_BTH=beta.requires_grad_())
        o.float().sum().backward()

    require_nothing_new(kernels, run, (2, 64, 2), (1, 1, 1), (3, 77, 5), (16, 1024, 16))


def test_forward_and_backward_inside_a_cuda_graph() -> None:
    tensors = draw((2, 200, 2, 2, 64, 64), "scalar", torch.bfloat16, state=True)
    with use_backend("triton"):
        want = outputs_and_gradients(linear_recurrence, tensors, state=True)
        leaves = [x for name, x in tensors.items() if name not in ("q", "k", "v")]

        def call() -> list[torch.Tensor]:
            beta, decay, state = leaves
            o, final = linear_recurrence(tensors["q"], tensors["k"], tensors["v"], beta_BTH=beta, log_decay=decay, state_BHKV=state)
            assert final is not None
            return [o.detach(), final.detach(), *torch.autograd.grad((o, final), list(tensors.values()), weights)]

        weights = [torch.ones_like(x) for x in want[:2]]
        once = call()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            again = call()
    graph.replay()
    for a, b in zip(again, once, strict=True):
        assert torch.equal(a, b)
