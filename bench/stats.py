"""Statistics of the report and of `bench compare`: pure functions on numbers, no torch.

Which interval, and why. Runs are expensive, so a point rests on two to ten seeds. Bootstrapping so few values is
dishonest: three seeds have only ten distinct resampled means, and the nominal 95 % percentile interval covers about
75 %. Student's t interval keeps its coverage at n = 3 when seeds scatter roughly normally, so it is used from three
seeds on. At n = 2 it is nine times the standard deviation and says nothing, so the plain range is shown and called
that. One seed has no interval.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True)
class Interval:
    """A mean and what is known about its uncertainty.

    Args:
        mean: arithmetic mean, None without values.
        low: lower end, None where no interval can be given.
        high: upper end, None where no interval can be given.
        kind: what the interval is, in words fit for a label.
        n: number of values.
    """

    mean: float | None
    low: float | None
    high: float | None
    kind: str
    n: int


@dataclass(frozen=True)
class Difference:
    """Mean of `a - b` over matched pairs, with a 95 % t interval from three pairs on.

    Args:
        n: number of matched pairs.
        mean: mean difference, None without pairs.
        low: lower end of the interval, None below three pairs.
        high: upper end of the interval, None below three pairs.
        p_value: two-sided sign-flip permutation test, None below three pairs; it cannot fall under 2 / 2**n.
        verdict: one short sentence.
    """

    n: int
    mean: float | None
    low: float | None
    high: float | None
    p_value: float | None
    verdict: str


def pareto_front(x: Sequence[float], y: Sequence[float]) -> list[bool]:
    """Which points no other point beats: x is to be small, y is to be large.

    A point is off the front if another is at least as good in both and better in one; exact duplicates share their
    fate.

    Args:
        x: costs, all finite.
        y: values, all finite.

    Returns:
        One flag a point.
    """
    flags = [False] * len(x)
    best, best_x = -math.inf, math.nan
    for i in sorted(range(len(x)), key=lambda i: (x[i], -y[i])):
        if y[i] > best or (y[i] == best and x[i] == best_x):
            flags[i], best, best_x = True, y[i], x[i]
    return flags


def mean_interval(values: Sequence[float], *, bounds: tuple[float, float] = (-math.inf, math.inf), over: str = "seeds") -> Interval:
    """Mean of a few repeated measurements with the interval that their number allows (see the module's docstring).

    Args:
        values: finite measurements.
        bounds: possible range of the quantity; the interval is cut there.
        over: what the values run over, for the label.

    Returns:
        A 95 % t interval from three values on, the range for two, no interval for one.
    """
    n = len(values)
    if n == 0:
        return Interval(None, None, None, f"no {over}", 0)
    mean = math.fsum(values) / n
    if n == 1:
        return Interval(mean, None, None, f"one {over.removesuffix('s')}, no interval", 1)
    if n == 2:
        return Interval(mean, min(values), max(values), f"range of 2 {over}", 2)
    half = _t_half_width(values)
    low, high = max(bounds[0], mean - half), min(bounds[1], mean + half)
    return Interval(mean, low, high, f"95 % t interval over {n} {over}", n)


def wilson_interval(successes: float, n: int, *, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of one proportion (Wilson 1927, JASA 22).

    Unlike the normal approximation it stays within [0, 1] and has a width at 0 and at n successes.

    Args:
        successes: number of successes, 0 to n.
        n: number of trials, at least 1.
        confidence: coverage.

    Raises:
        ValueError: the counts are not possible.
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"a proportion needs 0 <= successes <= n and n >= 1; given successes={successes}, n={n}")
    from scipy.special import ndtri

    z = float(ndtri(0.5 + confidence / 2))
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == n else centre + half
    return low, high


def paired_difference(a: Mapping[K, float], b: Mapping[K, float]) -> Difference:
    """Compares two sets of measurements matched by key, e.g. (task, seed); unmatched keys are left out.

    The verdict follows the interval. The permutation test needs no normality, but with fewer than six pairs it cannot
    reach 5 % whatever the data, so it is reported beside the interval and decides nothing.
    """
    keys = [key for key in a if key in b]
    differences = np.array([a[key] - b[key] for key in keys], dtype=float)
    n = len(differences)
    if n == 0:
        return Difference(0, None, None, None, None, "no matched pairs")
    mean = float(differences.mean())
    if n < 3:
        return Difference(n, mean, None, None, None, f"undecided: {n} matched pair{'s' if n > 1 else ''}, 3 needed")
    half = _t_half_width(differences)
    low, high = mean - half, mean + half
    verdict = "a is higher" if low > 0 else "b is higher" if high < 0 else "no difference shown"
    return Difference(n, mean, low, high, _sign_flip_p(differences), verdict)


def paired_items(a: Mapping[K, float], b: Mapping[K, float]) -> Difference:
    """Mean of `a - b` over the items that two models both answered; unmatched items are left out.

    The p value is McNemar's exact test (the binomial test of the items on which right-or-wrong answers differ) where all
    values are 0 or 1, else a sign-flip test. The interval is Student's t.

    Args:
        a: value of each item, by its key.
        b: likewise.
    """
    keys = [key for key in a if key in b]
    differences = np.array([a[key] - b[key] for key in keys], dtype=float)
    n = len(differences)
    if n < 3:
        return paired_difference(a, b)
    mean, half = float(differences.mean()), _t_half_width(differences)
    binary = all(found[key] in (0.0, 1.0) for found in (a, b) for key in keys)
    p = _mcnemar_p(differences) if binary else _sign_flip_p(differences)
    verdict = "no difference shown" if p >= 0.05 else "a is higher" if mean > 0 else "b is higher"
    return Difference(n, mean, mean - half, mean + half, p, verdict)


def _mcnemar_p(differences: np.ndarray) -> float:
    """Two-sided exact binomial test that as many items went one way as the other (McNemar 1947)."""
    from scipy.special import bdtr

    up, down = int((differences > 0).sum()), int((differences < 0).sum())
    if up + down == 0:
        return 1.0
    return min(1.0, 2 * float(bdtr(min(up, down), up + down, 0.5)))


def _t_half_width(values: Sequence[float] | np.ndarray) -> float:
    """Half the width of the 95 % t interval of the mean of at least three values."""
    # scipy.special holds the quantile too and loads four times faster than scipy.stats.
    from scipy.special import stdtrit

    n = len(values)
    return float(stdtrit(n - 1, 0.975)) * float(np.std(values, ddof=1)) / math.sqrt(n)


def _sign_flip_p(differences: np.ndarray) -> float:
    """Two-sided p value of the mean under random sign flips, exact up to 13 pairs."""
    from scipy.stats import permutation_test

    result = permutation_test(
        (differences,),
        lambda d, axis: d.mean(axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=9999,
        batch=max(1, 10_000_000 // max(1, len(differences))),  # bounds the memory with many pairs
        rng=np.random.default_rng(0),
    )
    return float(result.pvalue)
