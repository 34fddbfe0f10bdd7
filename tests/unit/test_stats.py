"""Statistics against hand-computed values."""

from __future__ import annotations

import math

import pytest

from bench.stats import mean_interval, paired_difference, pareto_front, wilson_interval


def test_front_keeps_what_no_other_point_beats():
    assert pareto_front([1, 2, 3, 4], [0.1, 0.5, 0.4, 0.9]) == [True, True, False, True]


def test_front_of_ties():
    # Same cost: only the best value stays. Same value: only the cheapest. Exact duplicates stay together.
    assert pareto_front([1, 1], [0.5, 0.6]) == [False, True]
    assert pareto_front([1, 2], [0.5, 0.5]) == [True, False]
    assert pareto_front([2, 1, 1], [0.5, 0.5, 0.5]) == [False, True, True]


def test_front_of_nothing_and_of_one():
    assert pareto_front([], []) == []
    assert pareto_front([3], [0.0]) == [True]


def test_t_interval_of_three():
    # mean 2, s = 1, t(2, 0.975) = 4.302653, half width 4.302653 / sqrt(3) = 2.484138
    found = mean_interval([1.0, 2.0, 3.0])
    assert (found.mean, found.n) == (2.0, 3)
    assert found.high == pytest.approx(4.484138, abs=1e-5)
    assert found.low == pytest.approx(-0.484138, abs=1e-5)
    assert found.kind == "95 % t interval over 3 seeds"


def test_interval_is_cut_at_the_bounds():
    found = mean_interval([0.9, 1.0, 0.95], bounds=(0.0, 1.0))
    assert found.high == 1.0
    assert found.low is not None and found.low < 0.9


def test_two_values_have_a_range_and_one_has_nothing():
    two = mean_interval([0.4, 0.6])
    assert (two.mean, two.low, two.high, two.kind) == (0.5, 0.4, 0.6, "range of 2 seeds")
    one = mean_interval([0.4])
    assert (one.mean, one.low, one.high, one.kind) == (0.4, None, None, "one seed, no interval")
    assert mean_interval([]).mean is None


def test_wilson_interval():
    # Textbook value: 8 of 10 gives 0.490 to 0.943.
    assert wilson_interval(8, 10) == pytest.approx((0.49016, 0.94331), abs=1e-4)
    assert wilson_interval(0, 10) == pytest.approx((0.0, 0.27753), abs=1e-4)
    assert wilson_interval(10, 10) == pytest.approx((0.72247, 1.0), abs=1e-4)
    with pytest.raises(ValueError, match="successes=3, n=2"):
        wilson_interval(3, 2)


def test_paired_difference_matches_by_key():
    a = {("mqar", 0): 0.9, ("mqar", 1): 0.8, ("mqar", 2): 0.7, ("other", 0): 0.0}
    b = {("mqar", 0): 0.8, ("mqar", 1): 0.6, ("mqar", 2): 0.4}
    found = paired_difference(a, b)
    # Differences 0.1, 0.2, 0.3: mean 0.2, s = 0.1, half width 0.2484138. Two of eight sign patterns are as extreme.
    assert found.n == 3
    assert (found.mean, found.low, found.high) == pytest.approx((0.2, -0.0484138, 0.4484138), abs=1e-6)
    assert found.p_value == pytest.approx(0.25)
    assert found.verdict == "no difference shown"


def test_paired_difference_verdicts():
    seeds = range(8)
    high = {s: 0.9 + 0.001 * s for s in seeds}
    low = {s: 0.5 - 0.001 * s for s in seeds}
    assert paired_difference(high, low).verdict == "a is higher"
    assert paired_difference(low, high).verdict == "b is higher"
    assert paired_difference(high, low).p_value == pytest.approx(2 / 2**8)
    assert paired_difference(high, high).verdict == "no difference shown"


def test_paired_difference_of_too_few():
    assert paired_difference({}, {}).verdict == "no matched pairs"
    assert paired_difference({1: 0.5}, {1: 0.4}).verdict == "undecided: 1 matched pair, 3 needed"
    two = paired_difference({1: 0.5, 2: 0.5}, {1: 0.4, 2: 0.4})
    assert two.low is None and two.p_value is None and math.isclose(two.mean or 0, 0.1)
