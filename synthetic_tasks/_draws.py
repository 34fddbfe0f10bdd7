"""Exact vectorised draws shared by the tasks. Shape legend: N rows, n draws a row, M population, S slots."""

from __future__ import annotations

import numpy as np


def distinct(rng: np.random.Generator, rows: int, draws: int, population: int) -> np.ndarray:
    """Ordered draws without replacement from range(population), independently for each row, [rows, draws] int64.

    A row is a stream of independent draws of which the first `draws` distinct ones are kept: successive sampling, exact.
    Rows whose stream was too short are drawn again, which leaves the law alone because a permutation of the population
    changes neither the stream's law nor the number of distinct draws in it.
    """
    assert draws <= population
    if draws <= 3:
        return _few_distinct(rng, rows, draws, population)
    if 4 * draws > population:  # then a full shuffle of the population costs little more
        return rng.permuted(np.tile(np.arange(population), (rows, 1)), axis=1)[:, :draws]
    expected = population * np.log(population / (population - draws + 1e-9))
    width = int(draws + 1.2 * (expected - draws) + 8)
    out = np.empty((rows, draws), dtype=np.int64)
    open_rows = np.arange(rows)
    while open_rows.size:
        stream = rng.integers(0, population, size=(open_rows.size, width))
        first = _first_occurrences(stream)
        done = first.sum(axis=1) >= draws
        out[open_rows[done]] = _keep_first(stream[done], first[done], draws)
        open_rows = open_rows[~done]
    return out


def _few_distinct(rng: np.random.Generator, rows: int, draws: int, population: int) -> np.ndarray:
    """The same for a few draws: draw j is a rank among the ids not drawn yet."""
    out = np.empty((rows, draws), dtype=np.int64)
    for j in range(draws):
        rank = rng.integers(0, population - j, size=rows)
        for earlier in np.sort(out[:, :j], axis=1).T:
            rank += rank >= earlier
        out[:, j] = rank
    return out


def _first_occurrences(stream: np.ndarray) -> np.ndarray:
    """Marks each entry that occurs nowhere to its left in its row, [N, W] bool."""
    width = stream.shape[1]
    tagged = np.sort(stream * width + np.arange(width), axis=1)
    values, places = np.divmod(tagged, width)
    repeated = np.zeros(stream.shape, dtype=bool)
    repeated[:, 1:] = values[:, 1:] == values[:, :-1]
    first = np.empty(stream.shape, dtype=bool)
    np.put_along_axis(first, places, ~repeated, axis=1)
    return first


def _keep_first(stream: np.ndarray, keep: np.ndarray, count: int) -> np.ndarray:
    """The first `count` kept entries of each row, in order."""
    out = stream[:, :count].copy()
    gaps = ~keep[:, :count].all(axis=1)
    order = np.argsort(~keep[gaps], axis=1, kind="stable")[:, :count]
    out[gaps] = np.take_along_axis(stream[gaps], order, axis=1)
    return out


def weighted_order(rng: np.random.Generator, rows: int, draws: int, weights: np.ndarray) -> np.ndarray:
    """Draws without replacement with probability proportional to `weights` [S], in order of drawing, [rows, draws] int64.

    An exponential race: index i arrives at an Exp(weights[i]) time, and the first `draws` arrivals in order have the law of
    successive sampling without replacement (Gumbel-top-k in another guise).
    """
    arrival = rng.standard_exponential((rows, weights.size)) / weights
    return np.argsort(arrival, axis=1)[:, :draws]


def outside(rng: np.random.Generator, size: int, population: int, banned: np.ndarray) -> np.ndarray:
    """Uniform draws from range(population) minus each row's distinct `banned` ids [N, m], shape [N, size] int64."""
    rows, count = banned.shape
    assert count < population
    ranks = rng.integers(0, population - count, size=(rows, size))
    # The r-th allowed id is r plus the number of banned ids b_j (sorted) with b_j - j <= r; rows are kept apart by an offset.
    offset = np.arange(rows)[:, None] * population
    limits = np.sort(banned, axis=1) - np.arange(count) + offset
    below = np.searchsorted(limits.ravel(), ranks + offset, side="right") - np.arange(rows)[:, None] * count
    return ranks + below
