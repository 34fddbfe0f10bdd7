"""MAD memorisation: a fixed dictionary held in the weights (Poli et al. 2024, athms/mad-lab).

Shape legend: N examples, T length, K keys, V values.
"""

from __future__ import annotations

import itertools
from math import log2
from typing import Literal

import numpy as np

from synthetic_tasks._base import Batch, Cell, stream, task
from synthetic_tasks._cells import parse_splits
from synthetic_tasks._mad import MADTask


@task("mad_memorization", suite="mad")
class MADMemorization(MADTask):
    """Memorisation with the published sizes: vocabulary 256, length 32, 256 training examples.

    A sequence is random keys, each followed by the insert token, which is labelled with the key's value. Values are never
    shown: the map is one and the same for all sequences and splits, so the test asks what was learned, not what is in context.

    Args:
        train_cells: cells of the training split, length : examples.
        valid_cells: the same for the validation split, which otherwise has the cells of the test split.
        test_cells: the same for the test split; by default with a length beyond the trained one.
        vocab_size: number of token ids: keys, values and, last, the insert token.
        map_seed: which dictionary; a stream of its own.
        compat: "mad" makes the map one to one, as published; "none" draws each value independently, so that no key tells
            anything about another.
    """

    def __init__(
        self,
        *,
        train_cells: str = "32:256",
        valid_cells: str = "",
        test_cells: str = "32:1280+64:320",
        vocab_size: int = 256,
        map_seed: int = 0,
        compat: Literal["none", "mad"] = "none",
    ) -> None:
        self.vocab_size = vocab_size
        self.keys = (vocab_size - 1) // 2
        self.values = vocab_size - 1 - self.keys
        self._cells = parse_splits(("length",), train=train_cells, valid=valid_cells, test=test_cells)
        if self.keys < 2:
            raise ValueError(f"vocab_size={vocab_size} leaves {self.keys} keys; use at least 5")
        for cell in itertools.chain(*self._cells.values()):
            if cell.length % 2:
                raise ValueError(f"length {cell.length} must be even, a key and the insert token each")
        rng = stream(map_seed, "dictionary")
        drawn = rng.permutation(self.values)[: self.keys] if compat == "mad" else rng.integers(0, self.values, size=self.keys)
        self.dictionary = (self.keys + drawn).astype(np.int32)

    def cells(self, split: str) -> tuple[Cell, ...]:
        """See `Task.cells`."""
        return self._cells[split]

    def sample(self, cell: Cell, examples: int, rng: np.random.Generator) -> Batch:
        """See `Task.sample`."""
        key = rng.integers(0, self.keys, size=(examples, cell.length // 2), dtype=np.int32)
        inputs = np.full((examples, cell.length), self.vocab_size - 1, dtype=np.int32)
        inputs[:, 0::2] = key
        targets = np.zeros_like(inputs)
        targets[:, 1::2] = self.dictionary[key]
        return Batch(inputs, targets, inputs == self.vocab_size - 1)

    def solve(self, batch: Batch) -> np.ndarray:
        """Knows the dictionary; see `Task.solve`."""
        out = np.zeros_like(batch.inputs)
        out[:, 1::2] = self.dictionary[np.minimum(batch.inputs[:, 0::2], self.keys - 1)]
        return out

    def ceilings(self, cell: Cell) -> dict[str, float]:
        """A guess over all values."""
        del cell
        return {"chance": 1 / self.values}

    def bits_needed(self, cell: Cell) -> float:
        """log2 of the number of keys: the state holds one key; the dictionary is in the weights."""
        del cell
        return log2(self.keys)
