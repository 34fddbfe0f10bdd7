"""Joint recall, repaired: the value of a key in a context, which only binding them can tell.

Against the published task (`joint_recall_hax`): answers are hidden; queries are drawn with replacement; tables are balanced,
so that every value occurs once for each context and once for each key and bags of values tell nothing; symbols are random
subsets of larger alphabets; contexts may have several levels. Training tables are not balanced: in a balanced one neither context
nor key alone says anything about the value, so nothing pulls a model towards binding them (docs/task_figures.md).
Shape legend: N examples, T length, n symbols of each level and values, d levels (contexts, then the key), Q queries.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace
from math import comb, lgamma, log, log2
from typing import Literal

import numpy as np

from synthetic_tasks._base import Batch, Cell, Task, task
from synthetic_tasks._cells import parse_splits
from synthetic_tasks._draws import distinct
from synthetic_tasks._joint import random_order
from synthetic_tasks._latin import latin_tables, log2_squares
from synthetic_tasks._metrics import accuracy, binding_gain, measured

BOS, SEP, MASK, FIRST = 1, 2, 3, 4
TRAINED = "trained"
"""Axis of the training split's cells, whose tables may be of another kind."""


@task("joint_recall", suite="recall")
class JointRecall(Task):
    """Joint recall that certifies binding.

    A table with d indices of n symbols each holds n values. It is written as nested blocks in random order: a context token,
    then what it holds; innermost are key value pairs. After sep come Q queries, each the context tokens, the key, and a mask
    token where the answer would stand; the label is at the key. Group "conflict" holds the labels that the marginal solver
    gets wrong; binding gain is (accuracy - m) / (1 - m), where m is the ceiling "marginals".

    Args:
        train_cells: cells of the training split, size x queries : examples, where size is n.
        valid_cells: the same for the validation split, which otherwise has the cells of the test split.
        test_cells: the same for the test split.
        levels: order d of the binding: 1 is a plain dictionary, 2 context and key, 3 two contexts and key.
        tables: of validation and test: "latin" is balanced; "iid" draws entries independently, which leaves the marginal solver
            far above chance.
        train_tables: the same for the training split.
        alphabet: symbols of each level to choose from.
        value_alphabet: values to choose from.
    """

    def __init__(
        self,
        *,
        train_cells: str = "2x8:8000+4x16:8000+6x16:8000",
        valid_cells: str = "",
        test_cells: str = "2x8:500+4x16:500+6x16:500+8x16:500",
        levels: int = 2,
        tables: Literal["latin", "iid"] = "latin",
        train_tables: Literal["latin", "iid"] = "iid",
        alphabet: int = 32,
        value_alphabet: int = 16,
    ) -> None:
        self.levels, self.tables, self.alphabet, self.value_alphabet = levels, tables, alphabet, value_alphabet
        self.vocab_size = FIRST + value_alphabet + levels * alphabet
        if not 1 <= levels <= 3:
            raise ValueError(f"levels={levels} is not supported; use 1 (a dictionary), 2 (context and key) or 3 (two contexts)")
        self._cells = parse_splits(("size", "queries"), train=train_cells, valid=valid_cells, test=test_cells, length=self._length)
        self._cells["train"] = tuple(replace(cell, axes={**cell.axes, TRAINED: 1}) for cell in self._cells["train"])
        self.train_tables = train_tables
        for cell in itertools.chain(*self._cells.values()):
            if cell.axes["size"] > min(alphabet, value_alphabet):
                raise ValueError(
                    f"cell {cell.name} needs {cell.axes['size']:g} symbols a level and as many values, but "
                    f"alphabet={alphabet} and value_alphabet={value_alphabet}; use a size of at most "
                    f"{min(alphabet, value_alphabet)} or larger alphabets"
                )

    def _written(self, size: int) -> int:
        """Tokens of the written table."""
        tokens = 2 * size
        for _ in range(self.levels - 1):
            tokens = size * (1 + tokens)
        return tokens

    def _length(self, axes: Mapping[str, int]) -> int:
        """Tokens of a sequence."""
        return 2 + self._written(axes["size"]) + axes["queries"] * (self.levels + 1)

    def cells(self, split: str) -> tuple[Cell, ...]:
        """See `Task.cells`."""
        return self._cells[split]

    def sample(self, cell: Cell, examples: int, rng: np.random.Generator) -> Batch:
        """See `Task.sample`."""
        size, queries = int(cell.axes["size"]), int(cell.axes["queries"])
        shape = (examples, *[size] * self.levels)
        table = latin_tables(rng, examples, size, self.levels) if self._balanced(cell) else rng.integers(0, size, shape)
        values = FIRST + distinct(rng, examples, size, self.value_alphabet)
        symbols = np.stack([distinct(rng, examples, size, self.alphabet) + self._first(d) for d in range(self.levels)], axis=1)
        asked = rng.integers(0, size, size=(examples, queries, self.levels))
        rows = np.arange(examples)

        inputs = np.empty((examples, cell.length), dtype=np.int32)
        inputs[:, 0] = BOS
        head = 1 + self._written(size)
        inputs[:, 1:head] = self._write(rng, table, symbols, values)
        inputs[:, head] = SEP
        tail = inputs[:, head + 1 :].reshape(examples, queries, self.levels + 1)
        for d in range(self.levels):
            tail[:, :, d] = np.take_along_axis(symbols[:, d], asked[:, :, d], axis=1)
        tail[:, :, self.levels] = MASK
        inputs[:, head + 1 :] = tail.reshape(examples, -1)
        answers = table[rows[:, None], *np.moveaxis(asked, 2, 0)]
        mask = np.zeros(inputs.shape, dtype=bool)
        mask[:, head + self.levels :: self.levels + 1] = True
        targets = np.zeros_like(inputs)
        targets[mask] = np.take_along_axis(values, answers, axis=1).ravel()
        batch = Batch(inputs, targets, mask)
        return Batch(inputs, targets, mask, {"conflict": mask & (self.shortcuts(batch)["marginals"] != targets)})

    def _balanced(self, cell: Cell) -> bool:
        return (self.train_tables if TRAINED in cell.axes else self.tables) == "latin"

    def _first(self, level: int) -> int:
        """First token id of a level's alphabet."""
        return FIRST + self.value_alphabet + level * self.alphabet

    def _write(self, rng: np.random.Generator, table: np.ndarray, symbols: np.ndarray, values: np.ndarray) -> np.ndarray:
        """The table in random order, [N, tokens]."""
        rows, size = table.shape[0], table.shape[1]
        orders = [random_order(rng, rows, *[size] * (d + 1)) for d in range(self.levels)]
        # Orders broadcast to the whole table: index d at each place of the nested blocks.
        index = [order.reshape(*order.shape, *[1] * (self.levels - 1 - d)) for d, order in enumerate(orders)]
        row = np.arange(rows).reshape(-1, *[1] * self.levels)
        entries = np.take_along_axis(values, table[row, *index].reshape(rows, -1), axis=1)
        tokens = np.stack([self._name(symbols, orders, self.levels - 1).reshape(rows, -1), entries], axis=2)
        for d in range(self.levels - 2, -1, -1):
            context = self._name(symbols, orders, d).reshape(rows, -1, 1)
            tokens = np.concatenate([context, tokens.reshape(rows, context.shape[1], -1)], axis=2)
        return tokens.reshape(rows, -1)

    @staticmethod
    def _name(symbols: np.ndarray, orders: list[np.ndarray], level: int) -> np.ndarray:
        """Token ids of a level's symbols in the order written."""
        flat = orders[level].reshape(len(symbols), -1)
        return np.take_along_axis(symbols[:, level], flat, axis=1)

    def _read(self, batch: Batch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Table of token ids [N, n, ..., n], the sorted symbols of each level [N, d, n] and the queries' indices [N, Q, d]."""
        rows, inputs = len(batch.inputs), batch.inputs
        head = int(np.argmax(inputs[0] == SEP))
        size = next(n for n in itertools.count(1) if 1 + self._written(n) >= head)
        blocks = inputs[:, 1:head]
        names = []
        for _ in range(self.levels - 1):
            blocks = blocks.reshape(*blocks.shape[:-1], size, -1)
            names.append(blocks[..., 0])
            blocks = blocks[..., 1:]
        names.append(blocks[..., 0::2])
        content = blocks[..., 1::2]
        symbols = np.stack([np.sort(name.reshape(rows, -1, size)[:, 0], axis=1) for name in names], axis=1)
        index = [_rank(name, symbols[:, d]) for d, name in enumerate(names)]
        index = [i.reshape(*i.shape, *[1] * (self.levels - 1 - d)) for d, i in enumerate(index)]
        table = np.zeros(content.shape, dtype=np.int64)
        table[np.arange(rows).reshape(-1, *[1] * self.levels), *index] = content
        queries = inputs[:, head + 1 :].reshape(rows, -1, self.levels + 1)
        return table, symbols, np.stack([_rank(queries[:, :, d], symbols[:, d]) for d in range(self.levels)], axis=2)

    def solve(self, batch: Batch) -> np.ndarray:
        """Looks the whole path of contexts and key up in the table; see `Task.solve`."""
        table, _, asked = self._read(batch)
        return self._place(batch, table[np.arange(len(table))[:, None], *np.moveaxis(asked, 2, 0)])

    def shortcuts(self, batch: Batch) -> dict[str, np.ndarray]:
        """The solver that multiplies the bags of values seen with all but one symbol of the path."""
        table, _, asked = self._read(batch)
        return {"marginals": self._place(batch, _marginal(table, asked))}

    @staticmethod
    def _place(batch: Batch, guesses_NQ: np.ndarray) -> np.ndarray:
        """Guesses in the order asked, put at the labelled positions."""
        out = np.zeros_like(batch.inputs)
        out[batch.mask] = guesses_NQ.ravel()
        return out

    def extra_metrics(self, cell: Cell, batch: Batch, predictions: np.ndarray) -> dict[str, float]:
        """Binding gain over the marginal solver on these very examples, and accuracy where that solver is wrong."""
        del cell
        marginal = accuracy(self.shortcuts(batch)["marginals"], batch)
        gain = binding_gain(accuracy(predictions, batch), marginal)
        return {"binding gain": gain, "conflict accuracy": accuracy(predictions, batch, "conflict")}

    def ceilings(self, cell: Cell) -> dict[str, float]:
        """Guesses over all values and over those of the table; the marginal solver, measured."""
        return {"chance": 1 / self.value_alphabet, "in-context guess": 1 / cell.axes["size"], **measured(self, cell)}

    def bits_needed(self, cell: Cell) -> float:
        """log2 of the number of tables over all choices of symbols and values, in bits.

        For three levels the tables are compositions of two Latin squares, of which the second may be relabelled together
        with the first in n! ways.
        """
        n = int(cell.axes["size"])
        subsets = self.levels * log2(comb(self.alphabet, n)) + log2(comb(self.value_alphabet, n))
        factorial = lgamma(n + 1) / log(2)
        if not self._balanced(cell):
            return subsets + n**self.levels * log2(n)
        return subsets + (factorial if self.levels == 1 else (self.levels - 1) * log2_squares(n) - (self.levels - 2) * factorial)


def _rank(tokens: np.ndarray, symbols_NS: np.ndarray) -> np.ndarray:
    """Place of each token among its row's sorted symbols; 0 for foreign tokens."""
    flat = tokens.reshape(len(tokens), -1)
    return (flat[:, :, None] == symbols_NS[:, None, :]).argmax(axis=2).reshape(tokens.shape)


def _marginal(table: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """The likeliest entry given the bag of values along each axis through it, over the bag of the table, [N, Q]."""
    rows = np.arange(len(table))[:, None]
    values = np.unique(table)
    log_score = np.zeros((*asked.shape[:2], values.size))
    for v, value in enumerate(values):
        hit = (table == value).astype(np.float64)
        for d in range(asked.shape[2]):
            rest = np.delete(asked, d, axis=2)
            counts = hit.sum(axis=1 + d)[rows, *np.moveaxis(rest, 2, 0)]
            log_score[:, :, v] += np.log(counts + 1e-9)
        overall = hit.reshape(len(table), -1).mean(axis=1)[:, None]
        log_score[:, :, v] -= (asked.shape[2] - 1) * np.log(overall + 1e-9)
    return values[log_score.argmax(axis=2)]
