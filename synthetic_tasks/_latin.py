"""Random Latin squares and cubes: tables in which no row, column or single value tells anything about an entry.

Jacobson and Matthews (1996), "Generating uniformly distributed random Latin squares": a Markov chain on incidence cubes that
may pass through improper squares with one cell at -1. Shape legend: R chains, N tables, n order, d dimensions of a table.
"""

from __future__ import annotations

from functools import cache
from math import lgamma, log, log2

import numpy as np

from synthetic_tasks._base import stream

CHAINS = 512
"""Chains run for the pool of each order; a draw is a random relabelling of one of the pool's squares."""

COUNTS = {
    1: 1, 2: 2, 3: 12, 4: 576, 5: 161280, 6: 812851200, 7: 61479419904000, 8: 108776032459082956800,
    9: 5524751496156892842531225600, 10: 9982437658213039871725064756920320000,
    11: 776966836171770144107444346734230682311065600000,
}  # fmt: skip
"""Number of Latin squares of order n (OEIS A002860)."""


def log2_squares(order: int) -> float:
    """log2 of the number of Latin squares; beyond order 11 of the lower bound n!^(2n) / n^(n^2) (van Lint and Wilson)."""
    if order in COUNTS:
        return log2(COUNTS[order])
    return (2 * order * lgamma(order + 1) - order**2 * log(order)) / log(2)


@cache
def _pool(order: int) -> np.ndarray:
    """A few hundred Latin squares, [P, n, n] int64, a function of the order alone.

    Squares are taken at fixed times, from the chains that are proper then: the chain is uniform over proper squares at a fixed
    time, but not at the first proper time after one.
    """
    rng = stream(0, "latin-squares", order)
    cube = np.zeros((CHAINS, order, order, order), dtype=np.int8)
    rows, columns = np.divmod(np.arange(order**2), order)
    cube[:, rows, columns, (rows + columns) % order] = 1
    negative = np.full((CHAINS, 3), -1)
    kept = []
    for move in range(2 * order**3):
        negative = _move(cube, negative, rng)
        if move >= order**3 and move % max(order**3 // 4, 1) == 0:  # after the customary burn-in
            kept.append(cube[negative[:, 0] < 0].argmax(axis=3))
    return np.concatenate(kept)


def _move(cube: np.ndarray, negative: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One move of every chain, in place.

    Args:
        cube: incidence cubes [R, n, n, n] with entries 0, 1 and at most one -1.
        negative: row, column and symbol of the -1 of each chain, [R, 3]; -1 where the square is proper.

    Returns:
        `negative` after the move.
    """
    chains, order = np.arange(len(cube)), cube.shape[1]
    start = rng.integers(0, order, size=(len(cube), 2))
    present = cube[chains, start[:, 0], start[:, 1]].argmax(axis=1)
    other = (present + rng.integers(1, max(order, 2), size=len(cube))) % order
    proper = negative[:, :1] < 0
    r, c, s = np.where(proper, np.column_stack([start, other]), negative).T
    side = rng.random((3, len(cube))) < 0.5
    r2 = _one_of(cube[chains, :, c, s], side[0])
    c2 = _one_of(cube[chains, r, :, s], side[1])
    s2 = _one_of(cube[chains, r, c, :], side[2])
    for where in ((r, c, s), (r, c2, s2), (r2, c, s2), (r2, c2, s)):
        cube[chains, *where] += 1
    for where in ((r2, c, s), (r, c2, s), (r, c, s2), (r2, c2, s2)):
        cube[chains, *where] -= 1
    improper = cube[chains, r2, c2, s2] < 0
    return np.where(improper[:, None], np.column_stack([r2, c2, s2]), -1)


def _one_of(line: np.ndarray, last: np.ndarray) -> np.ndarray:
    """Index of a 1 in each line [R, n]: the first or the last one, which differ only on the lines of an improper cell."""
    ones = line == 1
    return np.where(last, line.shape[1] - 1 - ones[:, ::-1].argmax(axis=1), ones.argmax(axis=1))


def latin_squares(rng: np.random.Generator, rows: int, order: int) -> np.ndarray:
    """Random Latin squares, [N, n, n] int64: pooled squares with rows, columns and symbols permuted independently."""
    pool = _pool(order)
    square = pool[rng.integers(0, len(pool), size=rows)]
    orders = rng.permuted(np.broadcast_to(np.arange(order), (3, rows, order)).copy(), axis=2)
    square = np.take_along_axis(square, orders[0][:, :, None], axis=1)
    square = np.take_along_axis(square, orders[1][:, None, :], axis=2)
    return np.take_along_axis(orders[2], square.reshape(rows, -1), axis=1).reshape(square.shape)


def latin_tables(rng: np.random.Generator, rows: int, order: int, dims: int) -> np.ndarray:
    """Random tables of `dims` indices in which every line along any axis holds every symbol once, [N, n, ..., n].

    Built by composing squares, t'(i1 .. id) = L(t(i1 .. i(d-1)), id); one dimension is a random permutation.
    """
    table = rng.permuted(np.tile(np.arange(order), (rows, 1)), axis=1)
    for _ in range(dims - 1):
        square = latin_squares(rng, rows, order)
        flat = table.reshape(rows, -1)
        table = np.take_along_axis(square, flat[:, :, None], axis=1).reshape(*table.shape, order)
    return table
