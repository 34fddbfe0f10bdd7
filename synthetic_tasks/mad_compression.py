"""MAD compression: pack a random sequence into the state at its last position (Poli et al. 2024, athms/mad-lab).

Shape legend: N examples, T length.
"""

from __future__ import annotations

import itertools
from math import log2
from typing import Literal

import numpy as np

from synthetic_tasks._base import Batch, Cell, task
from synthetic_tasks._cells import parse_splits
from synthetic_tasks._mad import MADTask


@task("mad_compression", suite="mad")
class MADCompression(MADTask):
    """Compression with the published sizes: vocabulary 16, length 32.

    T - 1 random tokens are followed by a marker; every token is to be decoded from the hidden vector at the marker, which is
    what `readout = "last"` asks of the trainer (MAD: a fixed two-layer MLP on that vector plus a position code).

    Args:
        train_cells: cells of the training split, length : examples.
        valid_cells: the same for the validation split, which otherwise has the cells of the test split.
        test_cells: the same for the test split. A readout belongs to its length, so nothing extrapolates by default.
        vocab_size: number of token ids; the last is the marker.
        compat: "mad" labels the marker's own position too, which is free; "none" does not.
    """

    readout = "last"

    def __init__(
        self,
        *,
        train_cells: str = "32:12800",
        valid_cells: str = "",
        test_cells: str = "32:1280",
        vocab_size: int = 16,
        compat: Literal["none", "mad"] = "none",
    ) -> None:
        self.vocab_size, self.compat = vocab_size, compat
        self._cells = parse_splits(("length",), train=train_cells, valid=valid_cells, test=test_cells)
        if vocab_size < 3:
            raise ValueError(f"vocab_size={vocab_size} leaves fewer than 2 symbols; use at least 3")
        for cell in itertools.chain(*self._cells.values()):
            if cell.length < 2:
                raise ValueError(f"length {cell.length} has no token before the marker; use at least 2")

    def cells(self, split: str) -> tuple[Cell, ...]:
        """See `Task.cells`."""
        return self._cells[split]

    def sample(self, cell: Cell, examples: int, rng: np.random.Generator) -> Batch:
        """See `Task.sample`."""
        inputs = rng.integers(0, self.vocab_size - 1, size=(examples, cell.length), dtype=np.int32)
        inputs[:, -1] = self.vocab_size - 1
        mask = np.ones(inputs.shape, dtype=bool)
        mask[:, -1] = self.compat == "mad"
        return Batch(inputs, inputs.copy(), mask)

    def solve(self, batch: Batch) -> np.ndarray:
        """Repeats the input; see `Task.solve`."""
        return batch.inputs

    def ceilings(self, cell: Cell) -> dict[str, float]:
        """A guess over all symbols, with the marker's position right where it counts."""
        free = 1 / cell.length if self.compat == "mad" else 0.0
        return {"chance": free + (1 - free) / (self.vocab_size - 1)}

    def bits_needed(self, cell: Cell) -> float:
        """(T - 1) log2(symbols), all in one vector."""
        return (cell.length - 1) * log2(self.vocab_size - 1)
