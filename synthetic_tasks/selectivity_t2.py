"""Selectivity T2 (SelectivBench): track the hidden state of a grammar through noise and gaps of random length."""

from __future__ import annotations

from typing import Literal

import numpy as np

from synthetic_tasks._base import Cell, task
from synthetic_tasks._cells import parse_splits
from synthetic_tasks._selectivity import Selectivity, jittered_length, with_jitter


@task("selectivity_t2", suite="selectivity")
class SelectivityT2(Selectivity):
    """Grammar tracking with noise on every input entry; gaps vary in training and are longest in the test.

    In training a gap is uniform in 1 .. g, where g is the cell's gap, and sequences are cut at the mean length; in validation and
    test every gap is g.

    Args:
        protocol: "published" is ambiguity 40, 200 symbols, gaps of 10; "small" suits a two-layer model.
        train_cells: overrides the cells of the training split, symbols x gap : examples.
        valid_cells: the same for the validation split, which otherwise has the cells of the test split.
        test_cells: the same for the test split.
        ambiguity: number of letters and of hidden instances of each; 0 takes the protocol's.
        noise: inputs get uniform noise in [0, noise).
        grammar_seed: which grammar; a stream of its own, shared by all splits.
    """

    input_kind = "features"

    def __init__(
        self,
        *,
        protocol: Literal["published", "small"] = "small",
        train_cells: str = "",
        valid_cells: str = "",
        test_cells: str = "",
        ambiguity: int = 0,
        noise: float = 0.2,
        grammar_seed: int = 0,
    ) -> None:
        published = protocol == "published"
        axes = ("symbols", "gap")
        test = test_cells or ("200x10:1000" if published else "16x4:500+32x4:500")
        cells = parse_splits(
            axes, train=test, valid=valid_cells, test=test, length=lambda axes: axes["symbols"] * (1 + axes["gap"])
        )
        train = train_cells or ("200x10:200000" if published else "16x4:12000")
        jittered = parse_splits(
            axes, train=train, valid="", test=train, length=lambda axes: jittered_length(axes["symbols"], axes["gap"])
        )
        cells["train"] = with_jitter(jittered["train"])
        if not 0 <= noise < 0.5:
            raise ValueError(f"noise={noise} must be at least 0 and below 0.5, else letters drown; published 0.2")
        self.noise = noise
        self._prepare(ambiguity or (40 if published else 6), grammar_seed, cells)

    def gaps(self, cell: Cell, rows: int, symbols: int, rng: np.random.Generator) -> np.ndarray:
        """Uniform in 1 .. g in training, else g."""
        gap = int(cell.axes["gap"])
        if cell.axes.get("jitter"):
            return rng.integers(1, gap + 1, size=(rows, symbols))
        return np.full((rows, symbols), gap)
