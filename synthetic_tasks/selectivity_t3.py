"""Selectivity T3 (SelectivBench): track the hidden state of a grammar and ignore letters that do not belong."""

from __future__ import annotations

from typing import Literal

import numpy as np

from synthetic_tasks._base import Cell, task
from synthetic_tasks._cells import parse_splits
from synthetic_tasks._selectivity import Selectivity


@task("selectivity_t3", suite="selectivity")
class SelectivityT3(Selectivity):
    """Grammar tracking with distractors.

    After the first symbols each symbol may be followed by one letter that the grammar does not allow there; the hidden state
    stays as it was. Distractors have an empty frame like any symbol, so that only the grammar gives them away.

    Args:
        protocol: "published" is ambiguity 40, 200 symbols, distractors after symbol 50; "small" suits a two-layer model.
        train_cells: overrides the cells of the training split, symbols : examples; distractors count as symbols.
        valid_cells: the same for the validation split, which otherwise has the cells of the test split.
        test_cells: the same for the test split.
        ambiguity: number of letters and of hidden instances of each; 0 takes the protocol's.
        distractors: probability of a distractor after a symbol.
        start: number of symbols before the first distractor; -1 takes the protocol's.
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
        distractors: float = 0.1,
        start: int = -1,
        grammar_seed: int = 0,
    ) -> None:
        published = protocol == "published"
        cells = parse_splits(
            ("symbols",),
            train=train_cells or ("200:200000" if published else "32:12000"),
            valid=valid_cells,
            test=test_cells or ("200:1000" if published else "32:500+64:500"),
            length=lambda axes: 2 * axes["symbols"],
        )
        if not 0 < distractors < 1:
            raise ValueError(f"distractors={distractors} must lie between 0 and 1; 0.1 is published, T1 has none")
        self.distractors, self.distractor_start = distractors, (50 if published else 8) if start < 0 else start
        self._prepare(ambiguity or (40 if published else 6), grammar_seed, cells)

    def gaps(self, cell: Cell, rows: int, symbols: int, rng: np.random.Generator) -> np.ndarray:
        """One empty frame after every letter."""
        del cell, rng
        return np.ones((rows, symbols), dtype=np.int64)
