"""Multi-hop associative recall: the value of a key is another key, and a query asks for the key h hops on.

Our difficulty axis on MQAR (Zoology, Arora et al. 2023): a lookup must feed the next, which takes depth.
Shape legend: N examples, T length, n pairs, h hops, Q queries.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from math import comb, lgamma, log, log2

import numpy as np

from synthetic_tasks._base import Batch, Cell, Task, task
from synthetic_tasks._cells import parse_splits
from synthetic_tasks._draws import distinct
from synthetic_tasks._joint import random_order

SEP, FIRST = 1, 16


def _length(axes: Mapping[str, int]) -> int:
    """Two tokens a pair, the separator, and two a query, of which there are as many as pairs."""
    return 4 * axes["pairs"] + 1


@task("mqar_multihop", suite="recall")
class MQARMultihop(Task):
    """Recall along chains.

    n keys form one random cycle, whose n links `k k'` are written in random order. After the separator each key is asked once,
    in random order, as the token of the number of hops followed by the key; the label at the key is the key h links on. In a
    cycle longer than h every other key is equally likely.

    Args:
        train_cells: cells of the training split, pairs x hops : examples.
        valid_cells: the same for the validation split, which otherwise has the cells of the test split.
        test_cells: the same for the test split.
        vocab_size: number of token ids; the first 16 are reserved for the separator and the hop counts.
    """

    def __init__(
        self,
        *,
        train_cells: str = "8x1:8000+8x2:8000+8x3:8000",
        valid_cells: str = "",
        test_cells: str = "8x1:500+8x2:500+8x3:500+8x4:500+16x1:500+16x2:500",
        vocab_size: int = 128,
    ) -> None:
        self.vocab_size = vocab_size
        self._cells = parse_splits(("pairs", "hops"), train=train_cells, valid=valid_cells, test=test_cells, length=_length)
        for cell in itertools.chain(*self._cells.values()):
            pairs, hops = int(cell.axes["pairs"]), int(cell.axes["hops"])
            if hops >= pairs or hops > FIRST - SEP - 1:
                raise ValueError(
                    f"{hops} hops in cell {cell.name} must be fewer than its {pairs} pairs and at most "
                    f"{FIRST - SEP - 1}; use more pairs or fewer hops"
                )
            if pairs > vocab_size - FIRST:
                raise ValueError(
                    f"{pairs} pairs need as many keys, but vocab_size={vocab_size} leaves {vocab_size - FIRST}; "
                    f"use at most {max(vocab_size - FIRST, 0)} pairs or vocab_size={pairs + FIRST}"
                )

    def cells(self, split: str) -> tuple[Cell, ...]:
        """See `Task.cells`."""
        return self._cells[split]

    def sample(self, cell: Cell, examples: int, rng: np.random.Generator) -> Batch:
        """See `Task.sample`; lure "one hop" is the answer to a single lookup."""
        pairs, hops = int(cell.axes["pairs"]), int(cell.axes["hops"])
        cycle = FIRST + distinct(rng, examples, pairs, self.vocab_size - FIRST)
        written, asked = random_order(rng, examples, pairs), random_order(rng, examples, pairs)

        def at(index: np.ndarray) -> np.ndarray:
            return np.take_along_axis(cycle, index % pairs, axis=1)

        head = 2 * pairs
        inputs = np.empty((examples, cell.length), dtype=np.int32)
        inputs[:, 0:head:2], inputs[:, 1:head:2] = at(written), at(written + 1)
        inputs[:, head] = SEP
        inputs[:, head + 1 :: 2], inputs[:, head + 2 :: 2] = SEP + hops, at(asked)
        mask = np.zeros(inputs.shape, dtype=bool)
        mask[:, head + 2 :: 2] = True
        targets = np.zeros_like(inputs)
        targets[:, head + 2 :: 2] = at(asked + hops)
        lures = {}
        if hops > 1:
            lures["one hop"] = np.full_like(inputs, -1)
            lures["one hop"][:, head + 2 :: 2] = at(asked + 1)
        return Batch(inputs, targets, mask, lures=lures)

    def solve(self, batch: Batch) -> np.ndarray:
        """Follows the links h times; see `Task.solve`."""
        inputs = batch.inputs
        head = 2 * int(batch.mask[0].sum())
        link = np.zeros((len(inputs), self.vocab_size), dtype=np.int32)
        np.put_along_axis(link, inputs[:, 0:head:2], inputs[:, 1:head:2], axis=1)
        found = inputs
        for _ in range(int(inputs[0, head + 1]) - SEP):
            found = np.take_along_axis(link, found, axis=1)
        return found

    def ceilings(self, cell: Cell) -> dict[str, float]:
        """Guesses over all keys, and over the keys of the context other than the one asked."""
        return {"chance": 1 / (self.vocab_size - FIRST), "in-context guess": 1 / (cell.axes["pairs"] - 1)}

    def bits_needed(self, cell: Cell) -> float:
        """Entropy of the key set plus that of the cycle, log2 C(K, n) + log2 (n - 1)!, in bits."""
        pairs = int(cell.axes["pairs"])
        return log2(comb(self.vocab_size - FIRST, pairs)) + lgamma(pairs) / log(2)
