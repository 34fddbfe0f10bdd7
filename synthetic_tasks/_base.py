"""The one interface of the synthetic tasks: `Task`, its `Cell`s and `Batch`es, and named seed streams.

Shape legend: N examples, T length. Everything is NumPy; one seed decides every byte.
"""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, TypeVar

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
        inputs: token ids, [N, T], int32.
        targets: the label of each position, [N, T], int32; meaningless where `mask` is False.
        mask: which positions are labelled, [N, T], bool; at least one a row.
        groups: named subsets of the labelled positions with an accuracy of their own, e.g. {"updated": [N, T] bool}.
        lures: named wrong answers whose rate is worth reporting, e.g. {"stale": [N, T] int32}; -1 where there is none.
    """

    inputs: np.ndarray
    targets: np.ndarray
    mask: np.ndarray
    groups: Mapping[str, np.ndarray] = field(default_factory=dict)
    lures: Mapping[str, np.ndarray] = field(default_factory=dict)


class Task(ABC):
    """A synthetic task: a pure function of (options, split, cell, seed) to a `Batch`.

    A subclass takes its options as keyword-only arguments of `__init__`, checks them there, and is registered by
    `@task(name)` in the file of that name.
    """

    name: ClassVar[str] = ""
    vocab_size: int

    @abstractmethod
    def cells(self, split: str) -> tuple[Cell, ...]:
        """The cells of "train", "valid" or "test", easiest first."""

    @abstractmethod
    def sample(self, cell: Cell, examples: int, rng: np.random.Generator) -> Batch:
        """Draws `examples` examples of `cell`; all randomness comes from `rng`."""

    @abstractmethod
    def ceilings(self, cell: Cell) -> dict[str, float]:
        """Accuracy of the solvers that do not solve the task, e.g. {"chance": 1/4096, "in-context guess": 1/4}."""

    @abstractmethod
    def bits_needed(self, cell: Cell) -> float:
        """Bits a causal state must hold at the end of the context to answer every possible query."""

    def max_length(self) -> int:
        """Longest sequence of any split."""
        return max(cell.length for split in SPLITS for cell in self.cells(split))


def row_hashes(inputs_NT: np.ndarray) -> np.ndarray:
    """A 64-bit hash of each row of token ids, [N] uint64: multiply-and-add with odd pseudo-random multipliers."""
    multipliers = stream(0, "row-hash").integers(0, 2**63, size=inputs_NT.shape[1], dtype=np.uint64) * 2 + 1
    mixed = (inputs_NT.astype(np.uint64) + 1) * multipliers[None, :]
    mixed ^= mixed >> np.uint64(29)
    return (mixed * np.uint64(0x9E3779B97F4A7C15)).sum(axis=1, dtype=np.uint64)


def build_split(task: Task, split: str, seed: int) -> dict[str, Batch]:
    """All cells of a split, by cell name, disjoint by row hash from the splits that precede it in `SPLITS`.

    A validation or test row that also stands in an earlier split is drawn again, from the same stream.

    Raises:
        ValueError: the task has too few distinct examples for disjoint splits.
    """
    taken = _earlier_hashes(task, split, seed)
    batches: dict[str, Batch] = {}
    for cell in task.cells(split):
        rng = stream(seed, task.name, split, cell.name)
        batch = task.sample(cell, cell.examples, rng)
        for _ in range(20):
            clash = np.isin(row_hashes(batch.inputs), taken.get(cell.length, _NO_HASHES))
            if not clash.any():
                break
            batch = _replace_rows(batch, clash, task.sample(cell, int(clash.sum()), rng))
        else:
            raise ValueError(
                f"task {task.name}, cell {cell.name}: {int(clash.sum())} of {cell.examples} {split} examples also stand in an "
                "earlier split after 20 redraws; the cell has too few distinct examples, so enlarge the vocabulary or the length"
            )
        batches[cell.name] = batch
    return batches


_NO_HASHES = np.empty(0, dtype=np.uint64)


def _earlier_hashes(task: Task, split: str, seed: int) -> dict[int, np.ndarray]:
    """Row hashes of every earlier split, by sequence length."""
    found: dict[int, list[np.ndarray]] = {}
    for earlier in SPLITS[: SPLITS.index(split)]:
        batches = build_split(task, earlier, seed)
        for cell in task.cells(earlier):
            found.setdefault(cell.length, []).append(row_hashes(batches[cell.name].inputs))
    return {length: np.concatenate(hashes) for length, hashes in found.items()}


def _replace_rows(batch: Batch, rows: np.ndarray, fresh: Batch) -> Batch:
    """`batch` with the selected rows taken from `fresh`."""

    def put(old: np.ndarray, new: np.ndarray) -> np.ndarray:
        out = old.copy()
        out[rows] = new
        return out

    return Batch(
        put(batch.inputs, fresh.inputs),
        put(batch.targets, fresh.targets),
        put(batch.mask, fresh.mask),
        {key: put(value, fresh.groups[key]) for key, value in batch.groups.items()},
        {key: put(value, fresh.lures[key]) for key, value in batch.lures.items()},
    )


TASKS: dict[str, type[Task]] = {}
"""Task classes by name, filled by importing their modules."""

T = TypeVar("T", bound=type[Task])


def task(name: str) -> Callable[[T], T]:
    """Registers a `Task` class under `name`; in this package the name is the file's stem."""

    def register(cls: T) -> T:
        cls.name = name
        TASKS[name] = cls
        return cls

    return register


