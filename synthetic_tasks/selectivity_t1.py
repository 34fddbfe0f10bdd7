"""Selectivity T1 (SelectivBench): track the hidden state of a grammar, one empty frame after every symbol.

How hard it is follows from the ambiguity: how many hidden instances each letter has.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from synthetic_tasks._base import Cell, task
from synthetic_tasks._cells import parse_splits
from synthetic_tasks._selectivity import Selectivity


@task("selectivity_t1", suite="selectivity")
class SelectivityT1(Selectivity):
    """Grammar tracking without noise.

    Args:
        protocol: "published" is ambiguity 40, 200 symbols, 200,000 training examples; "small" suits a two-layer model.
        train_cells: overrides the cells of the training split, symbols : examples.
        valid_cells: the same for the validation split, which otherwise has the cells of the test split.
        test_cells: the same for the test split.
        ambiguity: number of letters and of hidden instances of each; 0 takes the protocol's (published: 20 to 40).
        grammar_seed: which grammar; a stream of its own, shared by all splits.
    """

    def __init__(
        self,
        *,
        protocol: Literal["published", "small"] = "small",
        train_cells: str = "",
        valid_cells: str = "",
        test_cells: str = "",
        ambiguity: int = 0,
        grammar_seed: int = 0,
    ) -> None:
        published = protocol == "published"
        cells = parse_splits(
            ("symbols",),
            train=train_cells or ("200:200000" if published else "32:12000"),
            valid=valid_cells,
            test=test_cells or ("200:1000" if published else "32:500+64:500+128:250"),
            length=lambda axes: 2 * axes["symbols"],
        )
        self._prepare(ambiguity or (40 if published else 6), grammar_seed, cells)

    def gaps(self, cell: Cell, rows: int, symbols: int, rng: np.random.Generator) -> np.ndarray:
        """One empty frame after every symbol."""
        del cell, rng
        return np.ones((rows, symbols), dtype=np.int64)
