"""What SelectivBench's four tasks share: track the hidden state of a random grammar through gaps, noise and distractors.

Source: SelectivBench (symseqbench/selectivbench). Every symbol is a frame with its letter, followed by empty frames; the label
of every frame is the hidden state of the last true symbol. Repaired here: grammar, training, validation and test have seed
streams of their own, and splits are disjoint.
Shape legend: N examples, T frames, M symbols, A letters, S states.
"""

from __future__ import annotations

import itertools
from abc import abstractmethod
from math import log2

import numpy as np

from synthetic_tasks._base import Batch, Cell, Task, stream
from synthetic_tasks._grammar import Grammar
from synthetic_tasks._metrics import accuracy, effective_memory_length, measured

WINDOWS = (1, 2, 3, 4, 5, 6, 8)


class Selectivity(Task):
    """A grammar task; subclasses say which frames follow a symbol.

    Token ids are letters 0 .. A - 1, the end symbol A and the empty frame A + 1; labels are state ids.
    """

    noise: float = 0.0
    distractors: float = 0.0
    distractor_start: int = 0

    def _prepare(self, ambiguity: int, grammar_seed: int, cells: dict[str, tuple[Cell, ...]]) -> None:
        """Draws the grammar and checks the cells; called at the end of `__init__`."""
        if ambiguity < 2:
            raise ValueError(f"ambiguity={ambiguity} leaves no hidden state to track; use at least 2")
        self.grammar = Grammar(ambiguity, ambiguity, stream(grammar_seed, "grammar", ambiguity))
        self.vocab_size = max(self.grammar.states, ambiguity + 2)
        self._cells = cells
        for cell in itertools.chain(*cells.values()):
            if cell.axes["symbols"] < 2:
                raise ValueError(f"cell {cell.name} has {cell.axes['symbols']:g} symbols; use at least 2")
        if self.input_kind == "features":
            self.feature_dim = ambiguity + 1

    @abstractmethod
    def gaps(self, cell: Cell, rows: int, symbols: int, rng: np.random.Generator) -> np.ndarray:
        """Number of empty frames after each symbol, [N, M]."""

    def cells(self, split: str) -> tuple[Cell, ...]:
        """See `Task.cells`."""
        return self._cells[split]

    def sample(self, cell: Cell, examples: int, rng: np.random.Generator) -> Batch:
        """See `Task.sample`.

        Groups: "symbol" is the frame of a true symbol, "held" the last empty frame after one, "distractor" those of foreign
        letters and their gaps.
        """
        symbols, length = int(cell.axes["symbols"]), cell.length
        # Gaps of random length may leave room for more symbols than the mean; the surplus is cut off.
        drawn = symbols if not cell.axes.get("jitter") else min(length // 2, 2 * symbols)
        states = self.grammar.sample(rng, examples, drawn)
        letters, foreign = self.grammar.letter(states), np.zeros(states.shape, dtype=bool)
        if self.distractors:
            states, letters, foreign = self._distract(states, letters, rng)
        gaps = self.gaps(cell, examples, states.shape[1], rng)
        starts = np.cumsum(1 + gaps, axis=1) - 1 - gaps
        stops = np.minimum(starts + 1 + gaps, length)
        stops[:, -1] = length
        frames = np.maximum(stops - starts, 0).ravel()
        targets = np.repeat(states.astype(np.int32).ravel(), frames).reshape(examples, length)
        during = np.repeat(foreign.ravel(), frames).reshape(examples, length)
        kept = starts < length
        at = (np.arange(examples)[:, None] * length + starts)[kept]
        inputs = np.full((examples, length), self.grammar.letters + 1, dtype=np.int32)
        inputs.ravel()[at] = letters[kept]
        begins = inputs <= self.grammar.letters
        last = np.ones_like(begins)
        last[:, :-1] = begins[:, 1:]
        groups = {"symbol": begins & ~during, "held": last & ~begins & ~during}
        if self.distractors:
            groups["distractor"] = during
        return Batch(inputs, targets, np.ones_like(begins), groups, features=self._features(inputs, rng))

    def _features(self, inputs: np.ndarray, rng: np.random.Generator) -> np.ndarray | None:
        """One-hot letters, zero in empty frames, plus noise uniform in [0, `noise`) on every entry."""
        if self.input_kind == "tokens":
            return None
        onehot = np.eye(self.grammar.letters + 2, self.grammar.letters + 1, dtype=np.float32)[inputs]
        return onehot + rng.random(onehot.shape, dtype=np.float32) * np.float32(self.noise)

    def _distract(
        self, states: np.ndarray, letters: np.ndarray, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Inserts foreign letters that the grammar does not allow next; states, letters and which are foreign, [N, M]."""
        symbols = states.shape[1]
        inserted = rng.random(states.shape) < self.distractors
        inserted[:, : self.distractor_start] = False
        # Symbol j moves up by the distractors before it; the places left between are theirs and keep its state.
        moved = np.arange(symbols) + np.cumsum(inserted, axis=1) - inserted
        foreign = np.ones(states.shape, dtype=bool)
        np.put_along_axis(foreign, np.where(moved < symbols, moved, 0), False, axis=1)
        source = np.cumsum(~foreign, axis=1) - 1
        states, letters = (np.take_along_axis(array, source, axis=1) for array in (states, letters))
        row, at = np.nonzero(foreign)
        allowed = self.grammar.next[states[row, at], : self.grammar.letters] >= 0
        letters[row, at] = np.where(allowed, -1.0, rng.random(allowed.shape)).argmax(axis=1)
        return states, letters, foreign

    def _events(self, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        """Letters shown in order [N, M], padded by the end symbol, and the index of the latest one at each frame [N, T]."""
        if batch.features is None:
            shown, letters = batch.inputs <= self.grammar.letters, batch.inputs
        else:
            shown, letters = batch.features.max(axis=2) > 0.5, batch.features.argmax(axis=2)
        event = np.cumsum(shown, axis=1) - 1
        order = np.argsort(~shown, axis=1, kind="stable")[:, : int(event.max()) + 1]
        shown_letters = np.where(np.take_along_axis(shown, order, axis=1), np.take_along_axis(letters, order, axis=1), 0)
        filled = np.arange(order.shape[1]) <= event[:, -1:]
        return np.where(filled, shown_letters, self.grammar.letters).astype(np.int64), np.maximum(event, 0)

    def solve(self, batch: Batch) -> np.ndarray:
        """The likeliest state given the whole past; see `Task.solve`."""
        letters, event = self._events(batch)
        if self.distractors:
            states = self.grammar.distracted_filter(letters, self.distractors, self.distractor_start)
        else:
            states = self.grammar.history_filter(letters)
        return np.take_along_axis(states, event, axis=1).astype(np.int32)

    def shortcuts(self, batch: Batch) -> dict[str, np.ndarray]:
        """Bayes filters that see the last k symbols; with distractors, the filter that takes them for symbols."""
        letters, event = self._events(batch)
        if self.distractors:
            found = {"takes distractors for symbols": self.grammar.history_filter(letters)}
        else:
            found = {f"bayes {k}": states for k, states in self.grammar.window_filters(letters, WINDOWS).items()}
        return {name: np.take_along_axis(states, event, axis=1).astype(np.int32) for name, states in found.items()}

    def votes(self, batch: Batch) -> np.ndarray:
        """SelectivBench's metric: the frame of a symbol and the empty frames after it vote as one."""
        return np.cumsum(batch.inputs <= self.grammar.letters, axis=1) - 1

    def extra_metrics(self, cell: Cell, batch: Batch, predictions: np.ndarray) -> dict[str, float]:
        """Effective memory length, where there is a Bayes curve to read it from."""
        if self.distractors:
            return {}
        return {"effective memory length": effective_memory_length(accuracy(predictions, batch), self.ceilings(cell))}

    def ceilings(self, cell: Cell) -> dict[str, float]:
        """Chance, the filters of `shortcuts` and, as "exact", the filter of the whole past, measured."""
        return {"chance": 1 / self.grammar.states, **measured(self, cell, 64, exact=True)}

    def bits_needed(self, cell: Cell) -> float:
        """log2 of the number of hidden states, once synchronised."""
        del cell
        return log2(self.grammar.states)


def with_jitter(cells: tuple[Cell, ...]) -> tuple[Cell, ...]:
    """Cells whose gap axis g stands for gaps uniform in 1 .. g."""
    return tuple(Cell(cell.name, cell.length, cell.examples, {**cell.axes, "jitter": 1}) for cell in cells)


def jittered_length(symbols: int, gap: int) -> int:
    """Frames of `symbols` symbols with mean gap (1 + g) / 2."""
    return symbols + round(symbols * (1 + gap) / 2)
