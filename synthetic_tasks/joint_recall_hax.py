"""Joint recall as published with HAX: the value of a key in a context, answers left visible.

Source: "Overcoming Long-Context Limitations of State-Space Models via Context-Dependent Sparse Attention" (HAX), its
released data set. Kept for reproduction: a solver that never binds context with key scores 81 % over the published grid,
because answers stay visible and each is asked exactly once. `joint_recall` is the repaired task.
Shape legend: N examples, T length, n_c contexts, n_k keys.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Literal

import numpy as np

from synthetic_tasks._base import Batch, Cell, Task, task
from synthetic_tasks._cells import parse_splits
from synthetic_tasks._joint import marginal_solver, random_order
from synthetic_tasks._metrics import accuracy, binding_gain, measured

BOS, PAD, SEP, VALUES, KEYS, CONTEXTS, SIZE = 1, 3, 4, 10, 26, 42, 16
PADDED = 32 * 33 + 2
SHORTCUTS: dict[str, tuple[Literal["all", "key", "both"], bool]] = {
    "bag": ("all", False),
    "bag, elimination": ("all", True),
    "one marginal": ("key", False),
    "one marginal, elimination": ("key", True),
    "both marginals": ("both", False),
    "both marginals, elimination": ("both", True),
}


def _grid(examples: int) -> str:
    """The published 144 cells."""
    return "+".join(f"{c}x{k}:{examples}" for c, k in itertools.product(range(5, 17), repeat=2))


def _length(axes: Mapping[str, int]) -> int:
    """Tokens of a sequence without padding."""
    return 2 + 2 * axes["contexts"] * (1 + 2 * axes["keys"])


@task("joint_recall_hax", suite="recall")
class JointRecallHAX(Task):
    """Joint recall with the published ids, order, labels and grid.

    A table of n_c contexts by n_k keys holds values drawn independently from 16. The stream is bos, the table written
    context by context in random order (context token, then its key value pairs in random order), sep, and the same table
    in fresh random orders. Labels stand at the key tokens of the second half; the value follows as input.

    Args:
        protocol: "published" has 144 cells, contexts and keys from 5 to 16, 10,000 training examples each; "small" a few
            cells for a two-layer model, with more contexts and keys in the test than in training.
        train_cells: overrides the cells of the training split, contexts x keys : examples.
        valid_cells: the same for the validation split, which otherwise has the cells of the test split.
        test_cells: the same for the test split.
        pad: whether sequences are padded to the published 1058 tokens.
    """

    def __init__(
        self,
        *,
        protocol: Literal["published", "small"] = "small",
        train_cells: str = "",
        valid_cells: str = "",
        test_cells: str = "",
        pad: bool = False,
    ) -> None:
        self.vocab_size, self.pad = 100, pad
        published = protocol == "published"
        self._cells = parse_splits(
            ("contexts", "keys"),
            train=train_cells or (_grid(10_000) if published else "2x2:8000+4x4:8000+5x5:8000"),
            valid=valid_cells,
            test=test_cells or (_grid(100) if published else "2x2:400+4x4:400+5x5:400+8x8:400"),
            length=(lambda _: PADDED) if pad else _length,
        )
        for cell in itertools.chain(*self._cells.values()):
            largest = max(cell.axes["contexts"], cell.axes["keys"])
            if largest > SIZE:
                raise ValueError(
                    f"cell {cell.name} needs {largest:g} symbols of a kind, but the published alphabet has "
                    f"{SIZE} contexts and {SIZE} keys; use at most {SIZE}, or the task joint_recall"
                )

    def cells(self, split: str) -> tuple[Cell, ...]:
        """See `Task.cells`."""
        return self._cells[split]

    def sample(self, cell: Cell, examples: int, rng: np.random.Generator) -> Batch:
        """See `Task.sample`; group "conflict" holds the labels that the marginal solver gets wrong."""
        contexts, keys = int(cell.axes["contexts"]), int(cell.axes["keys"])
        table = rng.integers(0, SIZE, size=(examples, contexts, keys))
        first, _ = self._write(rng, table)
        second, key_at = self._write(rng, table)
        column = np.full((examples, 1), BOS), np.full((examples, 1), SEP)
        stream = np.concatenate([column[0], first, column[1], second], axis=1)
        inputs = np.full((examples, cell.length), PAD, dtype=np.int32)
        inputs[:, : stream.shape[1]] = stream
        mask = np.zeros(inputs.shape, dtype=bool)
        mask[:, first.shape[1] + 2 + key_at] = True
        targets = np.zeros_like(inputs)
        targets[:, :-1] = np.where(mask[:, :-1], inputs[:, 1:], 0)
        batch = Batch(inputs, targets, mask)
        marginal = self._shortcut(batch, *SHORTCUTS["both marginals, elimination"])
        return Batch(inputs, targets, mask, {"conflict": mask & (marginal != targets)})

    @staticmethod
    def _write(rng: np.random.Generator, table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The table in fresh random order as tokens [N, n_c (1 + 2 n_k)], and the places of its keys."""
        rows, contexts, keys = table.shape
        context = random_order(rng, rows, contexts)
        key = random_order(rng, rows, contexts, keys)
        value = table[np.arange(rows)[:, None, None], context[:, :, None], key]
        blocks = np.empty((rows, contexts, 1 + 2 * keys), dtype=np.int32)
        blocks[:, :, 0], blocks[:, :, 1::2], blocks[:, :, 2::2] = CONTEXTS + context, KEYS + key, VALUES + value
        starts = np.arange(contexts)[:, None] * (1 + 2 * keys)
        return blocks.reshape(rows, -1), (starts + np.arange(1, 2 * keys, 2)).ravel()

    @staticmethod
    def _read(batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        """The table as written before sep [N, 16, 16] (0 where absent), and context and key of each label [N, Q, 2]."""
        inputs = batch.inputs
        is_context = inputs >= CONTEXTS
        last = np.maximum.accumulate(np.where(is_context, np.arange(inputs.shape[1]), 0), axis=1)
        context = np.take_along_axis(inputs, last, axis=1) - CONTEXTS
        is_key = (inputs >= KEYS) & ~is_context
        row, at = np.nonzero(is_key & (np.cumsum(inputs == SEP, axis=1) == 0))
        table = np.zeros((len(inputs), SIZE, SIZE), dtype=np.int64)
        table[row, context[row, at], inputs[row, at] - KEYS] = inputs[row, at + 1] - VALUES
        row, at = np.nonzero(batch.mask)
        pairs = np.stack([context[row, at], np.clip(inputs[row, at] - KEYS, 0, SIZE - 1)], axis=1)
        return table, pairs.reshape(len(inputs), -1, 2)

    def solve(self, batch: Batch) -> np.ndarray:
        """Looks context and key up in the first half; see `Task.solve`."""
        table, asked = self._read(batch)
        return self._place(batch, table[np.arange(len(table))[:, None], asked[..., 0], asked[..., 1]])

    def _shortcut(self, batch: Batch, bags: Literal["all", "key", "both"], eliminate: bool) -> np.ndarray:
        """A marginal solver's predictions [N, T]."""
        table, asked = self._read(batch)
        contexts, keys = asked[0].max(axis=0) + 1
        used = table[:, :contexts, :keys]
        return self._place(batch, marginal_solver(used, asked, SIZE, bags=bags, eliminate=eliminate))

    @staticmethod
    def _place(batch: Batch, guesses_NQ: np.ndarray) -> np.ndarray:
        """Guesses in the order asked, put at the labelled positions."""
        out = np.zeros_like(batch.inputs)
        out[batch.mask] = VALUES + guesses_NQ.ravel()
        return out

    def shortcuts(self, batch: Batch) -> dict[str, np.ndarray]:
        """Six solvers that never bind context with key."""
        return {name: self._shortcut(batch, *how) for name, how in SHORTCUTS.items()}

    def extra_metrics(self, cell: Cell, batch: Batch, predictions: np.ndarray) -> dict[str, float]:
        """Binding gain over the marginal solver on these very examples, and accuracy where that solver is wrong.

        Cells of which that solver leaves less than a tenth have no gain: dividing by so little says nothing.
        """
        del cell
        marginal = accuracy(self.shortcuts(batch)["both marginals, elimination"], batch)
        gain = binding_gain(accuracy(predictions, batch), marginal) if marginal <= 0.9 else float("nan")
        return {"binding gain": gain, "conflict accuracy": accuracy(predictions, batch, "conflict")}

    def ceilings(self, cell: Cell) -> dict[str, float]:
        """A guess over all values, and the solvers of `shortcuts`, measured."""
        return {"chance": 1 / SIZE, **measured(self, cell, 64)}

    def bits_needed(self, cell: Cell) -> float:
        """Four bits a table entry."""
        return 4 * cell.axes["contexts"] * cell.axes["keys"]
