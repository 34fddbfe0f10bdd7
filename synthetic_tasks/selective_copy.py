"""Selective copying: repeat, in order, the data tokens scattered among noise.

Source: Mamba (Gu and Dao 2023), section 4.1.1: 16 data tokens among 4096. Its spacing is random, so a fixed convolution cannot
solve it and a mixer must choose what enters its state. Shape legend: N examples, T length, n data tokens.
"""

from __future__ import annotations

import itertools
from math import log2
from typing import Literal

import numpy as np

from synthetic_tasks._base import Batch, Cell, Task, task
from synthetic_tasks._cells import parse_splits
from synthetic_tasks._draws import distinct
from synthetic_tasks._metrics import measured

NOISE, MARKER, FIRST = 0, 1, 2


@task("selective_copy", suite="selectivity")
class SelectiveCopy(Task):
    """Selective copying.

    Of T - n context tokens n are data, at random places, drawn independently; the others are noise. Then come n markers, of
    which the j-th is labelled with the j-th data token.

    Args:
        train_cells: cells of the training split, length x tokens : examples; the length counts context and markers.
        valid_cells: the same for the validation split, which otherwise has the cells of the test split.
        test_cells: the same for the test split.
        symbols: number of data symbols; the paper's 16 ids are 15 of them and the noise.
        spacing: "random" places; "fixed" puts the data first (plain copying, which a convolution can learn).
    """

    def __init__(
        self,
        *,
        train_cells: str = "64x8:12000+128x8:6000",
        valid_cells: str = "",
        test_cells: str = "64x8:500+128x8:500+256x8:500+128x16:500",
        symbols: int = 15,
        spacing: Literal["random", "fixed"] = "random",
    ) -> None:
        self.symbols, self.spacing = symbols, spacing
        self.vocab_size = FIRST + symbols
        self._cells = parse_splits(("length", "tokens"), train=train_cells, valid=valid_cells, test=test_cells)
        if symbols < 2:
            raise ValueError(f"symbols={symbols} leaves nothing to tell apart; use at least 2")
        for cell in itertools.chain(*self._cells.values()):
            if 2 * cell.axes["tokens"] > cell.length:
                raise ValueError(
                    f"{cell.axes['tokens']:g} data tokens need as many markers, at least "
                    f"{2 * cell.axes['tokens']:g} tokens in all, but the length is {cell.length}; use at most {cell.length // 2}"
                )

    def cells(self, split: str) -> tuple[Cell, ...]:
        """See `Task.cells`."""
        return self._cells[split]

    def sample(self, cell: Cell, examples: int, rng: np.random.Generator) -> Batch:
        """See `Task.sample`."""
        tokens = int(cell.axes["tokens"])
        context = cell.length - tokens
        data = rng.integers(FIRST, self.vocab_size, size=(examples, tokens), dtype=np.int32)
        places = np.arange(tokens)[None] if self.spacing == "fixed" else np.sort(distinct(rng, examples, tokens, context), axis=1)
        inputs = np.full((examples, cell.length), NOISE, dtype=np.int32)
        np.put_along_axis(inputs, np.broadcast_to(places, data.shape), data, axis=1)
        inputs[:, context:] = MARKER
        targets = np.zeros_like(inputs)
        targets[:, context:] = data
        return Batch(inputs, targets, inputs == MARKER)

    def solve(self, batch: Batch) -> np.ndarray:
        """Collects the data tokens in order; see `Task.solve`."""
        is_data = batch.inputs >= FIRST
        tokens = int(batch.mask[0].sum())
        order = np.argsort(~is_data, axis=1, kind="stable")[:, :tokens]
        out = np.zeros_like(batch.inputs)
        out[:, -tokens:] = np.take_along_axis(batch.inputs, order, axis=1)
        return out

    def shortcuts(self, batch: Batch) -> dict[str, np.ndarray]:
        """The commonest data token of the sequence, everywhere."""
        counts = np.stack([(batch.inputs == symbol).sum(axis=1) for symbol in range(FIRST, self.vocab_size)], axis=1)
        commonest = FIRST + counts.argmax(axis=1)
        return {"commonest token": np.broadcast_to(commonest[:, None], batch.inputs.shape).astype(np.int32)}

    def ceilings(self, cell: Cell) -> dict[str, float]:
        """A guess over all symbols; the commonest token of the sequence, measured."""
        return {"chance": 1 / self.symbols, **measured(self, cell)}

    def bits_needed(self, cell: Cell) -> float:
        """Bits of the n tokens, n log2(symbols)."""
        return cell.axes["tokens"] * log2(self.symbols)
