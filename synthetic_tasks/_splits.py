"""Splits of a task: cells drawn in blocks, disjoint by hash from the splits before them, with a digest of every byte.

Shape legend: N examples.
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from synthetic_tasks._base import SPLITS, Batch, Cell, Task, stream

BLOCK_ROWS = 2048
"""Rows drawn from one stream. A cell is a sequence of such blocks, so its bytes depend on no worker count or memory limit."""


def example_hashes(batch: Batch) -> np.ndarray:
    """A 64-bit hash of each example, [N] uint64: of its symbols, or of its features where there are no symbols."""
    rows = batch.inputs if batch.features is None or batch.inputs.any() else batch.features
    words = np.ascontiguousarray(rows).reshape(len(rows), -1).view(np.uint32)
    multipliers = stream(0, "row-hash").integers(0, 2**63, size=words.shape[1], dtype=np.uint64) * 2 + 1
    mixed = (words + np.uint64(1)) * multipliers[None, :]
    mixed ^= mixed >> np.uint64(29)
    return (mixed * np.uint64(0x9E3779B97F4A7C15)).sum(axis=1, dtype=np.uint64)


def split_digest(batches: Mapping[str, Batch]) -> str:
    """A hex digest of every byte of some batches and their names."""
    digest = hashlib.sha256()
    for name in sorted(batches):
        for key, array in batches[name].arrays().items():
            digest.update(f"{name}/{key}{array.shape}{array.dtype}".encode())
            digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def build_split(task: Task, split: str, seed: int, *, workers: int = 1) -> dict[str, Batch]:
    """All cells of a split, by cell name, disjoint by hash from the splits that precede it in `SPLITS`.

    A validation or test example that also stands in an earlier split is drawn again, from a stream of its own.

    Args:
        task: the task.
        split: one of `SPLITS`.
        seed: of the run.
        workers: threads that draw blocks; the bytes are the same for any number.

    Raises:
        ValueError: the task has too few distinct examples for disjoint splits.
    """
    taken = _earlier_hashes(task, split, seed)
    return {cell.name: _concatenate(_cell(task, split, cell, seed, taken, workers)[0]) for cell in task.cells(split)}


def split_hash(task: Task, split: str, seed: int) -> str:
    """A hex digest of every byte of a split, block by block: it needs no memory, and no time if this process drew the split."""
    taken = _earlier_hashes(task, split, seed)
    digest = hashlib.sha256()
    for cell in task.cells(split):
        digest.update(f"{cell.name}/{_summary(task, split, cell, seed, taken).digest}".encode())
    return digest.hexdigest()


def blocks(task: Task, split: str, cell: Cell, seed: int) -> Iterator[Batch]:
    """The examples of one cell in blocks of `BLOCK_ROWS`, for sets that exceed memory: the same bytes as `build_split`."""
    for batch, _ in _draw(task, split, cell, seed, _earlier_hashes(task, split, seed)):
        yield batch


def training_block(task: Task, cell: Cell, seed: int, index: int) -> Batch:
    """Examples `index * BLOCK_ROWS` and following of a training cell, the same bytes as in `build_split`."""
    return _block(task, "train", cell, seed, index, _NO_HASHES)[0]


def _draw(
    task: Task, split: str, cell: Cell, seed: int, taken: Mapping[int, np.ndarray], workers: int = 1
) -> Iterator[tuple[Batch, np.ndarray]]:
    """Blocks of one cell and their hashes, none of which is among those `taken` at its length."""
    banned = taken.get(cell.length, _NO_HASHES)
    indices = range(-(-cell.examples // BLOCK_ROWS))
    if workers == 1 or len(indices) == 1:
        yield from (_block(task, split, cell, seed, index, banned) for index in indices)
        return
    with ThreadPoolExecutor(workers) as pool:
        yield from pool.map(lambda index: _block(task, split, cell, seed, index, banned), indices)


def _block(task: Task, split: str, cell: Cell, seed: int, index: int, banned: np.ndarray) -> tuple[Batch, np.ndarray]:
    """Block `index` of a cell and its hashes, none of them `banned`; a pure function of its arguments."""
    path = (task.name, split, cell.name, index)
    batch = task.sample(cell, min(BLOCK_ROWS, cell.examples - index * BLOCK_ROWS), stream(seed, *path))
    hashes = example_hashes(batch)
    for attempt in range(20):
        clash = np.isin(hashes, banned)
        if not clash.any():
            return batch, hashes
        fresh = task.sample(cell, int(clash.sum()), stream(seed, *path, "redraw", attempt))
        batch = _replace_rows(batch, clash, fresh)
        hashes[clash] = example_hashes(fresh)
    raise ValueError(
        f"task {task.name}, cell {cell.name}: {int(np.isin(hashes, banned).sum())} of {len(hashes)} {split} examples "
        "also stand in an earlier split after 20 redraws; the cell has too few distinct examples, so enlarge the "
        "vocabulary or the length"
    )


class _Summary(NamedTuple):
    """What is kept of a cell: its examples' hashes, and a digest of all its bytes."""

    hashes: np.ndarray
    digest: str


_NO_HASHES = np.empty(0, dtype=np.uint64)
_SUMMARIES: dict[str, _Summary] = {}
"""Of the cells drawn by this process, so that a split is not drawn again to build the next one or to be named in a record."""


def _cell(
    task: Task, split: str, cell: Cell, seed: int, taken: Mapping[int, np.ndarray], workers: int = 1, *, keep: bool = True
) -> tuple[list[Batch], _Summary]:
    """The blocks of a cell, none of them unless `keep`, and its summary, which is remembered."""
    parts, hashes, digest = [], [], hashlib.sha256()
    for batch, found in _draw(task, split, cell, seed, taken, workers):
        hashes.append(found)
        digest.update(split_digest({cell.name: batch}).encode())
        parts += [batch] if keep else []
    summary = _Summary(np.concatenate(hashes), digest.hexdigest())
    key = content_key(task, split, seed, cell)
    if key is not None:
        _SUMMARIES[key] = summary
    return parts, summary


def _summary(task: Task, split: str, cell: Cell, seed: int, taken: Mapping[int, np.ndarray]) -> _Summary:
    """The summary of a cell, which is drawn unless it has been."""
    known = _SUMMARIES.get(content_key(task, split, seed, cell) or "")
    return known or _cell(task, split, cell, seed, taken, keep=False)[1]


def content_key(task: Task, *more: object) -> str | None:
    """Identifies a task by its class and whole content; None where that cannot be pickled, so nothing may be reused."""
    try:
        content = pickle.dumps((type(task).__module__, type(task).__qualname__, vars(task), more))
    except (pickle.PicklingError, AttributeError, TypeError):
        return None
    return hashlib.sha256(content).hexdigest()


def _earlier_hashes(task: Task, split: str, seed: int) -> dict[int, np.ndarray]:
    """Hashes of the examples of every earlier split, by sequence length."""
    taken: dict[int, np.ndarray] = {}
    for earlier in SPLITS[: SPLITS.index(split)]:
        found: dict[int, list[np.ndarray]] = {}
        for cell in task.cells(earlier):
            found.setdefault(cell.length, []).append(_summary(task, earlier, cell, seed, taken).hashes)
        for length, hashes in found.items():
            taken[length] = np.concatenate([taken.get(length, _NO_HASHES), *hashes])
    return taken


def _replace_rows(batch: Batch, rows: np.ndarray, fresh: Batch) -> Batch:
    """`batch` with the selected rows taken from `fresh`."""
    new = fresh.arrays()
    replaced = {key: value.copy() for key, value in batch.arrays().items()}
    for key, value in replaced.items():
        value[rows] = new[key]
    return Batch.from_arrays(replaced)


def _concatenate(parts: Sequence[Batch]) -> Batch:
    """One batch of all rows."""
    named = [part.arrays() for part in parts]
    return parts[0] if len(parts) == 1 else Batch.from_arrays({key: np.concatenate([p[key] for p in named]) for key in named[0]})
