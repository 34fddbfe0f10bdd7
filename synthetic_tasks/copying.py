"""Copying: repeat a random string (Repeat After Me, Jelassi et al. 2024).

Shape legend: N examples, T length, n letters.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from math import log2

import numpy as np

from synthetic_tasks._base import Batch, Cell, Task, task
from synthetic_tasks._cells import parse_splits
from synthetic_tasks._metrics import measured

START, SEP, END, FIRST = 0, 1, 2, 3


def _length(axes: Mapping[str, int]) -> int:
    """Start, string, separator, string."""
    return 2 * axes["letters"] + 2


@task("copying", suite="recall")
class Copying(Task):
    """`$ s | s .` with labels on the second string and the end sign.

    The answer is given as input as it goes (teacher forcing), so a model may find its place by matching the last few letters.
    Group "repeated" holds the labels where the last letter occurs more than once in the string and is followed by different
    letters, so that matching one letter does not tell.

    Args:
        train_cells: cells of the training split, letters : examples.
        valid_cells: the same for the validation split, which otherwise has the cells of the test split.
        test_cells: the same for the test split; by default up to four times the trained length.
        alphabet: number of letters of the alphabet.
    """

    def __init__(
        self,
        *,
        train_cells: str = "8:8000+16:8000+32:8000",
        valid_cells: str = "",
        test_cells: str = "16:500+32:500+64:500+128:500",
        alphabet: int = 26,
    ) -> None:
        self.alphabet, self.vocab_size = alphabet, FIRST + alphabet
        self._cells = parse_splits(("letters",), train=train_cells, valid=valid_cells, test=test_cells, length=_length)
        if alphabet < 2:
            raise ValueError(f"alphabet={alphabet} leaves nothing to tell apart; use at least 2")
        for cell in itertools.chain(*self._cells.values()):
            if cell.axes["letters"] < 2:
                raise ValueError(f"cell {cell.name} copies {cell.axes['letters']:g} letter; use at least 2")

    def cells(self, split: str) -> tuple[Cell, ...]:
        """See `Task.cells`."""
        return self._cells[split]

    def sample(self, cell: Cell, examples: int, rng: np.random.Generator) -> Batch:
        """See `Task.sample`."""
        letters = int(cell.axes["letters"])
        string = rng.integers(FIRST, self.vocab_size, size=(examples, letters), dtype=np.int32)
        inputs = np.empty((examples, cell.length), dtype=np.int32)
        inputs[:, 0], inputs[:, letters + 1] = START, SEP
        inputs[:, 1 : letters + 1] = inputs[:, letters + 2 :] = string
        targets = np.zeros_like(inputs)
        targets[:, letters + 1 : -1] = string
        targets[:, -1] = END
        mask = np.zeros(inputs.shape, dtype=bool)
        mask[:, letters + 1 :] = True
        repeated = np.zeros_like(mask)
        low, high = np.full((2, examples, self.vocab_size), END)
        low[:], rows = self.vocab_size, np.arange(examples)
        for t in range(letters):
            follower = string[:, t + 1] if t + 1 < letters else END
            low[rows, string[:, t]] = np.minimum(low[rows, string[:, t]], follower)
            high[rows, string[:, t]] = np.maximum(high[rows, string[:, t]], follower)
        repeated[:, letters + 2 :] = np.take_along_axis(low < high, string, axis=1)
        return Batch(inputs, targets, mask, {"repeated": repeated})

    def solve(self, batch: Batch) -> np.ndarray:
        """Reads the string by position; see `Task.solve`."""
        letters = batch.inputs.shape[1] // 2 - 1
        out = np.full_like(batch.inputs, END)
        out[:, letters + 1 : -1] = batch.inputs[:, 1 : letters + 1]
        return out

    def shortcuts(self, batch: Batch) -> dict[str, np.ndarray]:
        """The follower of the first place in the string where the last one, two or three tokens stand."""
        letters = batch.inputs.shape[1] // 2 - 1
        string = batch.inputs[:, : letters + 1]
        string_next = np.concatenate([batch.inputs[:, 1 : letters + 1], np.full((len(string), 1), END)], axis=1)
        found = {}
        match = np.ones((len(string), letters + 1, letters + 1), dtype=bool)
        for size in (1, 2, 3):
            back = size - 1
            now = np.concatenate([np.full((len(string), 1), START), batch.inputs[:, letters + 2 :]], axis=1)
            match[:, back:, back:] &= now[:, : letters + 1 - back, None] == string[:, None, : letters + 1 - back]
            if back:
                match[:, back:, :back] = False
            out = np.zeros_like(batch.inputs)
            out[:, letters + 1 :] = np.take_along_axis(string_next, match.argmax(axis=2), axis=1)
            found[f"{size}-gram match"] = out
        return found

    def ceilings(self, cell: Cell) -> dict[str, float]:
        """A guess over all letters; matching the last one to three tokens, measured."""
        return {"chance": 1 / self.alphabet, **measured(self, cell, 64)}

    def bits_needed(self, cell: Cell) -> float:
        """Bits of the n tokens, n log2(alphabet)."""
        return cell.axes["letters"] * log2(self.alphabet)
