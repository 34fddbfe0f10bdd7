"""Attention over an index on a CUDA device against masked softmax in fp64, in every dtype, index and shape class."""

from __future__ import annotations

import pytest
import torch

from kernels._replay import forget
from kernels.attention import attention_reference, band_mask, banded_attention, share_heads
from kernels.dispatch import use_backend
from kernels.indexed import chosen_launch
from kernels.indexed.indexed_op import indexed_attention
from kernels.indexed_attention import block_attention, decode_attention, sparse_attention
from kernels.sparse_masks import mask
from tests.gpu.compiled import require_nothing_new
from tests.kernels.oracle import rms_error

pytestmark = pytest.mark.gpu

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# batch, heads of q, heads of k and v, length, head dim
SHAPES = ((2, 2, 2, 300, 64), (1, 4, 1, 200, 128), (1, 3, 3, 75, 60), (1, 16, 1, 130, 64), (1, 1, 1, 200, 256), (1, 1, 1, 1, 16))
# every shape in bf16, some in the others: each is another set of kernels to compile
CASES = [(shape, torch.bfloat16) for shape in SHAPES]
CASES += [(SHAPES[n], dtype) for n, dtype in ((0, torch.float16), (2, torch.float16), (0, torch.float32), (1, torch.float32))]


def draw(shape: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
    batch, heads, kv_heads, length, width = shape
    g = torch.Generator("cuda").manual_seed(length)
    sizes = ((batch, length, n, width) for n in (heads, kv_heads, kv_heads))
    return [torch.randn(size, generator=g, device="cuda").to(dtype).transpose(1, 2).requires_grad_() for size in sizes]


def close(function, tensors: list[torch.Tensor], visible: torch.Tensor) -> None:
    """Outputs and gradients of the Triton form, twice, against the definition."""
    heads = tensors[0].shape[1]
    exact = [x.detach().double().requires_grad_() for x in tensors]
    want = attention_reference(exact[0], *(share_heads(x, heads) for x in exact[1:]), visible)
    dy = torch.randn_like(want)
    want = [want.detach(), *torch.autograd.grad(want, exact, dy)]
    runs = []
    with use_backend("triton"):
        for _ in range(2):
            y = function(*tensors)
            runs.append([y.detach(), *torch.autograd.grad(y, tensors, dy.to(y.dtype))])
    limit = 2e-5 if tensors[0].dtype == torch.float32 else 5e-3
    for name, a, b, c in zip(("y", "dq", "dk", "dv"), *runs, want, strict=True):
        assert torch.equal(a, b), f"{name} differs from run to run"
        assert torch.isfinite(a).all(), name
        assert rms_error(a, c) < limit or float(c.abs().max()) < 1e-9, (name, rms_error(a, c))


@pytest.mark.parametrize(("shape", "dtype"), CASES, ids=str)
def test_band(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    length = shape[3]
    for window, sinks in ((1, 0), (64, 0), (100, 0), *([(50, 3)] if shape == SHAPES[1] else [])):
        visible = band_mask(length, length, window=window, sinks=sinks, device="cuda")

        def band(q, k, v, window=window, sinks=sinks):
            return banded_attention(q, k, v, window=window, sink_kv=(k[:, :, :sinks], v[:, :, :sinks]) if sinks else None)

        close(band, draw(shape, dtype), visible)


@pytest.mark.parametrize("sinks", [0, 3])
def test_a_band_continues(sinks: int) -> None:
    q, k, v = (x.detach() for x in draw((2, 4, 2, 300, 64), torch.bfloat16))
    window, first = 70, 100
    stored = (x[:, :, first - window + 1 :] for x in (k, v))
    sink_kv = (k[:, :, :sinks], v[:, :, :sinks]) if sinks else None
    start = torch.full((2,), first, device="cuda")
    with use_backend("triton"):
        y = banded_attention(q[:, :, first:], *stored, window=window, start_B=start, sink_kv=sink_kv)
    visible = band_mask(300, 300, window=window, sinks=sinks, device="cuda")
    want = attention_reference(q.double(), *(share_heads(x.double(), 4) for x in (k, v)), visible)
    assert rms_error(y, want[:, :, first:]) < 5e-3


@pytest.mark.parametrize(("shape", "dtype"), CASES, ids=str)
@pytest.mark.parametrize("by_key", [False, True], ids=["by query", "by key"])
def test_chosen_blocks(shape: tuple[int, ...], dtype: torch.dtype, by_key: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chosen_launch, "BY_KEY_FROM", 0 if by_key else 64)  # of at most 19 blocks
    monkeypatch.setattr(chosen_launch, "SHARE_BYTES", 1 << 20)  # several launches
    forget()
    batch, heads, kv_heads, length, _ = shape
    token = torch.arange(length, device="cuda")
    for block in (16, 64):
        index = torch.arange(-(-length // block), device="cuda")
        own = token[:, None] // block == index
        chosen = torch.rand(batch, kv_heads, length, len(index), device="cuda") < 0.4
        chosen = (chosen & (index < token[:, None] // block)) | own
        visible = share_heads(chosen.repeat_interleave(block, -1)[..., :length] & (token[:, None] >= token), heads)
        most = int(chosen.sum(-1).max())
        close(lambda q, k, v, c=chosen, b=block, m=most: block_attention(q, k, v, c, block=b, most=m), draw(shape, dtype), visible)


@pytest.mark.parametrize(
    ("pattern", "options"),
    [
        ("dilated", {"window": 8, "dilation": 5}),
        ("strided", {"stride": 16}),
        ("longformer", {"window": 8, "dilation": 2, "sinks": 2}),
        ("bigbird", {"window": 16, "sinks": 2, "n_random": 3, "seed": 0}),
        ("power", {"window": 16, "sinks": 4}),
    ],
)
def test_static_patterns(pattern: str, options: dict[str, int]) -> None:
    for length in (63, 700):
        visible = mask(pattern, length, device="cuda", **options)
        tensors = draw((1, 2, 2, length, 64), torch.bfloat16)
        close(lambda q, k, v: sparse_attention(q, k, v, pattern=pattern, **options), tensors, visible)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_token(dtype: torch.dtype) -> None:
    for batch, heads, kv_heads, length, width in (
        (2, 4, 2, 3000, 128),
        (1, 1, 1, 5, 60),
        (3, 40, 2, 700, 64),
        (1, 16, 1, 40000, 256),
    ):
        q, k, v = (x.detach() for x in draw((batch, heads, kv_heads, length, width), dtype))
        seen = torch.rand(batch, kv_heads, length, device="cuda") < 0.5
        seen[..., -1] = True
        with use_backend("triton"), torch.no_grad():
            y = decode_attention(q[:, :, -1], k, v, seen)
        exact = (q[:, :, -1:].double(), *(share_heads(x.double(), heads) for x in (k, v)))
        want = attention_reference(*exact, share_heads(seen, heads)[:, :, None])[:, :, 0]
        assert rms_error(y, want) < (2e-5 if dtype == torch.float32 else 5e-3)


def test_many_heads_and_long_sequences() -> None:
    many = torch.randn(70_000, 1, 3, 16, device="cuda", dtype=torch.bfloat16)
    y, _ = indexed_attention(many, many, many, None, None, "band", [2, 0, 0, 0])
    visible = band_mask(3, 3, window=2, device="cuda")
    assert rms_error(y[-7:], attention_reference(*[many[-7:].double()] * 3, visible)) < 5e-3
    long = torch.randn(1, 20, 1_000_000, 128, device="cuda", dtype=torch.bfloat16)  # more than 2^31 elements
    y, _ = indexed_attention(long, long, long, None, None, "band", [64, 0, 0, 0])
    tail = long[:, :, -200:].double()
    want = attention_reference(tail, tail, tail, band_mask(200, 200, window=64, device="cuda"))
    assert rms_error(y[:, :, -100:], want[:, :, -100:]) < 5e-3


def test_a_new_batch_length_or_head_count_compiles_nothing() -> None:
    from kernels.indexed import indexed_grad_triton, indexed_triton

    kernels = (indexed_triton.forward_kernel, indexed_grad_triton.query_kernel, indexed_grad_triton.key_kernel)

    def run(batch: int, heads: int, kv_heads: int, length: int) -> None:
        q, k, v = draw((batch, heads, kv_heads, length, 64), torch.bfloat16)
        indexed_attention(q, k, v, None, None, "band", [64, 0, 0, 0])[0].float().sum().backward()

    require_nothing_new(kernels, run, (2, 2, 2, 100), (1, 1, 1, 1), (3, 5, 5, 77), (16, 16, 4, 2048))


def test_inside_a_cuda_graph() -> None:
    q, k, v = (x.detach() for x in draw((2, 2, 2, 500, 64), torch.bfloat16))
    with use_backend("triton"):
        want = sparse_attention(q, k, v, pattern="strided", stride=16)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = sparse_attention(q, k, v, pattern="strided", stride=16)
    graph.replay()
    assert torch.equal(y, want)
