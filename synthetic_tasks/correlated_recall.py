"""Recall with correlated keys: where adding outer products fails and correcting errors does not.

Keys are real vectors with a common part. A linear-attention memory (the sum of value key^T) mixes values up in proportion to the
keys' overlap, however often the pairs are shown. The delta rule writes only what the memory does not predict yet: over several
passes it converges to least squares (it is Kaczmarz' method), which separates up to d keys exactly; in a single pass over
strongly correlated keys it forgets, and is no better than adding. Source of the comparison: test-time regression (Wang et al.
2025). Shape legend: N examples, T length, n pairs, p passes, d key dimensions, V values.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from math import log2

import numpy as np

from synthetic_tasks._base import Batch, Cell, Task, task
from synthetic_tasks._cells import parse_splits
from synthetic_tasks._joint import random_order
from synthetic_tasks._metrics import measured


@task("correlated_recall", suite="recall")
class CorrelatedRecall(Task):
    """Recall of discrete values by real keys of given correlation.

    Frames are features: key (d), one-hot value (V, zero in queries), and one entry that marks queries. n pairs come first, p
    times in fresh random orders, then each key once more, labelled with its value. Keys are unit vectors along
    sqrt(c) m + sqrt(1 - c) z, with m a random direction of the sequence and z random directions, so that two keys have cosine c
    in the mean.

    Args:
        train_cells: cells of the training split, pairs x correlation in percent x passes : examples.
        valid_cells: the same for the validation split, which otherwise has the cells of the test split.
        test_cells: the same for the test split; by default with pairs and correlations beyond the trained ones.
        key_dim: d.
        values: V; values are drawn independently, so keys may share one.
    """

    input_kind = "features"

    def __init__(
        self,
        *,
        train_cells: str = "4x1x1:4000+8x1x4:4000+8x50x4:8000+8x75x4:8000",
        valid_cells: str = "",
        test_cells: str = "8x1x4:500+8x50x1:500+8x50x4:500+8x50x16:500+8x75x16:500+12x50x8:500",
        key_dim: int = 16,
        values: int = 16,
    ) -> None:
        self.key_dim, self.vocab_size = key_dim, values
        self.feature_dim = key_dim + values + 1
        self._cells = parse_splits(
            ("pairs", "percent", "passes"), train=train_cells, valid=valid_cells, test=test_cells, length=_length
        )
        if key_dim < 2 or values < 2:
            raise ValueError(f"key_dim={key_dim} and values={values} must both be at least 2")
        for cell in itertools.chain(*self._cells.values()):
            if cell.axes["percent"] >= 100 or cell.axes["pairs"] > key_dim:
                raise ValueError(
                    f"cell {cell.name} needs a correlation below 100 percent and at most key_dim={key_dim} "
                    "pairs, beyond which no linear memory can hold them apart; use fewer pairs or a larger key_dim"
                )

    def cells(self, split: str) -> tuple[Cell, ...]:
        """See `Task.cells`."""
        return self._cells[split]

    def sample(self, cell: Cell, examples: int, rng: np.random.Generator) -> Batch:
        """See `Task.sample`."""
        pairs, share = int(cell.axes["pairs"]), cell.axes["percent"] / 100
        common = _unit(rng.standard_normal((examples, 1, self.key_dim)))
        own = _unit(rng.standard_normal((examples, pairs, self.key_dim)))
        key = _unit(np.sqrt(share) * common + np.sqrt(1 - share) * own)
        value = rng.integers(0, self.vocab_size, size=(examples, pairs))
        asked = random_order(rng, examples, pairs)
        head = cell.length - pairs
        written = random_order(rng, examples, head // pairs, pairs).reshape(examples, head)
        rows = np.arange(examples)[:, None]
        features = np.zeros((examples, cell.length, self.feature_dim), dtype=np.float32)
        features[..., : self.key_dim] = key.astype(np.float32)[rows, np.concatenate([written, asked], axis=1)]
        features[rows, np.arange(head), self.key_dim + value[rows, written]] = 1
        features[:, head:, -1] = 1
        targets = np.zeros((examples, cell.length), dtype=np.int32)
        targets[:, head:] = np.take_along_axis(value, asked, axis=1)
        mask = np.zeros(targets.shape, dtype=bool)
        mask[:, head:] = True
        return Batch(np.zeros_like(targets), targets, mask, features=features)

    def _memory(self, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        """Keys of all frames [N, T, d] and values of the pairs as written [N, n p, V]."""
        assert batch.features is not None
        features = batch.features.astype(np.float64)
        written = int((features[0, :, -1] == 0).sum())
        return features[..., : self.key_dim], features[:, :written, self.key_dim : -1]

    def solve(self, batch: Batch) -> np.ndarray:
        """The value of the nearest key; see `Task.solve`."""
        keys, values = self._memory(batch)
        match = keys @ keys[:, : values.shape[1]].transpose(0, 2, 1)
        return np.take_along_axis(values.argmax(axis=2), match.argmax(axis=2), axis=1).astype(np.int32)

    def shortcuts(self, batch: Batch) -> dict[str, np.ndarray]:
        """Memories that are one d by V matrix: sum of outer products, the delta rule, and least squares."""
        keys, values = self._memory(batch)
        written = keys[:, : values.shape[1]]
        delta = np.zeros((len(keys), self.key_dim, self.vocab_size))
        for t in range(values.shape[1]):
            key = written[:, t, :, None]
            delta += key * (values[:, t, None] - (delta * key).sum(axis=1, keepdims=True))
        memories = {
            "additive memory": written.transpose(0, 2, 1) @ values,
            "delta rule": delta,
            "least squares": np.linalg.pinv(written, rcond=1e-6) @ values,
        }
        return {name: (keys @ memory).argmax(axis=2).astype(np.int32) for name, memory in memories.items()}

    def ceilings(self, cell: Cell) -> dict[str, float]:
        """A guess over all values; the three linear memories, measured."""
        return {"chance": 1 / self.vocab_size, **measured(self, cell)}

    def bits_needed(self, cell: Cell) -> float:
        """Bits of the values, n log2 V; a lower bound, as telling real keys apart takes more but has no finite entropy."""
        return cell.axes["pairs"] * log2(self.vocab_size)


def _length(axes: Mapping[str, int]) -> int:
    """Pairs as often as there are passes, and queries."""
    return axes["pairs"] * (axes["passes"] + 1)


def _unit(vectors: np.ndarray) -> np.ndarray:
    """Vectors of length 1 along the last axis."""
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
