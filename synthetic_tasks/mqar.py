"""Multi-query associative recall (Zoology, Arora et al. 2023; Based, Arora et al. 2024).

A sequence writes n key-value pairs, then asks for each key once: at a query key the model must emit the value that followed
the key in the context. Shape legend: N examples, T length, n pairs, S query slots of two tokens.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from math import comb, lgamma, log, log2
from typing import Literal

import numpy as np

from synthetic_tasks._base import Batch, Cell, Task, task
from synthetic_tasks._cells import parse_splits
from synthetic_tasks._draws import distinct, outside, weighted_order


@dataclass(frozen=True)
class Protocol:
    """A published (or our) choice of vocabulary, filler and cells."""

    vocab_size: int
    filler: str
    train: str
    test: str


PROTOCOLS = {
    "based_figure2": Protocol(
        8192,
        "random",
        "64x4:100000+128x8:20000+256x16:20000+256x32:20000+256x64:20000",
        "64x4:1000+64x8:1000+64x16:1000+128x32:1000+256x64:1000+512x128:1000+1024x256:1000",
    ),
    "zoology_figure2": Protocol(8192, "zero", "{setting}:100000", "{setting}:3000"),
    "laptop": Protocol(64, "clean", "16x2:2000+16x4:3000+32x8:4000", "16x2:500+16x4:500+32x8:500+64x16:500"),
}


@task("mqar", suite="recall")
class MQAR(Task):
    """Multi-query associative recall with the generator of Zoology and Based.

    Keys are drawn without replacement from the lower half of the vocabulary (id 0 excluded), values from the upper half. The
    first 2n tokens are `k1 v1 ... kn vn`; the rest is slots of two tokens, of which slot g asks with probability proportional
    to a (g+1)^(a-1), drawn without replacement, the j-th draw asking key j. A query key is labelled with its value, which is
    never shown; all other tokens are filler.

    Args:
        protocol: "based_figure2" is the mixture of Based, Figure 2; "zoology_figure2" the one cell `setting` of Zoology,
            Figure 2; "laptop" a small mixture for two CPU cores, with a cell of twice the trained length and load.
        setting: the cell of "zoology_figure2", length x pairs.
        train_cells: overrides the protocol's cells, e.g. "64x4:100000+128x8:20000" (length x pairs : examples).
        valid_cells: the same for the validation split, which otherwise has the cells of the test split.
        test_cells: the same for the test split.
        vocab_size: number of token ids; 0 takes the protocol's.
        filler: tokens of the query region that ask nothing: "random" draws from the whole vocabulary, so filler may look like
            a key or a value; "zero" is token 0; "clean" is random but neither a key nor a value of its sequence.
        power_a: the exponent a; small values put queries close behind the context, 1 spreads them evenly.
        test_powers: decay axis: the test cells are repeated at each of these exponents, e.g. "0.01,0.1,0.3,1.0".
    """

    def __init__(
        self,
        *,
        protocol: Literal["based_figure2", "zoology_figure2", "laptop"] = "laptop",
        setting: Literal["64x4", "128x8", "256x16", "512x64"] = "64x4",
        train_cells: str = "",
        valid_cells: str = "",
        test_cells: str = "",
        vocab_size: int = 0,
        filler: Literal["protocol", "random", "zero", "clean"] = "protocol",
        power_a: float = 0.01,
        test_powers: str = "",
    ) -> None:
        chosen = PROTOCOLS[protocol]
        self.vocab_size = vocab_size or chosen.vocab_size
        self.filler = chosen.filler if filler == "protocol" else filler
        self.power_a = power_a
        self._cells = parse_splits(
            ("length", "pairs"),
            train=train_cells or chosen.train.format(setting=setting),
            valid=valid_cells,
            test=test_cells or chosen.test.format(setting=setting),
        )
        if power_a <= 0:
            raise ValueError(f"power_a={power_a} must be positive; 1 is uniform and 0.01 the published value")
        for cell in itertools.chain(*self._cells.values()):
            self._check(cell)
        if test_powers:
            powers = _parse_powers(test_powers)
            self._cells["test"] = tuple(_with_power(cell, power) for power in powers for cell in self._cells["test"])

    def _check(self, cell: Cell) -> None:
        """Refuses cells whose pairs do not fit the length or the vocabulary."""
        pairs, keys = int(cell.axes["pairs"]), self.vocab_size // 2 - 1
        if pairs < 1 or 4 * pairs > cell.length:
            raise ValueError(
                f"{pairs} pairs do not fit length {cell.length}, which holds 1 to {cell.length // 4} (2 tokens a pair "
                f"and 2 a query); use at most {cell.length // 4} pairs or a length of at least {4 * max(pairs, 1)}"
            )
        if pairs > keys:
            raise ValueError(
                f"{pairs} pairs need as many distinct keys, but vocab_size={self.vocab_size} has {keys} (half of it "
                f"less the filler 0); use at most {keys} pairs or vocab_size={2 * pairs + 2}"
            )

    def cells(self, split: str) -> tuple[Cell, ...]:
        """See `Task.cells`."""
        return self._cells[split]

    def sample(self, cell: Cell, examples: int, rng: np.random.Generator) -> Batch:
        """See `Task.sample`."""
        pairs, length, half = int(cell.axes["pairs"]), cell.length, self.vocab_size // 2
        keys = 1 + distinct(rng, examples, pairs, half - 1)
        values = half + distinct(rng, examples, pairs, self.vocab_size - half)
        slots = (length - 2 * pairs) // 2
        a = cell.axes.get("power", self.power_a)
        query_at = 2 * pairs + 2 * weighted_order(rng, examples, pairs, np.arange(1, slots + 1) ** (a - 1.0))

        inputs = np.zeros((examples, length), dtype=np.int32)
        if self.filler == "random":
            inputs[:, 2 * pairs :] = rng.integers(0, self.vocab_size, size=(examples, length - 2 * pairs), dtype=np.int32)
        elif self.filler == "clean":
            shown = np.concatenate([keys, values], axis=1)
            inputs[:, 2 * pairs :] = outside(rng, length - 2 * pairs, self.vocab_size, shown)
        inputs[:, 0 : 2 * pairs : 2] = keys
        inputs[:, 1 : 2 * pairs : 2] = values
        np.put_along_axis(inputs, query_at, keys.astype(np.int32), axis=1)
        targets = np.zeros((examples, length), dtype=np.int32)
        np.put_along_axis(targets, query_at, values.astype(np.int32), axis=1)
        return Batch(inputs, targets, mask=targets > 0)

    def solve(self, batch: Batch) -> np.ndarray:
        """Looks every token up among the context's keys; see `Task.solve`."""
        pairs = int(batch.mask[0].sum())
        table = np.zeros((len(batch.inputs), self.vocab_size), dtype=np.int32)
        np.put_along_axis(table, batch.inputs[:, 0 : 2 * pairs : 2], batch.inputs[:, 1 : 2 * pairs : 2], axis=1)
        return np.take_along_axis(table, batch.inputs, axis=1)

    def ceilings(self, cell: Cell) -> dict[str, float]:
        """Uniform guesses over all values, and over the values of the context."""
        return {"chance": 1 / (self.vocab_size - self.vocab_size // 2), "in-context guess": 1 / cell.axes["pairs"]}

    def bits_needed(self, cell: Cell) -> float:
        """Entropy of the key set plus that of the values given the keys: log2 C(K, n) + log2 V!/(V-n)!, in bits.

        The order in which pairs were written need not be stored.
        """
        pairs, half = int(cell.axes["pairs"]), self.vocab_size // 2
        values = self.vocab_size - half
        return log2(comb(half - 1, pairs)) + (lgamma(values + 1) - lgamma(values - pairs + 1)) / log(2)


def _parse_powers(text: str) -> list[float]:
    """The exponents of the decay axis."""
    try:
        powers = [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"test_powers={text!r} is not a list of numbers; write it like 0.01,0.1,0.3,1.0") from None
    if min(powers) <= 0 or len(set(powers)) < len(powers):
        raise ValueError(f"test_powers={text!r} must be positive and distinct, e.g. 0.01,0.1,0.3,1.0")
    return powers


def _with_power(cell: Cell, power: float) -> Cell:
    """The cell at one exponent of the decay axis."""
    return Cell(f"{cell.name}a{power:g}".replace(".", "p"), cell.length, cell.examples, {**cell.axes, "power": power})
