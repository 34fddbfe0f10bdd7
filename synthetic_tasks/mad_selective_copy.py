"""MAD selective copying: emit the letters of a sequence in order, without the blanks in between (Poli et al. 2024).

Shape legend: N examples, T length, n letters.
"""

from __future__ import annotations

import itertools
from math import log2
from typing import Literal

import numpy as np

from synthetic_tasks._base import Batch, Cell, task
from synthetic_tasks._cells import parse_splits
from synthetic_tasks._draws import distinct
from synthetic_tasks._mad import MADTask


@task("mad_selective_copy", suite="mad")
class MADSelectiveCopy(MADTask):
    """Selective copying with the published sizes: vocabulary 16 (14 letters, blank, copy token), length 256, 16 letters.

    n random letters are spread among blanks; after the copy token come n blanks, of which the j-th is labelled with the j-th
    letter.

    Args:
        train_cells: cells of the training split, length x letters : examples.
        valid_cells: the same for the validation split, which otherwise has the cells of the test split.
        test_cells: the same for the test split; by default with lengths and loads beyond the trained ones.
        vocab_size: number of token ids; the last two are blank and copy token.
        compat: "mad" keeps the published spacing, where blanks are inserted before letters only: the last letter always
            stands right before the copy token. With "none" every choice of places is equally likely.
    """

    def __init__(
        self,
        *,
        train_cells: str = "256x16:12800",
        valid_cells: str = "",
        test_cells: str = "256x16:1280+512x16:320+256x32:320",
        vocab_size: int = 16,
        compat: Literal["none", "mad"] = "none",
    ) -> None:
        self.vocab_size, self.compat = vocab_size, compat
        self._cells = parse_splits(("length", "letters"), train=train_cells, valid=valid_cells, test=test_cells)
        if vocab_size < 4:
            raise ValueError(f"vocab_size={vocab_size} leaves fewer than 2 letters; use at least 4")
        for cell in itertools.chain(*self._cells.values()):
            letters = int(cell.axes["letters"])
            if 2 * letters + 1 > cell.length:
                raise ValueError(
                    f"{letters} letters, the copy token and as many blanks need {2 * letters + 1} tokens but "
                    f"the length is {cell.length}; use at most {(cell.length - 1) // 2} letters"
                )

    def cells(self, split: str) -> tuple[Cell, ...]:
        """See `Task.cells`."""
        return self._cells[split]

    def sample(self, cell: Cell, examples: int, rng: np.random.Generator) -> Batch:
        """See `Task.sample`."""
        letters = int(cell.axes["letters"])
        context = cell.length - letters - 1
        data = rng.integers(0, self.vocab_size - 2, size=(examples, letters), dtype=np.int32)
        if self.compat == "mad":  # each blank falls before a uniformly chosen letter
            before = rng.multinomial(context - letters, np.full(letters, 1 / letters), size=examples)
            places = np.cumsum(before, axis=1) + np.arange(letters)
        else:
            places = np.sort(distinct(rng, examples, letters, context), axis=1)
        blank, copy = self.vocab_size - 2, self.vocab_size - 1
        inputs = np.full((examples, cell.length), blank, dtype=np.int32)
        np.put_along_axis(inputs, places, data, axis=1)
        inputs[:, context] = copy
        targets = np.zeros_like(inputs)
        targets[:, context + 1 :] = data
        mask = np.zeros(inputs.shape, dtype=bool)
        mask[:, context + 1 :] = True
        return Batch(inputs, targets, mask)

    def solve(self, batch: Batch) -> np.ndarray:
        """Collects the letters in order; see `Task.solve`."""
        letters = int(batch.mask[0].sum())
        order = np.argsort(batch.inputs >= self.vocab_size - 2, axis=1, kind="stable")[:, :letters]
        out = np.zeros_like(batch.inputs)
        out[:, -letters:] = np.take_along_axis(batch.inputs, order, axis=1)
        return out

    def ceilings(self, cell: Cell) -> dict[str, float]:
        """A guess over all letters."""
        del cell
        return {"chance": 1 / (self.vocab_size - 2)}

    def bits_needed(self, cell: Cell) -> float:
        """Bits of the n tokens, n log2(letters of the alphabet)."""
        return cell.axes["letters"] * log2(self.vocab_size - 2)
