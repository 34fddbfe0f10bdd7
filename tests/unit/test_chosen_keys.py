"""Key choice by brute force, and the HAX mixer's budget, rows and relation to Mamba-2."""

import pytest
import torch

from kernels.chosen_keys import bucket_keys, dilated_keys, seen, top_keys
from mixers.hax import HAX, KEYS
from mixers.mamba2 import Mamba2

BATCH, T, BUDGET = 3, 30, 4


def whole(n_tokens):
    """What queries see of a segment that nothing precedes."""
    filled = torch.ones(BATCH, n_tokens, dtype=torch.bool)
    return filled, seen(n_tokens, filled)


def masks(choose):
    """A mask from a function of (row, query) to the set of its keys."""
    mask = torch.zeros(BATCH, T, T, dtype=torch.bool)
    for b in range(BATCH):
        for t in range(T):
            mask[b, t, list(choose(b, t))] = True
    return mask


@pytest.mark.parametrize("dilation", [1, 3])
def test_dilated_keys_are_their_definition(dilation):
    expected = masks(lambda b, t: [t - j * dilation for j in range(BUDGET) if t >= j * dilation])
    got = dilated_keys(T, T, budget=BUDGET, dilation=dilation, device="cpu")
    assert torch.equal(got.expand(BATCH, -1, -1), expected)


@pytest.mark.parametrize("rounds", [1, 2])
def test_bucket_keys_are_the_newest_matches(rounds):
    g = torch.Generator().manual_seed(0)
    query, key = (torch.randint(0, 5, (BATCH, T, rounds), generator=g) for _ in range(2))

    def choose(b, t):
        matches = [i for i in range(t + 1) if i == t or bool((query[b, t] == key[b, i]).any())]
        return matches[-BUDGET:]

    assert torch.equal(bucket_keys(query, key, whole(T)[1], BUDGET), masks(choose))


@pytest.mark.parametrize("values", [1000, 3])
def test_top_keys_are_the_best_of_the_prefix_and_the_newer_of_equals(values):
    score = torch.randint(0, values, (BATCH, T), generator=torch.Generator().manual_seed(1)).float()

    def choose(b, t):
        return sorted(range(t + 1), key=lambda i: (score[b, i], i))[-BUDGET:]

    assert torch.equal(top_keys(score, *whole(T), BUDGET), masks(choose))


def test_empty_room_is_never_chosen():
    filled = torch.tensor([[True, True, False, False, True, True]])
    visible = seen(2, filled)
    assert visible.tolist() == [[[True, True, False, False, True, False], [True, True, False, False, True, True]]]
    assert torch.equal(top_keys(torch.tensor([[0.0, 1.0, 9.0, 9.0, 2.0, 3.0]]), filled, visible, 6), visible)
    assert torch.equal(bucket_keys(torch.zeros(1, 2, 1), torch.zeros(1, 6, 1), visible, 6), visible)


@pytest.fixture
def chosen(monkeypatch):
    """A function that runs a mixer on random input and returns the mask that its attention got."""
    caught = []

    def spy(q, k, v, mask, gate=None):
        caught.append(mask)
        return torch.zeros_like(v)

    def run(**options):
        torch.manual_seed(0)
        mixer = HAX(16, budget=BUDGET, dilation=3, bits=2, **options)
        monkeypatch.setattr("mixers.hax.attend", spy)
        mixer(torch.randn(BATCH, T, 16))
        monkeypatch.undo()
        return caught.pop().expand(BATCH, -1, -1)

    return run


@pytest.mark.parametrize("keys", [keys for keys in KEYS if keys not in ("off", "full")])
def test_budget_is_kept_and_no_row_is_empty(chosen, keys):
    counts = chosen(keys=keys).sum(-1)
    assert counts.min() >= 1
    assert counts.max() <= BUDGET
    assert not chosen(keys=keys).triu(1).any()


def test_full_reads_every_earlier_key(chosen):
    assert torch.equal(chosen(keys="full"), whole(T)[1])


def test_hax_is_the_union_of_half_budgets(chosen, monkeypatch):
    parts = []
    for name, function in (("top_keys", top_keys), ("bucket_keys", bucket_keys)):

        def spy(*arguments, function=function):
            assert arguments[-1] == BUDGET // 2
            parts.append(function(*arguments))
            return parts[-1]

        monkeypatch.setattr(f"mixers.hax.{name}", spy)
    mixer = HAX(16, keys="hax", budget=BUDGET, bits=2)
    masks_seen = []
    monkeypatch.setattr("mixers.hax.attend", lambda q, k, v, mask, gate: masks_seen.append(mask) or torch.zeros_like(v))
    mixer(torch.randn(BATCH, T, 16))
    assert torch.equal(masks_seen[0], parts[0] | parts[1])
    assert (parts[0] != parts[1]).any()


def test_without_keys_it_is_mamba2():
    torch.manual_seed(0)
    hax, mamba2 = HAX(16, keys="off", d_state=8, head_dim=8), Mamba2(16, d_state=8, head_dim=8)
    mamba2.load_state_dict(hax.state_dict())
    x = torch.randn(2, 20, 16)
    assert torch.equal(hax(x)[0], mamba2(x)[0])
    assert hax.state_elements(99) == mamba2.state_elements(99)


def test_stored_keys():
    per_key, scan = 32 + 128, HAX(64, keys="off").state_elements(1057)
    stored = {keys: HAX(64, keys=keys).state_elements(1057) - scan for keys in KEYS[1:]}
    assert stored["window"] == 63 * per_key + 1
    assert stored["key_selection"] == 64 * (per_key + 1) + 32 + 1
    assert stored["full"] == 1057 * per_key + 1
    assert stored["lsh"] == 1057 * (per_key + 2) + 2 * 32 + 1
    assert stored["hax"] == stored["lsh"] + 1057


@pytest.mark.parametrize("options", [{"keys": "both"}, {"keys": "hax", "budget": 1}, {"budget": 0}, {"bits": 9}, {"rounds": 0}])
def test_options_are_checked(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        HAX(16, **options)


@pytest.mark.parametrize("keys", ["key_selection", "hax"])
def test_the_score_learns_from_the_output(keys):
    mixer = HAX(16, keys=keys, budget=BUDGET)
    mixer(torch.randn(BATCH, T, 16))[0].square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in mixer.score.parameters())
