"""Word problem of a finite group: the running product of group elements, at every position or at the last one.

Source: "The Illusion of State in State-Space Models" (Merrill et al. 2024): Z60, A4xZ5 and A5 have 60 elements each and are
commutative, solvable and not solvable. The state needs log2 of the order in bits whichever it is; what differs is the algebra.
Words of swaps only (Grazzi et al. 2024) generate all of a symmetric group, though each token is a single reflection.
Shape legend: N examples, T length, G elements, A elements that occur as tokens.
"""

from __future__ import annotations

from math import log2
from typing import Literal

import numpy as np

from synthetic_tasks._base import Batch, Cell, Task, task
from synthetic_tasks._cells import parse_splits
from synthetic_tasks._groups import commutators, group_table, moved_points


@task("group_word", suite="state_tracking")
class GroupWord(Task):
    """Prefix products in a group.

    Args:
        train_cells: cells of the training split, length : examples.
        valid_cells: the same for the validation split, which otherwise has the cells of the test split.
        test_cells: the same for the test split; by default beyond the trained length.
        group: e.g. S3, S5, A5, A4xZ5, Z60 or, as the commutative control of equal order, Z6, Z120.
        labels: "every" position is labelled, or the "last" only.
        moved: most points that a token permutes, in S and A groups: 2 leaves swaps and the identity, 3 adds three-cycles; 0 for
            no limit.
    """

    def __init__(
        self,
        *,
        train_cells: str = "32:24000",
        valid_cells: str = "",
        test_cells: str = "32:500+64:500+128:500",
        group: str = "S3",
        labels: Literal["every", "last"] = "every",
        moved: int = 0,
    ) -> None:
        self.table = group_table(group)
        self.vocab_size, self.group, self.labels = len(self.table), group, labels
        self.tokens = np.arange(self.vocab_size) if moved == 0 else np.flatnonzero(moved_points(group) <= moved)
        self._cells = parse_splits(("length",), train=train_cells, valid=valid_cells, test=test_cells)
        if self.vocab_size < 2:
            raise ValueError(f"{group} has one element only, so there is nothing to predict; use S3 or larger")
        if self.tokens.size < 2:
            raise ValueError(
                f"moved={moved} leaves the identity of {group} as the only token; use {3 if group[0] == 'A' else 2} or more, or 0"
            )

    def cells(self, split: str) -> tuple[Cell, ...]:
        """See `Task.cells`."""
        return self._cells[split]

    def sample(self, cell: Cell, examples: int, rng: np.random.Generator) -> Batch:
        """See `Task.sample`."""
        drawn = rng.integers(0, self.tokens.size, size=(examples, cell.length), dtype=np.int32)
        inputs = self.tokens.astype(np.int32)[drawn]
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
        """The best constant guess at each position, and the best one given the exact value in the commutative quotient.

        The quotient by the commutator subgroup ignores the order of the factors: it gives everything for Z60, the sign for S5
        and nothing for A5.
        """
        members = commutators(self.table)
        coset_G = self.table[:, members].min(axis=1)
        law_G = np.zeros(self.vocab_size)
        law_G[0] = 1.0
        chance, ignored = [], []
        for _ in range(cell.length):
            law_G = np.bincount(self.table[self.tokens].ravel(), np.tile(law_G, self.tokens.size)) / self.tokens.size
            chance.append(law_G.max())
            ignored.append(sum(law_G[coset_G == coset].max() for coset in np.unique(coset_G)))
        places = slice(-1, None) if self.labels == "last" else slice(None)
        return {"chance": float(np.mean(chance[places])), "order ignored": min(1.0, float(np.mean(ignored[places])))}

    def bits_needed(self, cell: Cell) -> float:
        """log2 of the order of the group."""
        del cell
        return log2(self.vocab_size)
