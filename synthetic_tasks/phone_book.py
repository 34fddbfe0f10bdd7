"""Phone book: look up the number of a name among many entries (Repeat After Me, Jelassi et al. 2024), in tokens of our own.

Shape legend: N examples, T length, n entries, d digits.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from math import comb, isqrt, log2

import numpy as np

from synthetic_tasks._base import Batch, Cell, Task, task
from synthetic_tasks._cells import parse_splits
from synthetic_tasks._draws import distinct

DIGITS, NEXT, ASK = 10, 10, 11
FIRST = 12


@task("phone_book", suite="recall")
class PhoneBook(Task):
    """Entries `first last digits`, then one name whose digits are to be emitted.

    A name is two tokens, and names of a sequence differ as pairs, so a first or last name alone may belong to several entries.
    A number starts with 6 to 9, as published, and is given as input as it goes (teacher forcing). Group "first digit" holds
    the one label that cannot be helped by digits already given.

    Args:
        train_cells: cells of the training split, entries : examples.
        valid_cells: the same for the validation split, which otherwise has the cells of the test split.
        test_cells: the same for the test split; by default with more entries than in training.
        names: first names and last names to choose from, each.
        digits: digits of a number.
    """

    def __init__(
        self,
        *,
        train_cells: str = "4:8000+8:8000+16:8000",
        valid_cells: str = "",
        test_cells: str = "4:500+8:500+16:500+32:500",
        names: int = 32,
        digits: int = 4,
    ) -> None:
        self.names, self.digits = names, digits
        self.vocab_size = FIRST + 2 * names
        if digits < 1:
            raise ValueError(f"digits={digits} leaves no number to ask for; use at least 1")
        self._cells = parse_splits(("entries",), train=train_cells, valid=valid_cells, test=test_cells, length=self._length)
        for cell in itertools.chain(*self._cells.values()):
            if cell.axes["entries"] > names**2:
                raise ValueError(
                    f"{cell.axes['entries']:g} entries need different names, but {names} first and last names make "
                    f"{names**2}; use names={isqrt(int(cell.axes['entries']) - 1) + 1}"
                )

    def _length(self, axes: Mapping[str, int]) -> int:
        """An entry is two names, the number and a separator; the question a sign, two names and all digits but the last."""
        return axes["entries"] * (3 + self.digits) + 3 + self.digits - 1

    def cells(self, split: str) -> tuple[Cell, ...]:
        """See `Task.cells`."""
        return self._cells[split]

    def sample(self, cell: Cell, examples: int, rng: np.random.Generator) -> Batch:
        """See `Task.sample`."""
        entries = int(cell.axes["entries"])
        first, last = np.divmod(distinct(rng, examples, entries, self.names**2), self.names)
        number = rng.integers(0, 10, size=(examples, entries, self.digits))
        number[:, :, 0] = rng.integers(6, 10, size=(examples, entries))
        book = np.empty((examples, entries, 3 + self.digits), dtype=np.int32)
        book[:, :, 0], book[:, :, 1], book[:, :, 2:-1], book[:, :, -1] = FIRST + first, FIRST + self.names + last, number, NEXT
        asked = book[np.arange(examples), rng.integers(0, entries, size=examples)]
        ask = np.full((examples, 1), ASK, dtype=np.int32)
        inputs = np.concatenate([book.reshape(examples, -1), ask, asked[:, :-2]], axis=1)
        targets = np.zeros_like(inputs)
        targets[:, -self.digits :] = asked[:, 2:-1]
        mask = np.zeros(inputs.shape, dtype=bool)
        mask[:, -self.digits :] = True
        leading = np.zeros_like(mask)
        leading[:, -self.digits] = True
        return Batch(inputs, targets, mask, {"first digit": leading})

    def _emit(self, batch: Batch, *, both: bool) -> np.ndarray:
        """The number of the first entry with the name asked, or with its last name alone."""
        width = 3 + self.digits
        entries = (batch.inputs.shape[1] + 1) // width - 1
        book = batch.inputs[:, : entries * width].reshape(len(batch.inputs), entries, width)
        name = batch.inputs[:, entries * width + 1 : entries * width + 3]
        match = book[:, :, 1] == name[:, 1:]
        if both:
            match &= book[:, :, 0] == name[:, :1]
        out = np.zeros_like(batch.inputs)
        out[:, -self.digits :] = book[np.arange(len(out)), match.argmax(axis=1), 2:-1]
        return out

    def solve(self, batch: Batch) -> np.ndarray:
        """Finds the name; see `Task.solve`."""
        return self._emit(batch, both=True)

    def shortcuts(self, batch: Batch) -> dict[str, np.ndarray]:
        """The number of the first entry with the same last name."""
        return {"last name only": self._emit(batch, both=False)}

    def ceilings(self, cell: Cell) -> dict[str, float]:
        """Guesses: 1/4 for the first digit and 1/10 for the others; the solver that reads last names only.

        With n entries and m names, another entry has the same last name with probability q = (m - 1)/(m^2 - 1) and is met first
        half of the time; the expectation below is over how many others share it.
        """
        guess = (1 / 4 + (self.digits - 1) / 10) / self.digits
        others, size = int(cell.axes["entries"]) - 1, self.names**2 - 1
        same = self.names - 1
        right = sum(
            comb(same, k) * comb(size - same, others - k) / comb(size, others) / (k + 1)
            for k in range(min(same, others) + 1)
            if others - k <= size - same
        )
        return {"chance": guess, "last name only": right + (1 - right) * guess}

    def bits_needed(self, cell: Cell) -> float:
        """Entropy of the set of names plus that of all numbers, in bits (31.9 a number of ten digits)."""
        entries = int(cell.axes["entries"])
        return log2(comb(self.names**2, entries)) + entries * (2 + (self.digits - 1) * log2(10))
