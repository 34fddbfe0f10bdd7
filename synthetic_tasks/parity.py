"""Parity: the sum of bits modulo two, at every position or at the last one.

Source: "Unlocking State-Tracking in Linear RNNs Through Negative Eigenvalues" (Grazzi et al. 2024): train length up to 40, test
40 to 256. One bit of state is enough; whether a mixer can flip it decides. Shape legend: N examples, T length.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from synthetic_tasks._base import Batch, Cell, Task, task
from synthetic_tasks._cells import parse_splits


@task("parity", suite="state_tracking")
class Parity(Task):
    """Running parity of random bits.

    Args:
        train_cells: cells of the training split, length : examples.
        valid_cells: the same for the validation split, which otherwise has the cells of the test split.
        test_cells: the same for the test split; by default up to 256, beyond the trained lengths.
        labels: "every" position is labelled, or the "last" only.
    """

    def __init__(
        self,
        *,
        train_cells: str = "40:24000",
        valid_cells: str = "",
        test_cells: str = "40:500+64:500+128:500+256:500",
        labels: Literal["every", "last"] = "every",
    ) -> None:
        self.vocab_size, self.labels = 2, labels
        self._cells = parse_splits(("length",), train=train_cells, valid=valid_cells, test=test_cells)

    def cells(self, split: str) -> tuple[Cell, ...]:
        """See `Task.cells`."""
        return self._cells[split]

    def sample(self, cell: Cell, examples: int, rng: np.random.Generator) -> Batch:
        """See `Task.sample`."""
        inputs = rng.integers(0, 2, size=(examples, cell.length), dtype=np.int32)
        mask = np.ones(inputs.shape, dtype=bool)
        if self.labels == "last":
            mask[:, :-1] = False
        return Batch(inputs, np.bitwise_xor.accumulate(inputs, axis=1), mask)

    def solve(self, batch: Batch) -> np.ndarray:
        """Sums the bits; see `Task.solve`."""
        return (np.cumsum(batch.inputs, axis=1) % 2).astype(np.int32)

    def ceilings(self, cell: Cell) -> dict[str, float]:
        """One half: all bits but one tell nothing."""
        del cell
        return {"chance": 0.5}

    def bits_needed(self, cell: Cell) -> float:
        """One."""
        del cell
        return 1.0
