"""Static sparse patterns against brute force, and state counts of the attention and convolution mixers."""

import math
from collections.abc import Callable

import pytest
import torch

from kernels.sparse_masks import MASKS, mask
from mixers.attention import Attention
from mixers.base_conv import BaseConv
from mixers.block_topk import BlockTopK
from mixers.h3 import H3
from mixers.hyena import Hyena
from mixers.sliding_window import SlidingWindow
from mixers.static_sparse import StaticSparse

T = 70
OPTIONS = {
    "dilated": {"window": 4, "dilation": 3},
    "strided": {"stride": 6},
    "longformer": {"window": 4, "dilation": 2, "sinks": 3},
    "bigbird": {"window": 4, "sinks": 3, "n_random": 2, "seed": 7},
    "power": {"window": 3, "sinks": 2},
    "sink_window": {"window": 5, "sinks": 2},
}
DEFINITIONS: dict[str, Callable[[int, int], bool]] = {
    "dilated": lambda i, j: j in {i, i - 3, i - 6, i - 9},
    "strided": lambda i, j: i - j < 6 or (i - j) % 6 == 0,
    "longformer": lambda i, j: j in {i, i - 2, i - 4, i - 6} or j < 3,
    "power": lambda i, j: i - j < 3 or j < 2 or i - j in {1, 2, 4, 8, 16, 32, 64},
    "sink_window": lambda i, j: i - j < 5 or j < 2,
}


@pytest.mark.parametrize("name", DEFINITIONS)
def test_mask_is_its_definition(name: str):
    expected = [[j <= i and DEFINITIONS[name](i, j) for j in range(T)] for i in range(T)]
    assert torch.equal(mask(name, T, **OPTIONS[name]), torch.tensor(expected))


@pytest.mark.parametrize("name", MASKS)
def test_rows_are_causal_see_themselves_and_do_not_depend_on_the_length(name: str):
    found = mask(name, T, **OPTIONS[name])
    assert not found.triu(1).any()
    assert found.diagonal().all()
    assert torch.equal(found[:33, :33], mask(name, 33, **OPTIONS[name]))


def test_bigbird_adds_random_keys_to_window_and_sinks():
    options = OPTIONS["bigbird"]
    base = mask("sink_window", 2000, window=options["window"], sinks=options["sinks"])
    found = mask("bigbird", 2000, **options)
    assert not (base & ~found).any()
    extra = (found & ~base).sum(1)
    assert extra.max() <= options["n_random"]
    assert extra[1000:].float().mean() > 0.97 * options["n_random"]
    assert not torch.equal(found, mask("bigbird", 2000, **options | {"seed": 8}))


def test_bigbird_draws_uniformly_from_the_past():
    found = mask("bigbird", 2000, window=1, sinks=0, n_random=4, seed=0)
    query, key = found.tril(-1).nonzero().unbind(1)
    quartile = (4 * key // (query + 1)).bincount(minlength=4) / len(key)
    assert (quartile - 0.25).abs().max() < 0.02


@pytest.mark.parametrize("length", [2, 3, 8, 64, 70, 257])
def test_power_attention_sees_the_whole_past_at_logarithmic_depth(length: int):
    """The receptive field is complete at depth ceil(log2 T), and no earlier for a power of two."""
    one = mask("power", length, window=1, sinks=0).double()
    reach, depth = one, 1
    while not bool((reach > 0).tril().eq(torch.ones(length, length).tril()).all()):
        reach, depth = (reach @ one).clamp(max=1), depth + 1
    bound = math.ceil(math.log2(length))
    assert depth == bound if length & (length - 1) == 0 else depth <= bound


def test_a_window_needs_linear_depth():
    one = mask("sink_window", 64, window=3, sinks=0).double()
    reach = torch.linalg.matrix_power(one, 6)
    assert reach[-1].nonzero()[0] == 63 - 6 * 2


@pytest.mark.parametrize("name", MASKS)
def test_read_elements_counts_the_keys_that_are_seen(name: str):
    made = StaticSparse(16, mask=name, **OPTIONS[name])
    row = mask(name, T, **OPTIONS[name])[-1]
    assert made.read_elements(T) == 2 * 16 * int(row.sum())
    stored = made.state_elements(T) - 1
    assert stored == (2 * 16 * (4 + 2) if name == "sink_window" else 2 * 16 * T)


def test_block_topk_equals_attention_once_it_chooses_every_block():
    x = torch.randn(2, 30, 16, generator=torch.Generator().manual_seed(0))
    dense, chosen = Attention(16), BlockTopK(16, block=4, top_k=7)
    chosen.load_state_dict(dense.state_dict())
    torch.testing.assert_close(chosen(x)[0], dense(x)[0])


def test_block_topk_chooses_the_blocks_with_the_best_mean_keys():
    made = BlockTopK(2, block=2, top_k=1)
    block_mean = torch.tensor([[[[1.0, 0], [0, 1.0], [0, 0], [0, 0]]]])
    query = torch.tensor([[[[0.1, 2.0], [3.0, 0.1]]]])
    chosen = made._chosen(query, block_mean, torch.tensor([4, 7]))[0, 0]
    assert chosen.int().tolist() == [[0, 1, 1, 0], [1, 0, 0, 1]]


# Elements per layer as Zoology's Based figure counts them, d = 64 and L = 1024.
@pytest.mark.parametrize(
    ("made", "published", "true"),
    [
        (Attention(64), 2 * 64 * 1024, 2 * 64 * 1024 + 1),
        (SlidingWindow(64, window=17), 2 * 64 * 16, 2 * 64 * 16 + 1),
        (BaseConv(64), 3 * 64, 2 * 64),
        (Hyena(64), 64 * 1024, 64 * 1024 + 2 * 3 * 64),
        (H3(64, d_state=16), 64 * 16, 2 * 64 * 16 + 15 * 64),
    ],
    ids=lambda value: type(value).__name__ if hasattr(value, "caps") else None,
)
def test_published_and_true_state(made, published: int, true: int):
    assert made.published_elements(1024) == published
    assert made.state_elements(1024) == true


X = torch.zeros(1, 5, 16)
NONSENSE = {
    "heads": (lambda: Attention(16, n_heads=3), "nearest head count"),
    "odd rotary": (lambda: Attention(18, n_heads=6, positions="rotary"), "head width 3"),
    "positions": (lambda: Attention(16, positions="sinusoid"), "none, rotary, learned"),
    "learned length": (lambda: Attention(16, positions="learned", max_len=4)(X), "max_len=4"),
    "window": (lambda: SlidingWindow(16, window=0), "window >= 1"),
    "mask": (lambda: StaticSparse(16, mask="diagonal"), "dilated"),
    "stride": (lambda: StaticSparse(16, stride=0), "at least 1"),
    "top_k": (lambda: BlockTopK(16, top_k=0), "at least 1"),
    "filter length": (lambda: Hyena(16, max_len=4)(X), "max_len=4"),
    "d_state": (lambda: H3(16, d_state=3), "even"),
    "head_dim": (lambda: H3(16, head_dim=3), "divide"),
    "taps": (lambda: BaseConv(16, kernel_size=0), "at least 1 tap"),
}


@pytest.mark.parametrize("name", NONSENSE)
def test_options_that_make_no_sense_are_refused(name: str):
    build, message = NONSENSE[name]
    with pytest.raises(ValueError, match=message):
        build()


def test_a_segment_longer_than_the_cache_is_refused():
    made = Attention(16)
    with pytest.raises(ValueError, match="max_len=4"):
        made(torch.zeros(1, 5, 16), made.init_state(1, 4))
