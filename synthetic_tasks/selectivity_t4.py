"""Selectivity T4 (SelectivBench): hold the hidden state of a grammar over gaps far longer than those of training."""

from __future__ import annotations

from typing import Literal

import numpy as np

from synthetic_tasks._base import Cell, task
from synthetic_tasks._cells import parse_splits
from synthetic_tasks._selectivity import Selectivity, jittered_length, with_jitter


@task("selectivity_t4", suite="selectivity")
class SelectivityT4(Selectivity):
    """Grammar tracking with noise, trained like T2 and tested on longer gaps.

    Args:
        protocol: "published" tests gaps of 10, 20, 50 and 100 frames with ambiguity 40; "long" is ours, gaps of 64 to 1024;
            "small" suits a two-layer model.
        train_cells: overrides the cells of the training split, symbols x gap : examples, gaps uniform in 1 .. gap.
        valid_cells: the same for the validation split, which otherwise has the cells of the test split.
        test_cells: the same for the test split, every gap as given.
        ambiguity: number of letters and of hidden instances of each; 0 takes the protocol's.
        noise: inputs get uniform noise in [0, noise).
        grammar_seed: which grammar; a stream of its own, shared by all splits.
    """

    input_kind = "features"

    def __init__(
        self,
        *,
        protocol: Literal["published", "long", "small"] = "small",
        train_cells: str = "",
        valid_cells: str = "",
        test_cells: str = "",
        ambiguity: int = 0,
        noise: float = 0.2,
        grammar_seed: int = 0,
    ) -> None:
        axes = ("symbols", "gap")
        test = (
            test_cells
            or {
                "published": "200x10:1000+200x20:1000+200x50:1000+200x100:1000",
                "long": "16x10:500+16x64:500+8x256:250+4x1024:250",
                "small": "16x4:500+16x8:500+16x16:500+8x64:500",
            }[protocol]
        )
        cells = parse_splits(
            axes, train=test, valid=valid_cells, test=test, length=lambda axes: axes["symbols"] * (1 + axes["gap"])
        )
        train = train_cells or {"published": "200x10:200000", "long": "32x10:12000", "small": "16x4:12000"}[protocol]
        jittered = parse_splits(
            axes, train=train, valid="", test=train, length=lambda axes: jittered_length(axes["symbols"], axes["gap"])
        )
        cells["train"] = with_jitter(jittered["train"])
        if not 0 <= noise < 0.5:
            raise ValueError(f"noise={noise} must be at least 0 and below 0.5, else letters drown; published 0.2")
        self.noise = noise
        self._prepare(ambiguity or (40 if protocol == "published" else 6), grammar_seed, cells)

    def gaps(self, cell: Cell, rows: int, symbols: int, rng: np.random.Generator) -> np.ndarray:
        """Uniform in 1 .. g in training, else g."""
        gap = int(cell.axes["gap"])
        if cell.axes.get("jitter"):
            return rng.integers(1, gap + 1, size=(rows, symbols))
        return np.full((rows, symbols), gap)
