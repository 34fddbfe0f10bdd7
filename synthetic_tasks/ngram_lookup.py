"""N-gram lookup: find an n-gram in a string and emit what follows it (Repeat After Me, Jelassi et al. 2024).

Asked after the string (suffix) the whole string must be kept; asked before it (prefix) a few letters are enough: the gap between
the two is capacity, not skill. Shape legend: N examples, T length, n letters, g size of the n-gram, a letters of the answer.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from math import log2
from typing import Literal

import numpy as np

from synthetic_tasks._base import Batch, Cell, Task, task
from synthetic_tasks._cells import parse_splits
from synthetic_tasks._metrics import measured

START, SEP, FIRST = 0, 1, 2


@task("ngram_lookup", suite="recall")
class NgramLookup(Task):
    """`$ s | g a` (suffix) or `$ g | s | a` (prefix), with labels on the answer a, the letters that follow g in s.

    g occurs once in s: strings where the chosen n-gram repeats are drawn again. The answer is given as input as it goes.

    Args:
        train_cells: cells of the training split, letters : examples.
        valid_cells: the same for the validation split, which otherwise has the cells of the test split.
        test_cells: the same for the test split; by default up to four times the trained length.
        order: "suffix" asks after the string, "prefix" before it.
        ngram: size of the n-gram.
        answer: letters of the answer.
        alphabet: number of letters of the alphabet.
    """

    def __init__(
        self,
        *,
        train_cells: str = "16:12000+32:12000",
        valid_cells: str = "",
        test_cells: str = "16:500+32:500+64:500+128:500",
        order: Literal["suffix", "prefix"] = "suffix",
        ngram: int = 2,
        answer: int = 4,
        alphabet: int = 26,
    ) -> None:
        self.order, self.ngram, self.answer, self.alphabet = order, ngram, answer, alphabet
        self.vocab_size = FIRST + alphabet
        if min(ngram, answer) < 1 or alphabet < 2:
            raise ValueError(f"ngram={ngram} and answer={answer} start at 1, and alphabet={alphabet} at 2")
        self._cells = parse_splits(("letters",), train=train_cells, valid=valid_cells, test=test_cells, length=self._length)
        for cell in itertools.chain(*self._cells.values()):
            letters = int(cell.axes["letters"])
            if letters < ngram + answer:
                raise ValueError(
                    f"{letters} letters cannot hold an n-gram of {ngram} and its answer of {answer}; use at least {ngram + answer}"
                )
            if letters > 2 * alphabet**ngram:
                raise ValueError(
                    f"in {letters} letters hardly any n-gram is unique, as there are {alphabet**ngram}; use at most "
                    f"{2 * alphabet**ngram} letters, a larger ngram or a larger alphabet"
                )

    def _length(self, axes: Mapping[str, int]) -> int:
        """Start, string, separators, n-gram, and the answer but for its last letter, which is never read."""
        return axes["letters"] + self.ngram + self.answer + (1 if self.order == "suffix" else 2)

    def cells(self, split: str) -> tuple[Cell, ...]:
        """See `Task.cells`."""
        return self._cells[split]

    def sample(self, cell: Cell, examples: int, rng: np.random.Generator) -> Batch:
        """See `Task.sample`."""
        letters = int(cell.axes["letters"])
        string, at = self._strings(rng, examples, letters)
        found = np.take_along_axis(string, at[:, None] + np.arange(self.ngram + self.answer), axis=1)
        gram, answer = found[:, : self.ngram], found[:, self.ngram :]
        start, sep = np.full((examples, 1), START), np.full((examples, 1), SEP)
        parts = [start, string, sep, gram] if self.order == "suffix" else [start, gram, sep, string, sep]
        inputs = np.concatenate([*parts, answer[:, :-1]], axis=1).astype(np.int32)
        targets = np.zeros_like(inputs)
        targets[:, -self.answer :] = answer
        mask = np.zeros(inputs.shape, dtype=bool)
        mask[:, -self.answer :] = True
        first = np.zeros_like(mask)
        first[:, -self.answer] = True
        return Batch(inputs, targets, mask, {"first letter": first})

    def _strings(self, rng: np.random.Generator, rows: int, letters: int) -> tuple[np.ndarray, np.ndarray]:
        """Strings and the place of an n-gram that is unique in each."""
        string = np.empty((rows, letters), dtype=np.int64)
        at = np.empty(rows, dtype=np.int64)
        todo = np.arange(rows)
        while todo.size:
            string[todo] = rng.integers(FIRST, self.vocab_size, size=(todo.size, letters))
            at[todo] = rng.integers(0, letters - self.ngram - self.answer + 1, size=todo.size)
            todo = todo[(self._matches(string[todo], self._gram(string[todo], at[todo]))).sum(axis=1) > 1]
        return string, at

    def _gram(self, string: np.ndarray, at: np.ndarray) -> np.ndarray:
        """The n-gram at a place of each string, [N, g]."""
        return np.take_along_axis(string, at[:, None] + np.arange(self.ngram), axis=1)

    def _matches(self, string: np.ndarray, gram: np.ndarray) -> np.ndarray:
        """Places of each string where its n-gram stands, [N, n - g + 1]."""
        places = string.shape[1] - self.ngram + 1
        return np.all([string[:, i : i + places] == gram[:, i, None] for i in range(self.ngram)], axis=0)

    def _split(self, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        """The string and the n-gram as written."""
        inputs, letters = batch.inputs, batch.inputs.shape[1] - self._length({"letters": 0})
        if self.order == "suffix":
            return inputs[:, 1 : 1 + letters], inputs[:, 2 + letters : 2 + letters + self.ngram]
        return inputs[:, 2 + self.ngram : 2 + self.ngram + letters], inputs[:, 1 : 1 + self.ngram]

    def _after(self, batch: Batch, at: np.ndarray) -> np.ndarray:
        """Predictions: the letters from place `at` of the string on."""
        string, _ = self._split(batch)
        index = np.minimum(at[:, None] + np.arange(self.answer), string.shape[1] - 1)
        out = np.zeros_like(batch.inputs)
        out[:, -self.answer :] = np.take_along_axis(string, index, axis=1)
        return out

    def solve(self, batch: Batch) -> np.ndarray:
        """Finds the n-gram; see `Task.solve`."""
        return self._after(batch, self._matches(*self._split(batch)).argmax(axis=1) + self.ngram)

    def shortcuts(self, batch: Batch) -> dict[str, np.ndarray]:
        """What follows the first place of the n-gram's last letter alone."""
        string, gram = self._split(batch)
        inner = string[:, self.ngram - 1 :] == gram[:, -1:]
        return {"last letter only": self._after(batch, inner.argmax(axis=1) + self.ngram)}

    def ceilings(self, cell: Cell) -> dict[str, float]:
        """A guess over all letters; matching the last letter of the n-gram alone, measured."""
        return {"chance": 1 / self.alphabet, **measured(self, cell)}

    def bits_needed(self, cell: Cell) -> float:
        """Suffix: n log2(alphabet), the whole string. Prefix: the n-gram, then the answer."""
        letters = cell.axes["letters"] if self.order == "suffix" else self.ngram + self.answer
        return letters * log2(self.alphabet)
