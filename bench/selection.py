"""What a point's accuracy would be under the published selection: the best of all learning rates on the test set itself."""

from __future__ import annotations

from dataclasses import dataclass

from bench.points import Point, Trial
from bench.stats import Interval, mean_interval


@dataclass(frozen=True)
class PublishedSelection:
    """A point under Zoology's protocol (Arora et al. 2023): of each seed's runs, the one with the best test accuracy counts.

    Args:
        accuracy: mean of those best values over the seeds that were trained and tested at every rate.
        rates: learning rates that each seed could choose from.
        bias: `accuracy` minus the point's own, whose rate was chosen on validation; None if either is missing. Both estimate
            the same training, so in the mean over many seeds the difference is what choosing on the test set adds.
    """

    accuracy: Interval
    rates: int
    bias: float | None


def published_selection(point: Point) -> PublishedSelection:
    """The alternative selection of a point; without a seed tested at two rates or more it has no value."""
    rates = {trial.lr for trial in point.trials}
    by_seed: dict[int, dict[float, float]] = {}
    for trial in point.trials:
        score = _score(trial)
        if score is not None:
            by_seed.setdefault(trial.seed, {})[trial.lr] = score
    best = [max(scores.values()) for scores in by_seed.values() if len(rates) > 1 and scores.keys() == rates]
    accuracy = mean_interval(best, bounds=(0.0, 1.0))
    own = point.accuracy.mean
    bias = None if accuracy.mean is None or own is None else accuracy.mean - own
    return PublishedSelection(accuracy, len(rates), bias)


def _score(trial: Trial) -> float | None:
    """Test accuracy of a run; a diverged one counts as 0, as in selection on validation."""
    return 0.0 if trial.status == "diverged" else trial.test
