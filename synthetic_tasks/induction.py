"""Induction: find where the current token stood before and emit the token that followed it there.

The published task (safari; Mamba, section 4.1.2) has one fixed trigger, which a latch of a few bits solves. Here the cues are
random tokens of the sequence, so that every bigram must be kept. Shape legend: N examples, T length, c cues.
"""

from __future__ import annotations

import itertools
from math import comb, log2
from typing import Literal

import numpy as np

from synthetic_tasks._base import Batch, Cell, Task, task
from synthetic_tasks._cells import parse_splits
from synthetic_tasks._draws import distinct, outside
from synthetic_tasks._metrics import measured


@task("induction", suite="recall")
class Induction(Task):
    """Induction with random cues.

    A body of T - c random tokens holds c cue tokens, each once, at random places; the last c tokens are the cues in random
    order, each labelled with the token that followed it in the body. Which tokens are cues differs from sequence to sequence
    and shows only when they are asked.

    Args:
        train_cells: cells of the training split, length x cues : examples.
        valid_cells: the same for the validation split, which otherwise has the cells of the test split.
        test_cells: the same for the test split.
        vocab_size: number of token ids.
        cue: "random", or "fixed" for the published latch: the one cue is always the last id, and cells have one cue.
    """

    def __init__(
        self,
        *,
        train_cells: str = "",
        valid_cells: str = "",
        test_cells: str = "",
        vocab_size: int = 64,
        cue: Literal["random", "fixed"] = "random",
    ) -> None:
        self.vocab_size, self.cue = vocab_size, cue
        fixed = cue == "fixed"
        self._cells = parse_splits(
            ("length", "cues"),
            train=train_cells or ("64x1:24000" if fixed else "64x4:12000+64x8:12000"),
            valid=valid_cells,
            test=test_cells or ("64x1:500+128x1:500+256x1:500" if fixed else "64x4:500+64x8:500+128x8:500+128x16:500"),
        )
        for cell in itertools.chain(*self._cells.values()):
            self._check(cell)

    def _check(self, cell: Cell) -> None:
        """Refuses cells whose cues fit neither length nor vocabulary."""
        cues, allowed = int(cell.axes["cues"]), 1 if self.cue == "fixed" else self.vocab_size - 1
        if cues > allowed:
            raise ValueError(
                f"{cues} cues in cell {cell.name}, but at most {allowed} are allowed with cue={self.cue} and "
                f"vocab_size={self.vocab_size}, because the rest of the body needs a token of its own"
            )
        if 2 * cues + 1 > cell.length:
            raise ValueError(
                f"{cues} cues need a length of at least {2 * cues + 1} (each stands in the body and is asked, and the "
                f"last needs a follower) but it is {cell.length}; use at most {(cell.length - 1) // 2} cues"
            )

    def cells(self, split: str) -> tuple[Cell, ...]:
        """See `Task.cells`."""
        return self._cells[split]

    def sample(self, cell: Cell, examples: int, rng: np.random.Generator) -> Batch:
        """See `Task.sample`."""
        cues = int(cell.axes["cues"])
        body = cell.length - cues
        if self.cue == "fixed":
            tokens = np.full((examples, 1), self.vocab_size - 1)
        else:
            tokens = distinct(rng, examples, cues, self.vocab_size)
        places = distinct(rng, examples, cues, body - 1)
        inputs = np.empty((examples, cell.length), dtype=np.int32)
        inputs[:, :body] = outside(rng, body, self.vocab_size, tokens)
        np.put_along_axis(inputs, places, tokens.astype(np.int32), axis=1)
        inputs[:, body:] = tokens
        targets = np.zeros_like(inputs)
        targets[:, body:] = np.take_along_axis(inputs, places + 1, axis=1)
        mask = np.zeros(inputs.shape, dtype=bool)
        mask[:, body:] = True
        return Batch(inputs, targets, mask)

    def solve(self, batch: Batch) -> np.ndarray:
        """Emits the follower of each token's last occurrence in the body; see `Task.solve`."""
        rows = np.arange(len(batch.inputs))
        follower = np.zeros((rows.size, self.vocab_size), dtype=np.int32)
        for t in range(batch.inputs.shape[1] - int(batch.mask[0].sum()) - 1):
            follower[rows, batch.inputs[:, t]] = batch.inputs[:, t + 1]
        return np.take_along_axis(follower, batch.inputs, axis=1)

    def shortcuts(self, batch: Batch) -> dict[str, np.ndarray]:
        """The commonest token of the body, everywhere."""
        rows, body = len(batch.inputs), batch.inputs.shape[1] - int(batch.mask[0].sum())
        flat = batch.inputs[:, :body] + np.arange(rows)[:, None] * self.vocab_size
        counts = np.bincount(flat.ravel(), minlength=rows * self.vocab_size).reshape(rows, -1)
        commonest = counts.argmax(axis=1)[:, None]
        return {"commonest token": np.broadcast_to(commonest, batch.inputs.shape).astype(np.int32)}

    def ceilings(self, cell: Cell) -> dict[str, float]:
        """A guess over all tokens; the commonest token of the body, measured."""
        return {"chance": 1 / self._followers(), **measured(self, cell)}

    def _followers(self) -> int:
        """Number of tokens that may follow a cue."""
        return self.vocab_size - 1 if self.cue == "fixed" else self.vocab_size

    def bits_needed(self, cell: Cell) -> float:
        """Entropy of the followers of the cues and of which tokens are cues, in bits; a lower bound.

        A state that cannot know yet which tokens will be asked must keep more: up to one follower for each token.
        """
        cues = int(cell.axes["cues"])
        which = 0.0 if self.cue == "fixed" else log2(comb(self.vocab_size, cues))
        return cues * log2(self._followers()) + which
