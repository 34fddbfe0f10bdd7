"""Taylor attention in the interpreter, in fp32 against its definition in fp64: outputs, sums, gradients, and transformations."""

import itertools

import pytest
import torch
from torch.func import vmap

from kernels.dispatch import use_backend
from kernels.taylor import n_features, taylor_attention
from kernels.taylor_features import taylor_launch
from tests.kernels.oracle import SINGLE, poisoned, rms_error

# batch, length, heads, width of q and k, width of v; chunks have 32 tokens here
SHAPES = ((1, 1, 1, 16, 16), (2, 75, 2, 8, 33), (1, 100, 1, 5, 20), (1, 32, 1, 1, 16))


@pytest.fixture(autouse=True)
def _triton_and_poison(monkeypatch):
    monkeypatch.setattr(taylor_launch, "CHUNKS", {64: 32})
    with use_backend("triton"), poisoned():
        yield


def draw(shape, *, norm, state, seed=0):
    """q, k, v, and sums of some earlier tokens, in fp64."""
    batch, length, heads, k_dim, v_dim = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    tensors = [normal(batch, length, heads, width) for width in (k_dim, k_dim, v_dim)]
    if state:
        sums = (batch, heads, n_features(k_dim))
        tensors.append(normal(*sums, v_dim))
        if norm:
            tensors.append(0.1 * normal(*sums))
            tensors[-1][..., 0] += 50  # the sum of a token's weights stays positive
    return tensors


def call(*tensors, norm=True):
    state = (tensors[3], tensors[4] if norm else None) if len(tensors) > 3 else None
    o, sums = taylor_attention(*tensors[:3], eps=0.5 if norm else None, state=state)
    return (o, *(x for x in sums or () if x is not None))


def weighted(outputs):
    generator = torch.Generator().manual_seed(1)
    return sum((o * torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.dtype)).sum() for o in outputs)


def run(tensors, **options):
    leaves = [x.detach().requires_grad_() for x in tensors]
    outputs = call(*leaves, **options)
    return [x.detach() for x in (*outputs, *torch.autograd.grad(weighted(outputs), leaves))]


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("state", [False, True])
def test_equals_the_definition(norm, state):
    for shape in SHAPES:
        agree_with_the_definition(shape, norm=norm, state=state)


def agree_with_the_definition(shape, *, norm, state):
    exact = draw(shape, norm=norm, state=state)
    got = run([x.float() for x in exact], norm=norm)
    with use_backend("reference"):
        want = run(exact, norm=norm)
    for index, (a, b) in enumerate(zip(got, want, strict=True)):
        assert rms_error(a, b) <= SINGLE, (shape, index)


def test_a_walk_over_whole_sequences(monkeypatch):
    """In fp32, which ships with chunks of their own; the last step is not whole, and the backward pass reads what was kept."""
    for name, value in {"walks": lambda call: True, "WALK_STEP": 16, "WALK_ROWS": 32}.items():
        monkeypatch.setattr(taylor_launch, name, value)
    for shape in ((1, 75, 2, 16, 16), (1, 40, 1, 5, 20)):
        agree_with_the_definition(shape, norm=False, state=False)


def test_walked_are_long_sequences_that_fill_the_chip():
    def walks(batch, length, heads, dtype=torch.bfloat16, k_dim=16):
        q, v = (torch.empty(batch, length, heads, width, dtype=dtype, device="meta") for width in (k_dim, 64))
        return taylor_launch.walks(taylor_launch._call(q, q, v))

    assert walks(8, 2048, 16)
    assert walks(16, 4000, 16)
    assert not any((walks(9, 2048, 16), walks(2, 8192, 16), walks(32, 512, 16)))
    assert not any((walks(8, 2048, 16, torch.float16), walks(8, 2048, 16, torch.float32), walks(8, 2048, 16, k_dim=8)))


def test_a_strided_projection_and_the_future():
    qkv = torch.randn(2, 70, 3, 2, 16)
    before = call(*qkv.unbind(2))[0]
    with use_backend("reference"):
        assert rms_error(before, call(*qkv.double().unbind(2))[0]) <= SINGLE
    qkv[:, 61:] = 1e4
    assert torch.equal(call(*qkv.unbind(2))[0][:, :61], before[:, :61])


def test_split_equals_whole():
    tensors = [x.float() for x in draw((1, 90, 2, 8, 16), norm=True, state=True)]
    whole, pieces, state = call(*tensors), [], tensors[3:]
    for start, stop in itertools.pairwise((0, 1, 37, 64, 90)):
        piece, *state = call(*(x[:, start:stop] for x in tensors[:3]), *state)
        pieces.append(piece)
    for got, want in zip((torch.cat(pieces, 1), *state), whole, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("state", [False, True])
def test_vmap_equals_loop(state):
    members = [[x.float() for x in draw((1, 40, 1, 4, 16), norm=True, state=state, seed=seed)] for seed in range(2)]
    stacked = [torch.stack(parts).requires_grad_() for parts in zip(*members, strict=True)]
    mapped = vmap(call)(*stacked)
    got = [*mapped, *torch.autograd.grad(sum(weighted(part) for part in zip(*mapped, strict=True)), stacked)]
    want = [torch.stack(parts) for parts in zip(*(run(member) for member in members), strict=True)]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_gradients_inside_vmap_with_shared_keys():
    q, k, v = (x.float() for x in draw((1, 40, 1, 4, 16), norm=True, state=False))
    queries = torch.randn(2, *q.shape)

    def loss(q):
        return call(q, k, v)[0].square().sum()

    got = vmap(torch.func.grad(loss))(queries)
    for member, q in zip(got, queries, strict=True):
        torch.testing.assert_close(member, torch.func.grad(loss)(q), rtol=1e-4, atol=1e-5)


def test_compiles_without_graph_breaks():
    leaves = [x.float().requires_grad_() for x in draw((1, 40, 1, 4, 16), norm=True, state=True)]
    want = call(*leaves)
    got = torch.compile(call, backend="aot_eager", fullgraph=True)(*leaves)
    gradients = (torch.autograd.grad(weighted(outputs), leaves) for outputs in (got, want))
    for a, b in zip((*got, *next(gradients)), (*want, *next(gradients)), strict=True):
        torch.testing.assert_close(a, b)


def test_torch_accepts_the_operator():
    q, k, v = (x.float().requires_grad_() for x in draw((1, 34, 1, 4, 16), norm=True, state=False))
    rows = taylor_launch.n_rows(4)
    sums = (torch.randn(1, 1, rows, 16, requires_grad=True), torch.rand(1, 1, rows, requires_grad=True))
    operator = torch.ops.mixer_bench.taylor_attention.default
    torch.library.opcheck(operator, (q[:, :20], k[:, :20], v[:, :20], None, None, True, 1e-6, False), test_utils="test_faketensor")
    torch.library.opcheck(operator, (q, k, v, *sums, True, 1e-6, True))


def test_what_the_kernels_lack_is_said():
    x = torch.randn(1, 4, 1, 65)
    with pytest.raises(ValueError, match="feature dim 65 is above 64"):
        taylor_attention(x, x, x, eps=None)
    with pytest.raises(ValueError, match=r"state\[1\] is missing"):
        taylor_attention(x[..., :4], x[..., :4], x, eps=1e-6, state=(torch.randn(1, 1, 15, 65), None))
    with pytest.raises(ValueError, match=r"state\[0\] has shape \(1, 1, 9, 65\); with v of shape \(1, 4, 1, 65\) it is"):
        taylor_attention(x[..., :4], x[..., :4], x, eps=None, state=(torch.randn(1, 1, 9, 65), None))
