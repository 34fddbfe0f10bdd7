"""Dropout by hash: the rate, independence of places, steps and members, and that nothing else decides it."""

import pytest
import torch

from bench.dropout import dropout, example_keys

SHAPE = (64, 16, 32)


def kept(seed: int, step: int, rate: float = 0.3) -> torch.Tensor:
    keys = example_keys(torch.tensor([seed], dtype=torch.int32), torch.tensor(step, dtype=torch.int32), SHAPE[0])
    return dropout(torch.ones(SHAPE), keys[0], rate)


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 0.9])
def test_rate_and_scale(rate: float):
    found = kept(7, 3, rate)
    share = (found == 0).double()
    torch.testing.assert_close(found.unique(), torch.tensor([0.0, 1 / (1 - rate)])[int(rate == 0) :])
    error = (rate * (1 - rate)) ** 0.5
    assert abs(share.mean() - rate) < 4 * error / share.numel() ** 0.5 + 1e-12
    for axes in ((1, 2), (0, 2), (0, 1)):  # no example, position or channel is favoured
        means = share.mean(axes)
        assert means.std() < 2 * error / (share.numel() / len(means)) ** 0.5 + 1e-12


@pytest.mark.parametrize("other", [(7, 4), (8, 3), (7 + 2**16, 3), (6, 3)])
def test_steps_and_seeds_draw_independently(other: tuple[int, int]):
    a, b = kept(7, 3).flatten(), kept(*other).flatten()
    assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1]) < 4 / a.numel() ** 0.5


def test_neighbouring_places_are_uncorrelated():
    a = kept(7, 3)
    for axis in range(3):
        first, second = a.narrow(axis, 0, a.shape[axis] - 1).flatten(), a.narrow(axis, 1, a.shape[axis] - 1).flatten()
        assert abs(torch.corrcoef(torch.stack([first, second]))[0, 1]) < 4 / first.numel() ** 0.5


def test_members_and_parts_of_a_batch_do_not_change_it():
    seeds = torch.tensor([3, 7], dtype=torch.int32)
    keys = example_keys(seeds, torch.tensor(3, dtype=torch.int32), 64)
    assert torch.equal(dropout(torch.ones(SHAPE), keys[1], 0.3), kept(7, 3))
    assert torch.equal(dropout(torch.ones(SHAPE)[40:], keys[1, 40:], 0.3), kept(7, 3)[40:])
    assert torch.equal(torch.vmap(lambda key: dropout(torch.ones(SHAPE), key, 0.3))(keys)[1], kept(7, 3))


def test_gradient_flows_where_it_kept():
    x = torch.ones(SHAPE, requires_grad=True)
    keys = example_keys(torch.tensor([7], dtype=torch.int32), torch.tensor(3, dtype=torch.int32), SHAPE[0])
    dropout(x, keys[0], 0.3).sum().backward()
    assert torch.equal(x.grad, kept(7, 3))
