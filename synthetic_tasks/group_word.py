"""Word problem of a finite group: the running product of group elements, at every position or at the last one.

Source: "The Illusion of State in State-Space Models" (Merrill et al. 2024): Z60, A4xZ5 and A5 have 60 elements each and are
commutative, solvable and not solvable. The state needs log2 of the order in bits whichever it is; what differs is the algebra.
Shape legend: N examples, T length, G elements.
"""

from __future__ import annotations

from math import log2
from typing import Literal

import numpy as np

from synthetic_tasks._base import Batch, Cell, Task, task
from synthetic_tasks._cells import parse_splits
from synthetic_tasks._groups import commutator_order, group_table


@task("group_word", suite="state_tracking")
class GroupWord(Task):
    """Prefix products in a group.

    Args:
        train_cells: cells of the training split, length : examples.
        valid_cells: the same for the validation split, which otherwise has the cells of the test split.
        test_cells: the same for the test split; by default beyond the trained length.
        group: e.g. S3, S5, A5, A4xZ5, Z60 or, as the commutative control of equal order, Z6, Z120.
        labels: "every" position is labelled, or the "last" only.
    """

    def __init__(
        self,
        *,
        train_cells: str = "32:24000",
        valid_cells: str = "",
        test_cells: str = "32:500+64:500+128:500",
        group: str = "S3",
        labels: Literal["every", "last"] = "every",
    ) -> None:
        self.table = group_table(group)
        self.vocab_size, self.group, self.labels = len(self.table), group, labels
        self._cells = parse_splits(("length",), train=train_cells, valid=valid_cells, test=test_cells)
        if self.vocab_size < 2:
            raise ValueError(f"{group} has one element only, so there is nothing to predict; use S3 or larger")

    def cells(self, split: str) -> tuple[Cell, ...]:
        """See `Task.cells`."""
        return self._cells[split]

    def sample(self, cell: Cell, examples: int, rng: np.random.Generator) -> Batch:
        """See `Task.sample`."""
        inputs = rng.integers(0, self.vocab_size, size=(examples, cell.length), dtype=np.int32)
        mask = np.ones(inputs.shape, dtype=bool)
        if self.labels == "last":
            mask[:, :-1] = False
        return Batch(inputs, self._products(inputs), mask)

    def _products(self, inputs: np.ndarray) -> np.ndarray:
        """Running products x_t ... x_1."""
        out = np.empty_like(inputs)
        state = np.zeros(len(inputs), dtype=np.int64)
        for t in range(inputs.shape[1]):
            state = self.table[inputs[:, t], state]
            out[:, t] = state
        return out

    def solve(self, batch: Batch) -> np.ndarray:
        """Multiplies; see `Task.solve`."""
        return self._products(batch.inputs)

    def ceilings(self, cell: Cell) -> dict[str, float]:
        """A guess over all elements; one over those that remain when only the commutative quotient is tracked.

        The quotient by the commutator subgroup ignores the order of the factors: it gives everything for Z60, the sign for S5
        and nothing for A5.
        """
        del cell
        return {"chance": 1 / self.vocab_size, "order ignored": 1 / commutator_order(self.table)}

    def bits_needed(self, cell: Cell) -> float:
        """log2 of the order of the group."""
        del cell
        return log2(self.vocab_size)
