"""The exact draws: laws against brute force, with fixed seeds."""

import itertools

import numpy as np
import pytest
from scipy import stats

from synthetic_tasks import stream
from synthetic_tasks._draws import distinct, outside, weighted_order


@pytest.mark.parametrize(("draws", "population"), [(3, 14), (3, 5), (1, 9), (4, 4)])
def test_distinct_is_uniform_over_ordered_draws(draws: int, population: int):
    drawn = distinct(stream(1, "distinct"), 60_000, draws, population)
    assert all(len(set(row)) == draws for row in drawn[:500].tolist())
    codes = (drawn * population ** np.arange(draws)).sum(axis=1)
    outcomes = np.unique(codes, return_counts=True)[1]
    expected = len(list(itertools.permutations(range(population), draws)))
    assert outcomes.size == expected
    assert stats.chisquare(outcomes).pvalue > 1e-3


@pytest.mark.parametrize(("draws", "population"), [(64, 4095), (256, 4095), (120, 127)])
def test_distinct_at_working_sizes(draws: int, population: int):
    drawn = distinct(stream(2, "distinct"), 400, draws, population)
    assert drawn.min() >= 0 and drawn.max() < population
    assert (np.diff(np.sort(drawn, axis=1), axis=1) > 0).all()
    assert stats.kstest((drawn.ravel() + 0.5) / population, "uniform").pvalue > 1e-3


def test_weighted_order_is_successive_sampling():
    """Each order statistic has the law of numpy's sequential choice without replacement."""
    weights = np.arange(1, 8) ** -0.99
    ours = weighted_order(stream(3, "order"), 20_000, 3, weights)
    rng = np.random.default_rng(0)
    theirs = np.stack([rng.choice(7, size=3, replace=False, p=weights / weights.sum()) for _ in range(20_000)])
    # `Generator.choice` with `p` keeps the order of drawing, so the j-th columns can be compared one by one.
    for j in range(3):
        table = np.stack([np.bincount(x[:, j], minlength=7) for x in (ours, theirs)])
        assert stats.chi2_contingency(table).pvalue > 1e-3
    exact = weights / weights.sum()
    second = [sum(exact[i] * exact[j] / (1 - exact[i]) for i in range(7) if i != j) for j in range(7)]
    assert stats.chisquare(np.bincount(ours[:, 0]), 20_000 * exact).pvalue > 1e-3
    assert stats.chisquare(np.bincount(ours[:, 1]), 20_000 * np.array(second)).pvalue > 1e-3


def test_outside_is_uniform_over_the_allowed_ids():
    banned = np.tile([7, 0, 3], (2000, 1))
    drawn = outside(stream(4, "outside"), 20, 9, banned)
    counts = np.bincount(drawn.ravel(), minlength=9)
    allowed = [1, 2, 4, 5, 6, 8]
    assert counts[[0, 3, 7]].sum() == 0
    assert stats.chisquare(counts[allowed]).pvalue > 1e-3


def test_outside_keeps_rows_apart():
    banned = distinct(stream(5, "banned"), 300, 40, 50)
    drawn = outside(stream(5, "drawn"), 30, 50, banned)
    assert not (drawn[:, :, None] == banned[:, None, :]).any()
    assert drawn.min() >= 0 and drawn.max() < 50
