"""MQAR with keys of two tokens: faithful, where two single-key memories suffice, and repaired, where they do not.

Source: HazyResearch/zoology, compositional MQAR. There all values of a g by g grid differ, so the values seen with the first
token and those seen with the second have one in common: adding two single-key memories solves it. With a Latin square of g
values every row and every column holds all of them, and only the conjunction of both tokens tells.
Shape legend: N examples, T length, g grid side, n = g^2 pairs, S query slots of three tokens.
"""

from __future__ import annotations

import itertools
from math import comb, isqrt, log2
from typing import Literal

import numpy as np

from synthetic_tasks._base import Batch, Cell, Task, task
from synthetic_tasks._cells import parse_splits
from synthetic_tasks._draws import distinct, weighted_order
from synthetic_tasks._joint import random_order
from synthetic_tasks._latin import latin_squares, log2_squares
from synthetic_tasks._metrics import measured


@task("compositional_mqar", suite="recall")
class CompositionalMQAR(Task):
    """Multi-query associative recall with conjunctive keys.

    The vocabulary is in thirds: first key tokens (id 0 excluded), second key tokens, values. All pairs of g first and g second
    tokens are written in random order as `k1 k2 v`; each pair is asked once as `k1 k2` in a slot of three tokens placed by
    the law of MQAR, with the label at k2.

    Args:
        train_cells: cells of the training split, length x pairs : examples; pairs is a square.
        valid_cells: the same for the validation split, which otherwise has the cells of the test split.
        test_cells: the same for the test split.
        values: "latin" writes g values as a random Latin square, so that both tokens must be bound; "distinct" writes n
            different values, the published task.
        vocab_size: number of token ids.
        filler: "random" fills the query region from the whole vocabulary, "zero" with token 0.
        power_a: exponent of the query law, see `mqar`.
    """

    def __init__(
        self,
        *,
        train_cells: str = "64x4:8000+64x9:8000+128x16:8000",
        valid_cells: str = "",
        test_cells: str = "64x4:500+64x9:500+128x16:500+256x36:500",
        values: Literal["latin", "distinct"] = "latin",
        vocab_size: int = 192,
        filler: Literal["random", "zero"] = "random",
        power_a: float = 0.01,
    ) -> None:
        self.vocab_size, self.values, self.filler, self.power_a = vocab_size, values, filler, power_a
        self._cells = parse_splits(("length", "pairs"), train=train_cells, valid=valid_cells, test=test_cells)
        if power_a <= 0:
            raise ValueError(f"power_a={power_a} must be positive; 0.01 is the published value")
        for cell in itertools.chain(*self._cells.values()):
            self._check(cell)

    def _check(self, cell: Cell) -> None:
        """Refuses cells whose pairs are no square, or fit neither length nor vocabulary."""
        pairs, third = int(cell.axes["pairs"]), self.vocab_size // 3
        side = isqrt(pairs)
        if side**2 != pairs:
            raise ValueError(f"{pairs} pairs are no square grid; use {side**2} or {(side + 1) ** 2} pairs")
        if 6 * pairs > cell.length:
            raise ValueError(
                f"{pairs} pairs need {6 * pairs} tokens (3 a pair, 3 a query) but the length is {cell.length}; "
                f"use at most {isqrt(cell.length // 6) ** 2} pairs or a length of at least {6 * pairs}"
            )
        if side > third - 1 or (self.values == "distinct" and pairs > self._value_count()):
            raise ValueError(
                f"{pairs} pairs need {side} keys of each kind and up to {pairs} values, but vocab_size="
                f"{self.vocab_size} has {third - 1} and {self._value_count()}; use vocab_size={3 * max(side + 1, pairs)}"
            )

    def _value_count(self) -> int:
        """Number of value ids."""
        return self.vocab_size - 2 * (self.vocab_size // 3)

    def cells(self, split: str) -> tuple[Cell, ...]:
        """See `Task.cells`."""
        return self._cells[split]

    def sample(self, cell: Cell, examples: int, rng: np.random.Generator) -> Batch:
        """See `Task.sample`; group "conflict" holds the labels that two additive memories get wrong."""
        pairs, length, third = int(cell.axes["pairs"]), cell.length, self.vocab_size // 3
        side = isqrt(pairs)
        first = 1 + distinct(rng, examples, side, third - 1)
        second = third + distinct(rng, examples, side, third)
        if self.values == "latin":
            symbols = distinct(rng, examples, side, self._value_count())
            grid = np.take_along_axis(symbols, latin_squares(rng, examples, side).reshape(examples, -1), axis=1)
        else:
            grid = distinct(rng, examples, pairs, self._value_count())
        order = random_order(rng, examples, pairs)
        k1 = np.take_along_axis(first, order // side, axis=1)
        k2 = np.take_along_axis(second, order % side, axis=1)
        values = 2 * third + np.take_along_axis(grid, order, axis=1)

        head, slots = 3 * pairs, (length - 3 * pairs) // 3
        asked = head + 3 * weighted_order(rng, examples, pairs, np.arange(1, slots + 1) ** (self.power_a - 1.0))
        inputs = np.zeros((examples, length), dtype=np.int32)
        if self.filler == "random":
            inputs[:, head:] = rng.integers(0, self.vocab_size, size=(examples, length - head), dtype=np.int32)
        inputs[:, 0:head:3], inputs[:, 1:head:3], inputs[:, 2:head:3] = k1, k2, values
        np.put_along_axis(inputs, asked, k1.astype(np.int32), axis=1)
        np.put_along_axis(inputs, asked + 1, k2.astype(np.int32), axis=1)
        targets = np.zeros((examples, length), dtype=np.int32)
        np.put_along_axis(targets, asked + 1, values.astype(np.int32), axis=1)
        batch = Batch(inputs, targets, mask=targets > 0)
        wrong = batch.mask & (self.shortcuts(batch)["two additive memories"] != targets)
        return Batch(inputs, targets, batch.mask, {"conflict": wrong})

    def _context(self, batch: Batch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """First tokens, second tokens and values of the context, each [N, n]."""
        head = 3 * int(batch.mask[0].sum())
        return batch.inputs[:, 0:head:3], batch.inputs[:, 1:head:3], batch.inputs[:, 2:head:3]

    def _scores(self, batch: Batch, *, conjunctive: bool) -> np.ndarray:
        """The best context pair by matching tokens: both of them, or the sum of two memories; predictions [N, T]."""
        k1, k2, values = self._context(batch)
        rows, at = np.nonzero(batch.mask)
        match1 = k1[rows] == batch.inputs[rows, at - 1][:, None]
        match2 = k2[rows] == batch.inputs[rows, at][:, None]
        out = np.zeros_like(batch.inputs)
        if conjunctive:
            out[rows, at] = values[rows, (match1 & match2).argmax(axis=1)]
            return out
        # Each memory returns the bag of values seen with its token; the value with the largest sum of counts wins.
        memory = np.zeros((rows.size, self.vocab_size), dtype=np.int8)
        for j in range(values.shape[1]):
            memory[np.arange(rows.size), values[rows, j]] += match1[:, j].astype(np.int8) + match2[:, j]
        out[rows, at] = memory.argmax(axis=1)
        return out

    def solve(self, batch: Batch) -> np.ndarray:
        """Looks the pair of tokens up; see `Task.solve`."""
        return self._scores(batch, conjunctive=True)

    def shortcuts(self, batch: Batch) -> dict[str, np.ndarray]:
        """The sum of one memory for each of the two tokens."""
        return {"two additive memories": self._scores(batch, conjunctive=False)}

    def ceilings(self, cell: Cell) -> dict[str, float]:
        """Guesses over all values and over those of the context; two additive memories, measured."""
        pairs = int(cell.axes["pairs"])
        different = isqrt(pairs) if self.values == "latin" else pairs
        return {"chance": 1 / self._value_count(), "in-context guess": 1 / different, **measured(self, cell)}

    def bits_needed(self, cell: Cell) -> float:
        """Entropy of both key sets and of the table, in bits."""
        pairs, third, values = int(cell.axes["pairs"]), self.vocab_size // 3, self._value_count()
        side = isqrt(pairs)
        keys = log2(comb(third - 1, side)) + log2(comb(third, side))
        if self.values == "latin":
            return keys + log2(comb(values, side)) + log2_squares(side)
        return keys + sum(log2(values - j) for j in range(pairs))
