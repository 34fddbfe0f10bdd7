"""What the joint recall tasks share: writing a table in random order, and solvers that never bind context with key.

Shape legend: N examples, Q queries, n_c contexts, n_k keys, V values.
"""

from __future__ import annotations

from typing import Literal

import numpy as np


def random_order(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Independent random permutations along the last axis."""
    return rng.permuted(np.broadcast_to(np.arange(shape[-1]), shape).copy(), axis=-1)


def marginal_solver(
    table_NCK: np.ndarray, asked_NQ2: np.ndarray, values: int, *, bags: Literal["all", "key", "both"], eliminate: bool
) -> np.ndarray:
    """The likeliest answers given bags of values alone.

    With both bags the posterior of an entry of a random table is proportional to (its count in the context) times (its count
    with the key) over (its count in the whole table).

    Args:
        table_NCK: the value of each context and key, in range(values).
        asked_NQ2: context and key of each query, in the order asked.
        values: number of values V.
        bags: "all" values of the table, those seen with the "key", or "both" those of the context and those of the key.
        eliminate: whether an answer, once shown, is taken out of the bags.

    Returns:
        The guesses, [N, Q].
    """
    rows = np.arange(len(table_NCK))
    onehot = np.eye(values, dtype=np.int32)[table_NCK]
    by_context, by_key, overall = onehot.sum(axis=2), onehot.sum(axis=1), onehot.sum(axis=(1, 2))
    guesses = np.empty(asked_NQ2.shape[:2], dtype=np.int64)
    for q in range(asked_NQ2.shape[1]):
        c, k = asked_NQ2[:, q].T
        if bags == "both":
            score = by_context[rows, c] * by_key[rows, k] / np.maximum(overall, 1)
        else:
            score = overall if bags == "all" else by_key[rows, k]
        guesses[:, q] = score.argmax(axis=1)
        if eliminate:
            answer = table_NCK[rows, c, k]
            by_context[rows, c, answer] -= 1
            by_key[rows, k, answer] -= 1
            overall[rows, answer] -= 1
    return guesses
