"""MAD fuzzy in-context recall: keys and values are motifs of one to three tokens (Poli et al. 2024, athms/mad-lab).

Shape legend: N examples, T length, P pairs of motifs.
"""

from __future__ import annotations

import itertools
from math import isqrt, log2, perm
from typing import Literal

import numpy as np

from synthetic_tasks._base import Batch, Cell, task
from synthetic_tasks._cells import parse_splits
from synthetic_tasks._draws import distinct
from synthetic_tasks._mad import MADTask, next_tokens, seen_before, with_full_loss

MOTIF = 3


@task("mad_fuzzy_recall", suite="mad")
class MADFuzzyRecall(MADTask):
    """Fuzzy recall with the published sizes: vocabulary 16 with one pad id, length 128.

    A motif is one to three distinct tokens, each length equally likely. A sequence is key motif, value motif, and so on, with
    a map that is random in each sequence; the tokens of a value are labelled when its key was seen before. The last pair
    repeats a key that was seen before. Sequences are padded on the left.

    Args:
        train_cells: cells of the training split, length : examples.
        valid_cells: the same for the validation split, which otherwise has the cells of the test split.
        test_cells: the same for the test split; by default with a length beyond the trained one.
        vocab_size: number of token ids; the last is the pad, the others half keys, half values.
        compat: "mad" keeps the published quirks: training labels every next token, and validation and test have keys of three
            tokens only, so that few are ever repeated; "none" labels answers only and has one law for all splits.
    """

    def __init__(
        self,
        *,
        train_cells: str = "128:12800",
        valid_cells: str = "",
        test_cells: str = "128:1280+256:320",
        vocab_size: int = 16,
        compat: Literal["none", "mad"] = "none",
    ) -> None:
        self.vocab_size, self.compat = vocab_size, compat
        self.keys = (vocab_size - 1) // 2
        self.values = vocab_size - 1 - self.keys
        cells = parse_splits(("length",), train=train_cells, valid=valid_cells, test=test_cells)
        self._cells = with_full_loss(cells) if compat == "mad" else cells
        if self.keys < MOTIF:
            raise ValueError(
                f"vocab_size={vocab_size} has {self.keys} key tokens, but a motif has up to {MOTIF} distinct "
                f"ones; use at least {2 * MOTIF + 1}"
            )
        for cell in itertools.chain(*cells.values()):
            if cell.length < 4 * MOTIF:
                raise ValueError(f"length {cell.length} cannot hold a pair and its repetition; use at least {4 * MOTIF}")

    def cells(self, split: str) -> tuple[Cell, ...]:
        """See `Task.cells`."""
        return self._cells[split]

    def _motifs(self, rng: np.random.Generator, rows: int, count: int, first: int, size: int, *, full: bool) -> np.ndarray:
        """Motifs [N, P, 3] of distinct ids from `first` on, -1 beyond their length."""
        tokens = first + distinct(rng, rows * count, MOTIF, size).reshape(rows, count, MOTIF)
        length = np.full((rows, count, 1), MOTIF) if full else rng.integers(1, MOTIF + 1, size=(rows, count, 1))
        return np.where(np.arange(MOTIF) < length, tokens, -1)

    def sample(self, cell: Cell, examples: int, rng: np.random.Generator) -> Batch:
        """See `Task.sample`."""
        full = self.compat == "mad" and not cell.axes.get("full_loss")
        # A pair has four tokens in the mean (five where all keys are full): more than enough pairs to fill the length.
        count = cell.length // (MOTIF + 1) + 2 * isqrt(cell.length) + 4
        key = self._motifs(rng, examples, count, 0, self.keys, full=full)
        value = self._motifs(rng, examples, count, self.keys, self.values, full=False)
        base = self.keys + 1
        ids = ((key[..., 0] + 1) * base + key[..., 1] + 1) * base + key[..., 2] + 1
        first = seen_before(ids, np.ones(ids.shape, dtype=bool))
        value = np.take_along_axis(value, first[..., None], axis=1)
        # As many pairs as leave room for a last one that repeats a random earlier one.
        lengths = (key >= 0).sum(axis=2) + (value >= 0).sum(axis=2)
        last = np.minimum((np.cumsum(lengths, axis=1) <= cell.length - 2 * MOTIF).sum(axis=1), count - 1)
        rows = np.arange(examples)
        probe = rng.integers(0, last)
        key[rows, last], value[rows, last], first[rows, last] = key[rows, probe], value[rows, probe], first[rows, probe]
        used = np.arange(count) <= last[:, None]

        tokens = np.concatenate([key, value], axis=2)
        recalled = np.zeros(tokens.shape, dtype=bool)
        recalled[:, :, MOTIF:] = (first < np.arange(count))[..., None]
        present = (tokens >= 0) & used[..., None]
        return self._lay_out(tokens.reshape(examples, -1), recalled.reshape(examples, -1), present.reshape(examples, -1), cell)

    def _lay_out(self, tokens: np.ndarray, recalled: np.ndarray, present: np.ndarray, cell: Cell) -> Batch:
        """Present tokens pushed to the right end, pads before them."""
        place = np.cumsum(present, axis=1)
        at = (place + (cell.length - place[:, -1:] - 1) + np.arange(len(tokens))[:, None] * cell.length)[present]
        inputs = np.full((len(tokens), cell.length), self.vocab_size - 1, dtype=np.int32)
        inputs.ravel()[at] = tokens[present]
        is_answer, answers = np.zeros((2, *inputs.shape), dtype=bool)
        is_answer.ravel()[at] = recalled[present]
        answers[:, :-1] = is_answer[:, 1:]
        return next_tokens(inputs, answers, cell)

    def solve(self, batch: Batch) -> np.ndarray:
        """Reads motifs off the stream and repeats the value of a known key; see `Task.solve`."""
        out = np.zeros_like(batch.inputs)
        for row, tokens in enumerate(batch.inputs.tolist()):
            known: dict[tuple[int, ...], list[int]] = {}
            key: list[int] = []
            value: list[int] = []
            for t, token in enumerate(tokens):
                if token >= self.keys + self.values:
                    continue
                if token < self.keys:
                    if value:
                        known.setdefault(tuple(key), value)
                        key, value = [], []
                    key.append(token)
                else:
                    value.append(token)
                expected = known.get(tuple(key), [])
                out[row, t] = expected[len(value)] if len(value) < len(expected) else 0
        return out

    def ceilings(self, cell: Cell) -> dict[str, float]:
        """A guess over all value tokens."""
        del cell
        return {"chance": 1 / self.values}

    def bits_needed(self, cell: Cell) -> float:
        """Bits of the values of as many pairs as a sequence shows, about T / 4; an upper bound, as keys may repeat."""
        pairs = cell.length / (MOTIF + 1)
        motifs = sum(perm(self.keys, size) for size in range(1, MOTIF + 1))
        per_value = sum(log2(perm(self.values, size)) for size in range(1, MOTIF + 1)) / MOTIF + log2(MOTIF)
        return min(pairs, motifs) * per_value
