"""Splits: streaming, reuse of earlier splits, refusal of exhausted tasks, cell texts."""

import numpy as np
import pytest

from synthetic_tasks import (
    TASKS,
    Batch,
    Cell,
    Task,
    _splits,
    accuracy,
    blocks,
    build_split,
    split_digest,
    split_hash,
    stream,
    time_generation,
    training_block,
)
from synthetic_tasks._cells import parse_cells, parse_splits
from synthetic_tasks._metrics import measured
from synthetic_tasks.joint_recall import JointRecall
from synthetic_tasks.mqar import MQAR


class Tiny(Task):
    """Random bits to be repeated."""

    name = "tiny"
    vocab_size = 2

    def __init__(self, length: int = 3, examples: int = 40):
        self.length, self.examples = length, examples

    def cells(self, split):
        return (Cell("only", self.length, self.examples),)

    def sample(self, cell, examples, rng):
        inputs = rng.integers(0, 2, size=(examples, cell.length)).astype(np.int32)
        return Batch(inputs, inputs, np.ones_like(inputs, dtype=bool), {"g": inputs > 0}, {"l": 1 - inputs})

    def ceilings(self, cell):
        return {"chance": 0.5}

    def bits_needed(self, cell):
        return 1.0

    def solve(self, batch):
        return batch.inputs


def test_an_exhausted_task_is_refused():
    with pytest.raises(ValueError, match="too few distinct examples"):
        build_split(Tiny(), "valid", 0)


def test_clashing_rows_are_redrawn_with_all_their_arrays():
    task = Tiny(length=11, examples=300)
    train, test = (build_split(task, split, 0)["only"] for split in ("train", "test"))
    assert not {tuple(row) for row in train.inputs.tolist()} & {tuple(row) for row in test.inputs.tolist()}
    assert np.array_equal(test.groups["g"], test.inputs > 0) and np.array_equal(test.lures["l"], 1 - test.inputs)


def test_blocks_have_the_bytes_of_the_split(monkeypatch):
    monkeypatch.setattr(_splits, "BLOCK_ROWS", 64)
    task = MQAR(train_cells="32x4:150", test_cells="32x4:150+64x4:10")
    for split in ("train", "test"):
        whole = build_split(task, split, 1)
        for cell in task.cells(split):
            parts = list(blocks(task, split, cell, 1))
            assert [len(part.inputs) for part in parts] == ([64, 64, 22] if cell.examples == 150 else [10])
            assert np.array_equal(np.concatenate([part.targets for part in parts]), whole[cell.name].targets)


def test_the_hash_of_a_split_needs_no_second_drawing(monkeypatch):
    task = MQAR(train_cells="32x4:93", test_cells="32x4:31")
    fresh = [split_hash(MQAR(train_cells="32x4:93", test_cells="32x4:31"), split, 6) for split in ("train", "test")]
    assert len({*fresh, split_hash(task, "train", 7), split_hash(MQAR(train_cells="32x4:94"), "train", 6)}) == 4
    build_split(task, "train", 6)
    build_split(task, "test", 6)
    monkeypatch.setattr(MQAR, "sample", None)
    assert [split_hash(task, split, 6) for split in ("train", "test")] == fresh


@pytest.mark.parametrize("workers", [2, 3, 8])
def test_any_number_of_workers_gives_the_same_bytes(monkeypatch, workers: int):
    monkeypatch.setattr(_splits, "BLOCK_ROWS", 32)
    task = JointRecall(train_cells="4x8:300", test_cells="4x8:70+5x8:33")
    for split in ("train", "test"):
        assert split_digest(build_split(task, split, 1, workers=workers)) == split_digest(build_split(task, split, 1))


def test_blocks_of_training_can_be_drawn_alone(monkeypatch):
    monkeypatch.setattr(_splits, "BLOCK_ROWS", 32)
    task = MQAR(train_cells="32x4:70")
    (cell,), whole = task.cells("train"), build_split(task, "train", 3)["32x4"]
    for index, rows in ((2, slice(64, 70)), (0, slice(0, 32))):
        assert np.array_equal(training_block(task, cell, 3, index).inputs, whole.inputs[rows])


def test_earlier_splits_are_generated_once(monkeypatch):
    drawn = []
    sample = MQAR.sample
    monkeypatch.setattr(MQAR, "sample", lambda self, cell, n, rng: drawn.append(n) or sample(self, cell, n, rng))
    for split in ("train", "valid", "test"):
        build_split(MQAR(train_cells="32x4:151", test_cells="32x4:51"), split, 99)
    assert sorted(drawn) == [51, 51, 151]


def test_a_task_that_cannot_be_pickled_works_without_reuse():
    task = Tiny(length=11, examples=60)
    task.hook = lambda: None
    train, test = (build_split(task, split, 0)["only"] for split in ("train", "test"))
    assert not {tuple(row) for row in train.inputs.tolist()} & {tuple(row) for row in test.inputs.tolist()}
    assert measured(task, task.cells("test")[0], exact=True) == {"exact": 1.0}


def test_timing_command(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["time_generation", "--task", "parity", "--examples", "8", "--long"])
    time_generation.main()
    assert "length   512" in capsys.readouterr().out
    assert sorted(time_generation.LONG) == sorted(TASKS), "every task is timed"
    for name in time_generation.LONG:
        (cell,) = time_generation.long_task(name).cells("test")
        assert 440 <= cell.length <= 520, name


def test_streams_with_different_paths_differ():
    draws = {stream(0, *path).integers(2**62) for path in [("a",), ("b",), ("a", "b"), ("a", 0)]} | {stream(1, "a").integers(2**62)}
    assert len(draws) == 5


def test_digest_covers_every_array():
    batch = build_split(Tiny(length=9), "train", 0)["only"]
    for key, array in batch.arrays().items():
        changed = Batch.from_arrays({**batch.arrays(), key: array ^ 1 if array.dtype != bool else ~array})
        assert split_digest({"only": changed}) != split_digest({"only": batch}), key


def test_accuracy_is_the_mean_over_examples():
    zeros = np.zeros((2, 4), dtype=np.int32)
    mask = np.array([[1, 1, 1, 1], [1, 0, 0, 0]], dtype=bool)
    batch = Batch(zeros, zeros, mask, {"late": mask & (np.arange(4) > 0)})
    predictions = np.array([[0, 0, 0, 0], [1, 0, 0, 0]])
    assert accuracy(predictions, batch) == 0.5
    assert accuracy(predictions, batch, "late") == 1.0


def test_cells_as_text():
    assert parse_cells("64x4:10 + 8x2:1", ("length", "pairs")) == (
        Cell("64x4", 64, 10, {"length": 64, "pairs": 4}),
        Cell("8x2", 8, 1, {"length": 8, "pairs": 2}),
    )
    splits = parse_splits(("length",), train="8:1", valid="", test="16:2")
    assert splits["valid"] == splits["test"]


@pytest.mark.parametrize(
    "text", ["", "64:10", "64x4", "64x4:", "ax4:10", "64x4x2:10", "64x4:10+", "64x4:0", "0x4:1", "8x2:1+8x2:2"]
)
def test_bad_cells_are_refused(text: str):
    with pytest.raises(ValueError, match=r"cell"):
        parse_cells(text, ("length", "pairs"))
