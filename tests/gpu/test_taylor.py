"""Taylor linear attention on a CUDA device against its definition in fp64, in every dtype and shape class."""

from __future__ import annotations

import itertools

import pytest
import torch

from kernels.dispatch import use_backend
from kernels.taylor import n_features, taylor_attention
from kernels.taylor_features import taylor_launch
from tests.gpu.compiled import require_nothing_new
from tests.kernels.oracle import rms_error

pytestmark = pytest.mark.gpu

# batch, length, heads, width of q and k, width of v
SHAPES = (
    (2, 2, 1, 16, 64),
    (2, 700, 2, 16, 64),
    (1, 1300, 2, 16, 128),
    (2, 300, 3, 8, 60),
    (1, 1100, 1, 24, 65),
    (1, 100, 1, 64, 256),
)
# every shape in bf16, some in the others: each is another set of kernels to compile
CASES = [(shape, torch.bfloat16) for shape in SHAPES]
CASES += [(SHAPES[n], dtype) for n, dtype in ((1, torch.float16), (1, torch.float32), (3, torch.float32))]


def draw(shape: tuple[int, ...], dtype: torch.dtype, *, norm: bool, state: bool) -> list[torch.Tensor]:
    """q, k, v in the dtype given and, in fp32, sums of some earlier tokens."""
    batch, length, heads, k_dim, v_dim = shape
    g = torch.Generator("cuda").manual_seed(length)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=g, device="cuda")

    tensors = [normal(batch, length, heads, width).to(dtype) for width in (k_dim, k_dim, v_dim)]
    if state:
        sums = (batch, heads, n_features(k_dim))
        tensors.append(normal(*sums, v_dim))
        if norm:
            tensors.append(0.1 * normal(*sums))
            tensors[-1][..., 0] += 50  # a weight's sum stays positive
    return [x.requires_grad_() for x in tensors]


def outputs_and_gradients(tensors: list[torch.Tensor], *, norm: bool) -> list[torch.Tensor]:
    state = (tensors[3], tensors[4] if norm else None) if len(tensors) > 3 else None
    o, sums = taylor_attention(*tensors[:3], eps=0.5 if norm else None, state=state)
    results = [o, *(x for x in sums or () if x is not None)]
    g = torch.Generator("cuda").manual_seed(1)
    weights = [torch.randn(x.shape, generator=g, device="cuda").to(x.dtype) for x in results]
    loss = sum((x.to(torch.promote_types(x.dtype, torch.float32)) * w).sum() for x, w in zip(results, weights, strict=True))
    return [x.detach() for x in (*results, *torch.autograd.grad(loss, tensors))]


def test_a_walk_over_whole_sequences() -> None:
    shape = (taylor_launch.MULTIPROCESSORS, taylor_launch.WALKED_FROM + 100, 1, 16, 64)
    tensors = draw(shape, torch.bfloat16, norm=False, state=False)
    with use_backend("triton"):
        got, again = (outputs_and_gradients(tensors, norm=False) for _ in range(2))
    part = [x.detach()[::40].double().requires_grad_() for x in tensors]
    g = torch.Generator("cuda").manual_seed(1)
    weight = torch.randn(got[0].shape, generator=g, device="cuda").bfloat16()[::40].double()
    with use_backend("chunked"):
        o, _ = taylor_attention(*part, eps=None)
        want = [o.detach(), *torch.autograd.grad((o * weight).sum(), part)]
    for index, (a, b, c) in enumerate(zip(got, want, again, strict=True)):
        assert torch.equal(a, c), f"{index} differs from run to run"
        assert rms_error(a[::40], b) < 5e-3, index


@pytest.mark.parametrize(("shape", "dtype"), CASES, ids=str)
def test_equals_the_definition(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for norm, state in ((True, False), (True, True), (False, True)) if shape == SHAPES[1] else ((True, True),):
        tensors = draw(shape, dtype, norm=norm, state=state)
        with use_backend("triton"):
            got, again = (outputs_and_gradients(tensors, norm=norm) for _ in range(2))
        with use_backend("chunked"):
            want = outputs_and_gradients([x.detach().double().requires_grad_() for x in tensors], norm=norm)
        for index, (a, b, c) in enumerate(zip(got, want, again, strict=True)):
            assert torch.equal(a, c), f"{index} differs from run to run"
            assert rms_error(a, b) < (2e-5 if dtype == torch.float32 else 5e-3), (index, norm, state, rms_error(a, b))


def test_split_equals_whole() -> None:
    q, k, v, sums, norms = (x.detach() for x in draw((2, 1300, 2, 16, 64), torch.bfloat16, norm=True, state=True))
    with use_backend("triton"):
        whole, final = taylor_attention(q, k, v, eps=1e-6, state=(sums, norms))
        state, pieces = (sums, norms), []
        for start, stop in itertools.pairwise((0, 1, 64, 700, 1300)):
            piece, state = taylor_attention(*(x[:, start:stop] for x in (q, k, v)), eps=1e-6, state=state)
            pieces.append(piece)
    assert rms_error(torch.cat(pieces, 1), whole.double()) < 5e-3
    assert all(rms_error(a, b.double()) < 5e-3 for a, b in zip(state, final, strict=True))


def test_many_heads_and_long_sequences() -> None:
    with use_backend("triton"), torch.no_grad():
        q, v = (torch.randn(70_000, 3, 1, width, device="cuda", dtype=torch.bfloat16) for width in (8, 64))
        many, _ = taylor_attention(q, q, v, eps=1e-6)
        q, v = (torch.randn(1, 1_000_000, 1, width, device="cuda", dtype=torch.bfloat16) for width in (16, 64))
        long, _ = taylor_attention(q, q, v + 1, eps=1e-6)
    assert torch.isfinite(many).all()
    assert float((long[:, -1000:].float().mean() - 1).abs()) < 0.02


def test_a_new_batch_length_or_head_count_compiles_nothing() -> None:
    from kernels.taylor_features import taylor_grad_triton, taylor_triton

    kernels = (taylor_triton.forward_kernel, taylor_triton.state_kernel, taylor_triton.scan_kernel)
    kernels += (taylor_grad_triton.query_kernel, taylor_grad_triton.key_kernel)

    def run(batch: int, length: int, heads: int) -> None:
        q, k, v = (
            torch.randn(batch, length, heads, n, device="cuda", dtype=torch.bfloat16, requires_grad=True) for n in (16, 16, 64)
        )
        with use_backend("triton"):
            o, _ = taylor_attention(q, k, v, eps=1e-6)
        o.float().sum().backward()

    require_nothing_new(kernels, run, (2, 1024, 2), (1, 1, 1), (3, 777, 5), (16, 2048, 16))


def test_inside_a_cuda_graph() -> None:
    q, k, v = (
        torch.randn(2, taylor_launch.chunk_length(16) + 200, 2, n, device="cuda", dtype=torch.bfloat16) for n in (16, 16, 64)
    )
    with use_backend("triton"):
        want, _ = taylor_attention(q, k, v, eps=1e-6)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            o, _ = taylor_attention(q, k, v, eps=1e-6)
    graph.replay()
    assert torch.equal(o, want)
