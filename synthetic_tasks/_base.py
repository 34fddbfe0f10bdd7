"""The one interface of the synthetic tasks: `Task`, its `Cell`s and `Batch`es, and named seed streams.

Shape legend: N examples, T length. Everything is NumPy; one seed decides every byte.
"""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal, TypeVar

import numpy as np

SPLITS = ("train", "valid", "test")


def stream(seed: int, *names: str | int) -> np.random.Generator:
    """An independent random generator for the named purpose, e.g. `stream(0, "train", "64x4")`.

    Two different paths of names never share a stream, whatever the seeds (numpy `SeedSequence` spawn keys).
    """
    keys = tuple(zlib.crc32(str(name).encode()) for name in names)
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=keys)))


@dataclass(frozen=True)
class Cell:
    """One difficulty of a task: how many examples of it a split holds, and the axes that tell it from the others.

    Args:
        name: unique within a split and safe in file names, e.g. "64x4".
        length: sequence length T of every example.
        examples: number of examples N.
        axes: difficulty axes by name, e.g. {"length": 64, "pairs": 4}; the report's heat map is drawn over them.
    """

    name: str
    length: int
    examples: int
    axes: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Batch:
    """Examples of one cell.

    Args:
        inputs: token ids, [N, T], int32; where the model reads `features`, the symbols behind them, or zeros if none.
        targets: the label of each position, [N, T], int32; meaningless where `mask` is False.
        mask: which positions are labelled, [N, T], bool; at least one a row.
        groups: named subsets of the labelled positions with an accuracy of their own, e.g. {"updated": [N, T] bool}.
        lures: named wrong answers whose rate is worth reporting, e.g. {"stale": [N, T] int32}; -1 where there is none.
        features: what the model reads in place of `inputs` when `Task.input_kind` is "features", [N, T, F] float32.
        values: the label of each position when `Task.target_kind` is "real", [N, T, K] float32.
    """

    inputs: np.ndarray
    targets: np.ndarray
    mask: np.ndarray
    groups: Mapping[str, np.ndarray] = field(default_factory=dict)
    lures: Mapping[str, np.ndarray] = field(default_factory=dict)
    features: np.ndarray | None = None
    values: np.ndarray | None = None

    def arrays(self) -> dict[str, np.ndarray]:
        """Every array by a stable name; all share the leading axis N."""
        named = {"inputs": self.inputs, "targets": self.targets, "mask": self.mask}
        named |= {f"groups.{key}": self.groups[key] for key in sorted(self.groups)}
        named |= {f"lures.{key}": self.lures[key] for key in sorted(self.lures)}
        optional = {"features": self.features, "values": self.values}
        return named | {key: value for key, value in optional.items() if value is not None}

    @classmethod
    def from_arrays(cls, named: Mapping[str, np.ndarray]) -> Batch:
        """The inverse of `arrays`."""
        inner = {part: {k.split(".", 1)[1]: v for k, v in named.items() if k.startswith(part + ".")} for part in _INNER}
        return cls(**{k: v for k, v in named.items() if "." not in k}, **inner)  # type: ignore[arg-type]


_INNER = ("groups", "lures")


class Task(ABC):
    """A synthetic task: a pure function of (options, split, cell, seed) to a `Batch`.

    A subclass takes its options as keyword-only arguments of `__init__`, checks them there, and is registered by
    `@task(name)` in the file of that name.
    """

    name: ClassVar[str] = ""
    suite: ClassVar[str] = ""
    """The family that the task is scored with: "recall", "selectivity", "mad" or "state_tracking"."""
    input_kind: ClassVar[Literal["tokens", "features"]] = "tokens"
    """Whether the model embeds `Batch.inputs` or projects `Batch.features`."""
    target_kind: ClassVar[Literal["tokens", "real"]] = "tokens"
    """Whether labels are `Batch.targets` (cross-entropy) or `Batch.values` (squared error)."""
    readout: ClassVar[Literal["positions", "last"]] = "positions"
    """Whether each label is predicted from its own position, or all of them from the last position's hidden vector."""
    vocab_size: int
    """Number of token ids, of inputs and targets together."""
    feature_dim: int = 0
    """F of `Batch.features`; 0 for tasks that read tokens."""
    value_dim: int = 0
    """K of `Batch.values`; 0 for tasks that predict tokens."""

    @abstractmethod
    def cells(self, split: str) -> tuple[Cell, ...]:
        """The cells of "train", "valid" or "test", easiest first."""

    @abstractmethod
    def sample(self, cell: Cell, examples: int, rng: np.random.Generator) -> Batch:
        """Draws `examples` examples of `cell`; all randomness comes from `rng`."""

    @abstractmethod
    def ceilings(self, cell: Cell) -> dict[str, float]:
        """Accuracy of the solvers that do not solve the task, e.g. {"chance": 1/4096, "in-context guess": 1/4}.

        Where labels are real they are mean squared errors, and "predict zero", the scale of all errors, is one of them.
        "exact" is the exact solver's, where even that misses some labels.
        """

    @abstractmethod
    def bits_needed(self, cell: Cell) -> float:
        """Bits a causal state must hold at the end of the context to answer every possible query."""

    @abstractmethod
    def solve(self, batch: Batch) -> np.ndarray:
        """The exact solver: its prediction at every labelled position, from the inputs (or features) and the layout alone.

        Returns:
            [N, T] int32 token ids, or [N, T, K] float32 where labels are real; meaningless where `mask` is False.
        """

    def shortcuts(self, batch: Batch) -> dict[str, np.ndarray]:
        """Predictions of the solvers that miss the point of the task, by the name they have in `ceilings`; may be none."""
        del batch
        return {}

    def extra_metrics(self, cell: Cell, batch: Batch, predictions: np.ndarray) -> dict[str, float]:
        """Metrics beyond accuracy, group accuracies and lure rates, of a model's predictions on one test cell; may be none.

        Args:
            cell: the cell.
            batch: all its examples.
            predictions: in the form that `solve` gives them.

        Returns:
            Values by name; those that are not finite are left out of the records.
        """
        del cell, batch, predictions
        return {}

    def votes(self, batch: Batch) -> np.ndarray | None:
        """Which labelled positions vote as one, [N, T] numbers below T, or None where each position speaks for itself.

        The probabilities that a model gives at the positions of a vote are summed; "symbol accuracy" counts the best answers.
        """
        del batch
        return None

    def trained(self, cell: Cell) -> bool:
        """Whether a test cell lies within the trained range of every axis that the training cells share with it."""
        cells = self.cells("train")
        ranges = {axis: [c.axes[axis] for c in cells if axis in c.axes] for axis in cell.axes}
        return all(min(found) <= cell.axes[axis] <= max(found) for axis, found in ranges.items() if found)

    def max_length(self) -> int:
        """Longest sequence of any split."""
        return max(cell.length for split in SPLITS for cell in self.cells(split))


TASKS: dict[str, type[Task]] = {}
"""Task classes by name, filled by importing their modules."""

T = TypeVar("T", bound=type[Task])


def task(name: str, *, suite: str = "") -> Callable[[T], T]:
    """Registers a `Task` class under `name`; in this package the name is the file's stem.

    Args:
        name: of the task.
        suite: the family that the task is scored with, such as "recall".
    """

    def register(cls: T) -> T:
        cls.name, cls.suite = name, suite
        TASKS[name] = cls
        return cls

    return register
