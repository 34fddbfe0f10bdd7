"""The generator behind MAD's in-context recall and noisy recall: repeated pairs of a fixed map, some replaced by noise.

Source: MAD (Poli et al. 2024, athms/mad-lab). Shape legend: N examples, T length, P = T / 2 pairs, K keys, V values.
"""

from __future__ import annotations

import itertools
from math import log2

import numpy as np

from synthetic_tasks._base import Batch, Cell
from synthetic_tasks._mad import MADTask, next_tokens, seen_before, with_full_loss
from synthetic_tasks._metrics import measured


class MADRecall(MADTask):
    """Pairs `k v` drawn with replacement from a map that is random in each sequence; repeats are labelled.

    Ids: keys, then values, then noise.
    """

    noise_ids: int = 0
    noise: float = 0.0
    full_loss: bool = False

    def _prepare(self, vocab_size: int, cells: dict[str, tuple[Cell, ...]]) -> None:
        """Checks options and cells; called at the end of `__init__`."""
        self.vocab_size = vocab_size
        symbols = vocab_size - self.noise_ids
        if symbols < 2:
            raise ValueError(
                f"vocab_size={vocab_size} with {self.noise_ids} noise ids leaves {symbols} keys and values; use at "
                f"least {self.noise_ids + 2}"
            )
        self.keys = symbols // 2
        self.values = symbols - self.keys
        self._cells = with_full_loss(cells) if self.full_loss else cells
        for cell in itertools.chain(*cells.values()):
            if cell.length % 2 or cell.length < 4:
                raise ValueError(f"length {cell.length} must be even and at least 4, two pairs of two tokens")

    def cells(self, split: str) -> tuple[Cell, ...]:
        """See `Task.cells`."""
        return self._cells[split]

    def sample(self, cell: Cell, examples: int, rng: np.random.Generator) -> Batch:
        """See `Task.sample`."""
        pairs = cell.length // 2
        key = rng.integers(0, self.keys, size=(examples, pairs))
        value = self.keys + rng.integers(0, self.values, size=(examples, self.keys))
        noisy = rng.random((examples, pairs)) < self.noise
        noisy[np.arange(examples), rng.integers(0, pairs - 1, size=examples)] = False
        noisy[:, -1] = False
        # The last pair probes one of the keys presented, each as likely as any other.
        shown = np.zeros((examples, self.keys), dtype=bool)
        row, at = np.nonzero(~noisy[:, :-1])
        shown[row, key[row, at]] = True
        key[:, -1] = np.where(shown, rng.random(shown.shape), -1.0).argmax(axis=1)
        inputs = np.empty((examples, cell.length), dtype=np.int32)
        inputs[:, 0::2] = key
        inputs[:, 1::2] = np.take_along_axis(value, key, axis=1)
        if self.noise:
            noise = rng.integers(self.keys + self.values, self.vocab_size, size=inputs.shape, dtype=np.int32)
            inputs = np.where(np.repeat(noisy, 2, axis=1), noise, inputs)
        answers = np.zeros(inputs.shape, dtype=bool)
        answers[:, 0::2] = ~noisy & (seen_before(key, ~noisy) < np.arange(pairs))
        return next_tokens(inputs, answers, cell)

    def solve(self, batch: Batch) -> np.ndarray:
        """Emits the value seen with the key before; see `Task.solve`."""
        out = np.zeros_like(batch.inputs)
        rows = np.arange(len(out))
        table = np.zeros((len(out), self.vocab_size), dtype=np.int32)
        for t in range(0, batch.inputs.shape[1], 2):
            out[:, t] = table[rows, batch.inputs[:, t]]
            table[rows, batch.inputs[:, t]] = batch.inputs[:, t + 1]
        return out

    def shortcuts(self, batch: Batch) -> dict[str, np.ndarray]:
        """The commonest value of the sequence so far, everywhere."""
        is_value = (batch.inputs >= self.keys) & (batch.inputs < self.keys + self.values)
        onehot = np.eye(self.values, dtype=np.int32)[np.where(is_value, batch.inputs - self.keys, 0)] * is_value[..., None]
        return {"commonest value": (self.keys + np.cumsum(onehot, axis=1).argmax(axis=2)).astype(np.int32)}

    def ceilings(self, cell: Cell) -> dict[str, float]:
        """A guess over all values; the commonest value so far, measured on answers only."""
        plain = Cell(cell.name, cell.length, cell.examples, {k: v for k, v in cell.axes.items() if k != "full_loss"})
        return {"chance": 1 / self.values, **measured(self, plain)}

    def bits_needed(self, cell: Cell) -> float:
        """K log2 V, the whole map; fewer where the sequence is too short to show every key."""
        return min(self.keys, cell.length // 2) * log2(self.values)
