"""The contract of every task in the catalog: a new file in `synthetic_tasks/` is tested here the day it appears."""

import inspect
import json
import os
from pathlib import Path

import numpy as np
import pytest

from synthetic_tasks import SPLITS, TASKS, Batch, Cell, Task, accuracy, build_split, example_hashes, split_digest, stream
from synthetic_tasks.time_generation import load_all

load_all()
NAMES = sorted(TASKS)
GOLDEN_FILE = Path(__file__).parent / "task_digests.json"
GOLDEN_OPTIONS: dict[str, dict] = {"mqar": {"vocab_size": 256, "test_cells": "64x4:1+64x16:1+128x32:1"}}
"""Options that keep a golden digest apart from the tuning of a task's default cells."""
ROWS = 48


def small_cells(made: Task) -> list[Cell]:
    """The first, middle and last cell of the test split."""
    cells = made.cells("test")
    return [cells[i] for i in sorted({0, len(cells) // 2, len(cells) - 1})]


def sample(made: Task, cell: Cell, *names: str | int) -> Batch:
    return made.sample(cell, ROWS, stream(0, *names, cell.name))


@pytest.fixture(scope="module", params=NAMES)
def made(request: pytest.FixtureRequest) -> Task:
    return TASKS[request.param]()


def test_options_are_keyword_only_and_typed(made: Task):
    parameters = list(inspect.signature(type(made).__init__).parameters.values())[1:]
    assert all(p.kind is p.KEYWORD_ONLY and p.default is not p.empty for p in parameters)
    plain = {"int", "float", "bool", "str"}
    assert all(p.annotation in plain or p.annotation.startswith("Literal['") for p in parameters), "texts are coerced to these"


def test_every_task_belongs_to_a_suite(made: Task):
    assert made.suite in {"recall", "selectivity", "mad", "state_tracking"}


def test_cells_are_distinct_and_named_safely(made: Task):
    for split in SPLITS:
        cells = made.cells(split)
        assert cells and len({cell.name for cell in cells}) == len(cells)
        assert all(cell.name.replace("-", "").isalnum() and cell.length > 0 and cell.examples > 0 for cell in cells)
    assert made.max_length() == max(cell.length for split in SPLITS for cell in made.cells(split))


def test_test_split_extrapolates_or_says_why_not(made: Task):
    """Length or load beyond the trained range is a first-class slice of every task."""
    trained = {axis: max(c.axes[axis] for c in made.cells("train")) for axis in made.cells("train")[0].axes}
    beyond = any(cell.axes.get(axis, 0) > top for cell in made.cells("test") for axis, top in trained.items())
    assert beyond or "extrapolat" in (type(made).__doc__ or ""), "no test cell beyond the trained range"


def test_batches_are_well_formed(made: Task):
    for cell in small_cells(made):
        batch = sample(made, cell, "form")
        shape = (ROWS, cell.length)
        assert batch.inputs.shape == batch.targets.shape == batch.mask.shape == shape
        assert batch.inputs.dtype == batch.targets.dtype == np.int32 and batch.mask.dtype == bool
        assert batch.mask.any(axis=1).all()
        assert batch.inputs.min() >= 0 and batch.inputs.max() < made.vocab_size
        for mask in batch.groups.values():
            assert mask.shape == shape and mask.dtype == bool and not (mask & ~batch.mask).any()
        for lure in batch.lures.values():
            assert lure.shape == shape and lure.dtype == np.int32 and lure.min() >= -1 and lure.max() < made.vocab_size
            assert not ((lure == batch.targets) & batch.mask & (lure >= 0)).any(), "a lure is a wrong answer"
        if made.target_kind == "tokens":
            labels = batch.targets[batch.mask]
            assert labels.min() >= 0 and labels.max() < made.vocab_size
        else:
            assert batch.values is not None and batch.values.shape == (*shape, made.value_dim)
            assert batch.values.dtype == np.float32
        if made.input_kind == "features":
            assert batch.features is not None and batch.features.shape == (*shape, made.feature_dim)
            assert batch.features.dtype == np.float32


def test_solver_reaches_the_stated_rate(made: Task):
    """The exact solver is right everywhere, or the task states its Bayes rate as the ceiling "exact"."""
    for cell in small_cells(made):
        batch = sample(made, cell, "solve")
        predictions = made.solve(batch)
        if made.target_kind == "real":
            assert predictions.shape == batch.values.shape
            assert np.isfinite(predictions[batch.mask]).all()
            continue
        stated = made.ceilings(cell).get("exact")
        assert accuracy(predictions, batch) >= (1.0 if stated is None else stated - 0.06)


def test_solver_reads_no_label_and_no_future(made: Task):
    """Predictions up to t are the same when labels are wiped and everything the model would read after t is garbled.

    This is also the proof that no label precedes its cue: the solver is exact and sees the past only.
    """
    rng = stream(0, "garble")
    for cell in small_cells(made) if made.readout == "positions" else []:
        batch = sample(made, cell, "causal")
        wiped = Batch(batch.inputs, np.zeros_like(batch.targets), batch.mask, features=batch.features)
        expected = made.solve(batch)
        assert np.array_equal(made.solve(wiped)[batch.mask], expected[batch.mask])
        cut = int(np.median(np.nonzero(batch.mask)[1])) + 1
        inputs = batch.inputs.copy()
        inputs[:, cut:] = rng.permuted(inputs[:, cut:], axis=1)
        features = None
        if batch.features is not None:
            features = batch.features.copy()
            features[:, cut:] = features[:, cut:][:, ::-1]
        garbled = Batch(inputs, wiped.targets, batch.mask, features=features)
        past = batch.mask & (np.arange(cell.length) < cut)
        assert np.allclose(made.solve(garbled)[past], expected[past], atol=1e-4)


def test_ceilings_and_bits(made: Task):
    for cell in small_cells(made):
        ceilings = made.ceilings(cell)
        assert ceilings and all(np.isfinite(value) and value >= 0 for value in ceilings.values())
        if made.target_kind == "tokens":
            assert "chance" in ceilings and max(ceilings.values()) <= 1
        assert made.bits_needed(cell) >= 0
        batch = sample(made, cell, "shortcut")
        shortcuts = made.shortcuts(batch)
        assert set(shortcuts) <= set(ceilings)
        assert all(predictions.shape == made.solve(batch).shape for predictions in shortcuts.values())


def tiny(name: str) -> dict[str, Batch]:
    made = TASKS[name](**GOLDEN_OPTIONS.get(name, {}))
    return {cell.name: made.sample(cell, 4, stream(7, name, cell.name)) for cell in small_cells(made)}


@pytest.mark.parametrize("name", NAMES)
def test_golden_digest(name: str):
    """The bytes of a tiny configuration; after a deliberate change of a generator run this with UPDATE_TASK_DIGESTS=1."""
    golden = json.loads(GOLDEN_FILE.read_text()) if GOLDEN_FILE.exists() else {}
    if os.environ.get("UPDATE_TASK_DIGESTS"):
        golden = {known: digest for known, digest in golden.items() if known in NAMES} | {name: split_digest(tiny(name))}
        GOLDEN_FILE.write_text(json.dumps(golden, indent=2, sort_keys=True) + "\n")
    assert split_digest(tiny(name)) == golden[name]


def test_one_seed_decides_every_byte(made: Task):
    cell = small_cells(made)[0]
    again = type(made)()
    first, same, other = (
        split_digest({"": task.sample(cell, 8, stream(seed, "x"))}) for task, seed in [(made, 3), (again, 3), (made, 4)]
    )
    assert first == same != other


@pytest.mark.parametrize("name", NAMES)
def test_splits_are_disjoint(name: str):
    made = TASKS[name]()
    shrunk = {s: tuple(Cell(c.name, c.length, min(c.examples, 96), c.axes) for c in made.cells(s)) for s in SPLITS}
    made.cells = shrunk.__getitem__  # type: ignore[method-assign]
    seen: dict[int, set[int]] = {}
    for split in SPLITS:
        batches = build_split(made, split, 5)
        found = [(cell.length, example_hashes(batches[cell.name]).tolist()) for cell in shrunk[split]]
        assert all(seen.get(length, set()).isdisjoint(hashes) for length, hashes in found)
        for length, hashes in found:
            seen.setdefault(length, set()).update(hashes)
