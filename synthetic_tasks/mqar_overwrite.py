"""MQAR with overwriting: some keys are written again with a new value, and a query asks for the last one.

The idea is Zoology's "forgetting" MQAR (HazyResearch/zoology, `forgetting_mqar`), whose shipped settings leave 4 updates for
every number of pairs. Shape legend: N examples, T length, n pairs, u updates, S query slots of two tokens.
"""

from __future__ import annotations

import itertools
from math import comb, log2
from typing import Literal

import numpy as np

from synthetic_tasks._base import Batch, Cell, Task, task
from synthetic_tasks._cells import parse_splits
from synthetic_tasks._draws import distinct, weighted_order
from synthetic_tasks._metrics import measured

TRAIN = "64x4:8000+64x8:8000+128x16:8000"
TEST = "64x4:500+64x8:500+128x16:500+256x32:500"


@task("mqar_overwrite", suite="recall")
class MQAROverwrite(Task):
    """Multi-query associative recall with updates.

    The context holds n pairs and then u updates `k v'`, whose keys are drawn with replacement from the n keys. All n + u
    values of a sequence differ. Queries are placed as in MQAR and labelled with the last value of their key. Groups
    "updated" and "untouched" have an accuracy of their own; the lure "stale" is the value before the last one.

    Args:
        train_cells: cells of the training split, length x pairs : examples.
        valid_cells: the same for the validation split, which otherwise has the cells of the test split.
        test_cells: the same for the test split.
        updates: number of updates as a multiple of the number of pairs: 0.5, 1 or 2 are the settings of our report.
        vocab_size: number of token ids.
        filler: "random" fills the query region from the whole vocabulary, "zero" with token 0.
        power_a: exponent of the query law, see `mqar`.
        compat: "zoology" writes min(4, n) updates of distinct keys whatever n is, so a model that ignores every update
            scores 1 - 4/n (98.4 % at 256 pairs). It also keeps that the j-th update avoids the first value of the j-th key
            instead of that of the key it updates, so that an update may repeat the value that it replaces.
    """

    def __init__(
        self,
        *,
        train_cells: str = TRAIN,
        valid_cells: str = "",
        test_cells: str = TEST,
        updates: float = 0.5,
        vocab_size: int = 256,
        filler: Literal["random", "zero"] = "random",
        power_a: float = 0.01,
        compat: Literal["none", "zoology"] = "none",
    ) -> None:
        self.vocab_size, self.updates, self.filler, self.power_a, self.compat = vocab_size, updates, filler, power_a, compat
        self._cells = parse_splits(("length", "pairs"), train=train_cells, valid=valid_cells, test=test_cells)
        if updates <= 0 or power_a <= 0:
            raise ValueError(f"updates={updates} and power_a={power_a} must be positive, e.g. 0.5 and 0.01")
        for cell in itertools.chain(*self._cells.values()):
            self._check(cell)

    def _updates(self, pairs: int) -> int:
        """Number of updates u of a sequence with n pairs."""
        return min(4, pairs) if self.compat == "zoology" else max(1, round(self.updates * pairs))

    def _check(self, cell: Cell) -> None:
        """Refuses cells whose pairs and updates do not fit the length or the vocabulary."""
        pairs, half = int(cell.axes["pairs"]), self.vocab_size // 2
        updates = self._updates(pairs)
        need = 4 * pairs + 2 * updates
        if pairs < 1 or need > cell.length:
            raise ValueError(
                f"{pairs} pairs with {updates} updates need {need} tokens (2 a pair, 2 an update, 2 a query) "
                f"but the length is {cell.length}; use fewer pairs, a smaller `updates` or a length of at least {need}"
            )
        values = pairs if self.compat == "zoology" else pairs + updates
        if pairs > half - 1 or values > self.vocab_size - half:
            raise ValueError(
                f"{pairs} pairs with {updates} updates need {pairs} keys and {values} values, but vocab_size="
                f"{self.vocab_size} has {half - 1} and {self.vocab_size - half}; use vocab_size={2 * max(pairs + 1, values)}"
            )

    def cells(self, split: str) -> tuple[Cell, ...]:
        """See `Task.cells`."""
        return self._cells[split]

    def sample(self, cell: Cell, examples: int, rng: np.random.Generator) -> Batch:
        """See `Task.sample`."""
        pairs, length, half = int(cell.axes["pairs"]), cell.length, self.vocab_size // 2
        updates = self._updates(pairs)
        keys = 1 + distinct(rng, examples, pairs, half - 1)
        values, chosen = self._written(rng, examples, pairs, updates)
        last, stale = values[:, :pairs].copy(), np.full((examples, pairs), -1)
        rows = np.arange(examples)
        for j in range(updates):
            index = chosen[:, j]
            stale[rows, index] = last[rows, index]
            last[rows, index] = values[:, pairs + j]

        head = 2 * (pairs + updates)
        slots = (length - head) // 2
        query_at = head + 2 * weighted_order(rng, examples, pairs, np.arange(1, slots + 1) ** (self.power_a - 1.0))
        inputs = np.zeros((examples, length), dtype=np.int32)
        if self.filler == "random":
            inputs[:, head:] = rng.integers(0, self.vocab_size, size=(examples, length - head), dtype=np.int32)
        inputs[:, 0:head:2] = np.concatenate([keys, np.take_along_axis(keys, chosen, axis=1)], axis=1)
        inputs[:, 1:head:2] = values
        np.put_along_axis(inputs, query_at, keys.astype(np.int32), axis=1)

        def at_queries(content: np.ndarray, fill: int) -> np.ndarray:
            out = np.full((examples, length), fill, dtype=np.int32)
            np.put_along_axis(out, query_at, content.astype(np.int32), axis=1)
            return out

        targets, updated = at_queries(last, 0), at_queries(stale >= 0, 0) > 0
        mask = targets > 0
        groups = {"updated": updated, "untouched": mask & ~updated}
        return Batch(inputs, targets, mask, groups, {"stale": at_queries(stale, -1)})

    def _written(self, rng: np.random.Generator, rows: int, pairs: int, updates: int) -> tuple[np.ndarray, np.ndarray]:
        """All values in the order written [N, n + u], and the index of the key of each update [N, u]."""
        half = self.vocab_size // 2
        count = self.vocab_size - half
        if self.compat == "none":
            return half + distinct(rng, rows, pairs + updates, count), rng.integers(0, pairs, size=(rows, updates))
        first = distinct(rng, rows, pairs, count)
        fresh = rng.integers(0, count - 1, size=(rows, updates))
        fresh += fresh >= first[:, :updates]
        return half + np.concatenate([first, fresh], axis=1), distinct(rng, rows, updates, pairs)

    def solve(self, batch: Batch) -> np.ndarray:
        """Looks every token up among the pairs written so far, the last one first; see `Task.solve`."""
        return self._look_up(batch, with_updates=True)

    def shortcuts(self, batch: Batch) -> dict[str, np.ndarray]:
        """The solver that ignores every update."""
        return {"ignores updates": self._look_up(batch, with_updates=False)}

    def _look_up(self, batch: Batch, *, with_updates: bool) -> np.ndarray:
        """Each token's value by the pairs of the context, with or without the updates."""
        pairs = int(batch.mask[0].sum())
        written = pairs + (self._updates(pairs) if with_updates else 0)
        table = np.zeros((len(batch.inputs), self.vocab_size), dtype=np.int32)
        rows = np.arange(len(table))
        for j in range(written):
            table[rows, batch.inputs[:, 2 * j]] = batch.inputs[:, 2 * j + 1]
        return np.take_along_axis(table, batch.inputs, axis=1)

    def ceilings(self, cell: Cell) -> dict[str, float]:
        """Guesses over all values and over the values written; the score of ignoring every update, measured."""
        pairs = int(cell.axes["pairs"])
        guess = 1 / (pairs + self._updates(pairs))
        return {"chance": 2 / self.vocab_size, "in-context guess": guess, **measured(self, cell)}

    def bits_needed(self, cell: Cell) -> float:
        """Entropy of the key set plus that of the last values given the keys, in bits, as in MQAR."""
        pairs, half = int(cell.axes["pairs"]), self.vocab_size // 2
        values = self.vocab_size - half
        return log2(comb(half - 1, pairs)) + sum(log2(values - j) for j in range(pairs))
