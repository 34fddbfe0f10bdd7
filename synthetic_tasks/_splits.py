"""Splits of a task: cells drawn in blocks, disjoint by hash from the splits before them, with a digest of every byte.

Shape legend: N examples.
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

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
    """A hex digest of every byte of a split, to be stored with the results obtained on it."""
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
    batches = {}
    for cell in task.cells(split):
        parts, hashes = zip(*_draw(task, split, cell, seed, taken, workers), strict=True)
        _remember(task, split, cell, seed, np.concatenate(hashes))
        batches[cell.name] = _concatenate(parts)
    key = content_key(task, split, seed)
    if key is not None:
        _DIGESTS[key] = split_digest(batches)
    return batches


def split_hash(task: Task, split: str, seed: int) -> str:
    """`split_digest` of a split, which is not generated again if this process has built it."""
    key = content_key(task, split, seed)
    return _DIGESTS[key] if key in _DIGESTS else split_digest(build_split(task, split, seed))


def blocks(task: Task, split: str, cell: Cell, seed: int) -> Iterator[Batch]:
    """The examples of one cell in blocks of `BLOCK_ROWS`, for sets that exceed memory: the same bytes as `build_split`."""
    for batch, _ in _draw(task, split, cell, seed, _earlier_hashes(task, split, seed)):
        yield batch


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


_NO_HASHES = np.empty(0, dtype=np.uint64)
_HASHES: dict[str, np.ndarray] = {}
"""Hashes of the cells generated by this process, so that a split is not generated again to build the next one."""
_DIGESTS: dict[str | None, str] = {}
"""Digests of the splits generated by this process."""


def content_key(task: Task, *more: object) -> str | None:
    """Identifies a task by its class and whole content; None where that cannot be pickled, so nothing may be reused."""
    try:
        content = pickle.dumps((type(task).__module__, type(task).__qualname__, vars(task), more))
    except (pickle.PicklingError, AttributeError, TypeError):
        return None
    return hashlib.sha256(content).hexdigest()


def _remember(task: Task, split: str, cell: Cell, seed: int, hashes: np.ndarray) -> np.ndarray:
    """Keeps the hashes of a cell for the splits that follow."""
    key = content_key(task, split, seed, cell)
    if key is not None:
        _HASHES[key] = hashes
    return hashes


def _earlier_hashes(task: Task, split: str, seed: int) -> dict[int, np.ndarray]:
    """Hashes of the examples of every earlier split, by sequence length."""
    taken: dict[int, np.ndarray] = {}
    for earlier in SPLITS[: SPLITS.index(split)]:
        found: dict[int, list[np.ndarray]] = {}
        for cell in task.cells(earlier):
            hashes = _HASHES.get(content_key(task, earlier, seed, cell) or "")
            if hashes is None:
                drawn = [block for _, block in _draw(task, earlier, cell, seed, taken)]
                hashes = _remember(task, earlier, cell, seed, np.concatenate(drawn))
            found.setdefault(cell.length, []).append(hashes)
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
