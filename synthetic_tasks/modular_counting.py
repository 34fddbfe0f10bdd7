"""Modular counting: the sum of the tokens modulo m, at every position or at the last one.

Source: the modular arithmetic without brackets of "Unlocking State-Tracking in Linear RNNs Through Negative Eigenvalues" (Grazzi et
al. 2024), with addition only. Shape legend: N examples, T length, m modulus.
"""

from __future__ import annotations

from math import log2
from typing import Literal

import numpy as np

from synthetic_tasks._base import Batch, Cell, Task, task
from synthetic_tasks._cells import parse_splits


@task("modular_counting", suite="state_tracking")
class ModularCounting(Task):
    """Running sum of random numbers modulo m.

    Args:
        train_cells: cells of the training split, length : examples.
        valid_cells: the same for the validation split, which otherwise has the cells of the test split.
        test_cells: the same for the test split; by default up to 256, beyond the trained lengths.
        modulus: m; tokens and labels are 0 .. m - 1.
        increments: "any" number is added at each step, or "unit" steps of 0 and 1 only (counting).
        labels: "every" position is labelled, or the "last" only.
    """

    def __init__(
        self,
        *,
        train_cells: str = "40:24000",
        valid_cells: str = "",
        test_cells: str = "40:500+64:500+128:500+256:500",
        modulus: int = 5,
        increments: Literal["any", "unit"] = "any",
        labels: Literal["every", "last"] = "every",
    ) -> None:
        self.vocab_size, self.modulus, self.increments, self.labels = modulus, modulus, increments, labels
        self._cells = parse_splits(("length",), train=train_cells, valid=valid_cells, test=test_cells)
        if modulus < 2:
            raise ValueError(f"modulus={modulus} has one residue only; use at least 2")

    def cells(self, split: str) -> tuple[Cell, ...]:
        """See `Task.cells`."""
        return self._cells[split]

    def sample(self, cell: Cell, examples: int, rng: np.random.Generator) -> Batch:
        """See `Task.sample`."""
        top = 2 if self.increments == "unit" else self.modulus
        inputs = rng.integers(0, top, size=(examples, cell.length), dtype=np.int32)
        mask = np.ones(inputs.shape, dtype=bool)
        if self.labels == "last":
            mask[:, :-1] = False
        return Batch(inputs, self._sums(inputs), mask)

    def _sums(self, inputs: np.ndarray) -> np.ndarray:
        """Running sums modulo m."""
        return (np.cumsum(inputs, axis=1) % self.modulus).astype(np.int32)

    def solve(self, batch: Batch) -> np.ndarray:
        """Adds; see `Task.solve`."""
        return self._sums(batch.inputs)

    def ceilings(self, cell: Cell) -> dict[str, float]:
        """A guess over all residues."""
        del cell
        return {"chance": 1 / self.modulus}

    def bits_needed(self, cell: Cell) -> float:
        """log2 m."""
        del cell
        return log2(self.modulus)
