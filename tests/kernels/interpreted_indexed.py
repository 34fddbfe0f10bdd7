"""Attention over an index in the interpreter, in fp32 against masked softmax in fp64: outputs, gradients, and transformations."""

import pytest
import torch
from torch.func import vmap

from kernels import _ahead
from kernels.attention import attention_reference, band_mask, banded_attention, share_heads
from kernels.dispatch import use_backend
from kernels.indexed import chosen_launch, indexed_launch, sparse_index
from kernels.indexed_attention import block_attention, decode_attention, sparse_attention
from kernels.sparse_masks import mask
from tests.kernels.oracle import SINGLE, poisoned, rms_error


@pytest.fixture(autouse=True)
def _triton_and_poison():
    with use_backend("triton"), poisoned():
        yield


def draw(batch, heads, kv_heads, length, width, v_width=16):
    """q, k, v as a projection leaves them, time before heads."""
    sizes = ((batch, length, heads, width), (batch, length, kv_heads, width), (batch, length, kv_heads, v_width))
    return [torch.randn(size).transpose(1, 2).requires_grad_() for size in sizes]


def close(function, tensors, visible):
    """Outputs and gradients against the definition."""
    exact = [x.detach().double().requires_grad_() for x in tensors]
    want = attention_reference(exact[0], *(share_heads(x, tensors[0].shape[1]) for x in exact[1:]), visible)
    dy = torch.randn_like(want)
    got = function(*tensors)
    pairs = zip(torch.autograd.grad(got, tensors, dy.to(got.dtype)), torch.autograd.grad(want, exact, dy), strict=True)
    for name, (a, b) in zip("yqkv", ((got, want), *pairs), strict=True):
        assert rms_error(a, b) <= SINGLE or float(b.abs().max()) < 1e-9, name


def band(window, sinks=0):
    """`banded_attention` on a whole sequence, never as plain causal attention."""

    def attend(q, k, v):
        return banded_attention(q, k, v, window=window, sink_kv=(k[:, :, :sinks], v[:, :, :sinks]) if sinks else None)

    return attend


@pytest.mark.parametrize(
    ("sizes", "window", "sinks"),
    [
        ((1, 1, 1, 75, 16), 20, 0),
        ((2, 4, 2, 70, 20), 9, 3),
        ((1, 3, 1, 150, 16), 9, 3),  # far queries of sinks in two parts
        ((1, 16, 1, 33, 16), 30, 0),
        ((1, 3, 1, 40, 16), 1, 1),
        ((1, 1, 1, 40, 72), 17, 0),
    ],
)
def test_band(sizes, window, sinks):
    length = sizes[3]
    close(band(window, sinks), draw(*sizes), band_mask(length, length, window=window, sinks=sinks))


@pytest.mark.parametrize("sinks", [0, 3])
def test_a_band_continues_from_stored_keys(sinks):
    window, starts = 8, torch.tensor([2, 50])
    whole = [x.detach() for x in draw(2, 4, 2, 80, 16)]
    parts, visible = [], band_mask(80, 80, window=window, sinks=sinks)
    for row, start in enumerate(starts.tolist()):
        q, k, v = (x[row : row + 1] for x in whole)
        stored = [torch.cat((torch.full_like(x[:, :, :window], 9.0), x), 2)[:, :, start + 1 : start + window + 20] for x in (k, v)]
        parts.append((q[:, :, start : start + 20], *stored, k[:, :, :sinks], v[:, :, :sinks]))
    q, k, v, sink_k, sink_v = (torch.cat(part) for part in zip(*parts, strict=True))
    y = banded_attention(q, k, v, window=window, start_B=starts, sink_kv=(sink_k, sink_v) if sinks else None)
    want = attention_reference(whole[0].double(), *(share_heads(x.double(), 4) for x in whole[1:]), visible)
    for row, start in enumerate(starts.tolist()):
        # a sink that is not a key of the past yet holds what this test has put there
        assert rms_error(y[row, :, 4:], want[row, :, start + 4 : start + 20]) <= SINGLE


@pytest.mark.parametrize(
    ("pattern", "options"),
    [
        ("strided", {"stride": 6}),
        ("bigbird", {"window": 4, "sinks": 2, "n_random": 2, "seed": 0}),
        ("power", {"window": 4, "sinks": 1}),
    ],
)
def test_static_patterns(pattern, options):
    visible = mask(pattern, 70, **options)
    for _ in range(2):  # the second call reads the kept index
        close(lambda q, k, v: sparse_attention(q, k, v, pattern=pattern, **options), draw(1, 2, 1, 70, 16), visible)


def test_an_index_that_nobody_wrote_is_not_kept(monkeypatch):
    """While kernels are only compiled, nothing is launched."""
    monkeypatch.setattr(sparse_index, "_kept", {})
    arguments = ("strided", (6,), 40, (16, 16), torch.device("cpu"))
    with _ahead._set(_ahead.Wanted()):
        sparse_index.static_index(*arguments)
    assert not sparse_index._kept
    index = sparse_index.static_index(*arguments)
    assert list(sparse_index._kept.values()) == [index]


def choose(batch, kv_heads, length, block):
    """Random blocks, the own one always: the choice, and the mask that it means."""
    token, index = torch.arange(length), torch.arange(-(-length // block))
    own = token[:, None] // block == index
    chosen = (torch.rand(batch, kv_heads, length, len(index)) < 0.3) & (index < token[:, None] // block) | own
    return chosen, chosen.repeat_interleave(block, -1)[..., :length] & (token[:, None] >= token)


@pytest.mark.parametrize(("block", "heads", "kv_heads", "width"), [(16, 2, 2, 16), (64, 4, 1, 16), (32, 16, 1, 16), (8, 1, 1, 72)])
def test_chosen_blocks(block, heads, kv_heads, width):
    length = 75 if heads < 16 else 34
    chosen, visible = choose(2, kv_heads, length, block)
    tensors = draw(2, heads, kv_heads, length, width)
    close(lambda q, k, v: block_attention(q, k, v, chosen, block=block), tensors, share_heads(visible, heads))


@pytest.mark.parametrize(
    ("block", "heads", "kv_heads", "share_bytes"), [(64, 2, 1, 50_000), (32, 2, 2, 1 << 29), (32, 32, 1, 1 << 29)]
)
def test_chosen_blocks_are_walked_by_key(monkeypatch, block, heads, kv_heads, share_bytes):
    """Blocks of two tiles of keys and more than one launch, key heads of their own, more heads than a bundle."""
    length = 100 if heads < 16 else 40
    for name, value in {"BY_KEY_FROM": 0, "SHARE_BYTES": share_bytes, "SHORTEST_SPAN": 30, "TOKENS_TO_LIST": 16}.items():
        monkeypatch.setattr(chosen_launch, name, value)
    chosen, visible = choose(1, kv_heads, length, block)
    most = int(chosen.sum(-1).max())
    tensors = draw(1, heads, kv_heads, length, 20, 24)
    close(lambda q, k, v: block_attention(q, k, v, chosen, block=block, most=most), tensors, share_heads(visible, heads))


def test_the_most_is_checked():
    chosen = torch.ones(1, 1, 128, 4, dtype=torch.bool)
    q, k, v = (x.detach() for x in draw(1, 1, 1, 128, 16))
    with pytest.raises(ValueError, match="most=2, but a token chose 4 blocks"):
        block_attention(q, k, v, chosen, block=32, most=2)
    with pytest.raises(ValueError, match="most=0: a token reads at least one block"):
        block_attention(q, k, v, chosen, block=32, most=0)


def test_tiles_are_listed_in_parts(monkeypatch):
    monkeypatch.setattr(indexed_launch, "FLAGS_AT_ONCE", 2)
    chosen, visible = choose(1, 1, 75, 8)
    close(lambda q, k, v: block_attention(q, k, v, chosen, block=8), draw(1, 2, 1, 75, 16), share_heads(visible, 2))


@pytest.mark.parametrize(("heads", "kv_heads", "n_keys", "width"), [(4, 2, 100, 16), (1, 1, 5, 20), (20, 1, 70, 72)])
def test_one_token(heads, kv_heads, n_keys, width):
    q, k, v = (x.detach() for x in draw(2, heads, kv_heads, n_keys, width))
    for shared in (1, kv_heads):
        seen = torch.rand(2, shared, n_keys) < 0.5
        seen[..., -1] = True
        k_unread = k.masked_fill(~seen.expand(-1, kv_heads, -1)[..., None], float("nan"))
        y = decode_attention(q[:, :, 0], k_unread, v, seen)
        exact = (q[:, :, :1].double(), *(share_heads(x.double(), heads) for x in (k, v)))
        want = attention_reference(*exact, share_heads(seen.expand(-1, kv_heads, -1), heads)[:, :, None])
        assert rms_error(y, want[:, :, 0]) <= SINGLE


def test_vmap_equals_loop():
    members = [draw(1, 2, 1, 34, 16) for _ in range(2)]
    chosen = torch.stack([choose(1, 1, 34, 8)[0] for _ in range(2)])
    stacked = [torch.stack(parts).detach().requires_grad_() for parts in zip(*members, strict=True)]
    static = {"pattern": "strided", "stride": 6}
    cases = (
        (vmap(band(9, 2)), lambda q, k, v, _: band(9, 2)(q, k, v)),
        (vmap(lambda q, k, v: sparse_attention(q, k, v, **static)), lambda q, k, v, _: sparse_attention(q, k, v, **static)),
        (
            lambda q, k, v: vmap(lambda *x: block_attention(*x, block=8))(q, k, v, chosen),
            lambda q, k, v, n: block_attention(q, k, v, chosen[n], block=8),
        ),
    )
    for mapped, one in cases:
        got, want = mapped(*stacked), torch.stack([one(*member, n) for n, member in enumerate(members)])
        torch.testing.assert_close(got, want)
        dy = torch.randn_like(got)
        wanted = torch.autograd.grad(want, [x for member in members for x in member], dy)
        for index, a in enumerate(torch.autograd.grad(got, stacked, dy)):
            torch.testing.assert_close(a, torch.stack(wanted[index::3]), rtol=1e-4, atol=1e-5)


def test_gradients_inside_vmap_with_shared_keys():
    q, k, v = (x.detach() for x in draw(1, 1, 1, 34, 16))
    queries, chosen = torch.randn(2, *q.shape), choose(1, 1, 34, 8)[0]
    static = {"pattern": "strided", "stride": 6}
    for attend in (band(9), lambda *x: block_attention(*x, chosen, block=8), lambda *x: sparse_attention(*x, **static)):

        def loss(q, attend=attend):
            return attend(q, k, v).square().sum()

        got = vmap(torch.func.grad(loss))(queries)
        for member, q in zip(got, queries, strict=True):
            torch.testing.assert_close(member, torch.func.grad(loss)(q), rtol=1e-4, atol=1e-5)


def test_compiles_without_graph_breaks():
    tensors, chosen = draw(1, 2, 1, 40, 16), choose(1, 1, 40, 8)[0]
    cases = (
        band(9, 2),
        lambda q, k, v: sparse_attention(q, k, v, pattern="power", window=4, sinks=1),
        lambda q, k, v: block_attention(q, k, v, chosen, block=8),
    )
    for attend in cases:
        got, want = torch.compile(attend, backend="aot_eager", fullgraph=True)(*tensors), attend(*tensors)
        torch.testing.assert_close(got, want)
        dy = torch.randn_like(got)
        for a, b in zip(torch.autograd.grad(got, tensors, dy), torch.autograd.grad(want, tensors, dy), strict=True):
            torch.testing.assert_close(a, b)


def test_torch_accepts_the_operators():
    q, k, v = draw(1, 2, 1, 20, 16)
    operator = torch.ops.mixer_bench.indexed_attention.default
    torch.library.opcheck(operator, (q, k, v, None, None, "band", [9, 2, 0, 0]))
    torch.library.opcheck(operator, (q, k, v, None, torch.ones(1, 20, 2, dtype=torch.bool), "chosen", [16, 2]))
    seen = torch.ones(1, 1, 20, dtype=torch.bool)
    torch.library.opcheck(torch.ops.mixer_bench.decode_attention.default, (q[:, :, 0].detach(), k.detach(), v.detach(), seen))


def test_what_the_kernels_lack_is_said():
    q, k, v = draw(1, 2, 1, 20, 16)
    with pytest.raises(ValueError, match="block 12 neither divides 32 nor is a multiple of it"):
        block_attention(q, k, v, torch.ones(1, 1, 20, 2, dtype=torch.bool), block=12)
    with pytest.raises(ValueError, match=r"chosen has the shape \[1, 1, 20, 3\]; with block=16 it must be \[1, 1, 20, 2\]"):
        block_attention(q, k, v, torch.ones(1, 1, 20, 3, dtype=torch.bool), block=16)
    with pytest.raises(ValueError, match="has no gradient"):
        decode_attention(q[:, :, 0], k, v, torch.ones(1, 1, 20, dtype=torch.bool))
    with pytest.raises(ValueError, match="k's heads divide q's"):
        sparse_attention(q, torch.randn(1, 3, 20, 16), torch.randn(1, 3, 20, 16), pattern="strided", stride=4)
    with pytest.raises(ValueError, match="strided takes stride, not window"):
        sparse_attention(q, k, v, pattern="strided", window=4)
    wide = torch.randn(1, 1, 20, 300)
    with pytest.raises(ValueError, match="head dim 300 is above 256"):
        banded_attention(wide, wide, wide, window=4)
