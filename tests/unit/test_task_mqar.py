"""MQAR against its definition."""

import numpy as np
import pytest
from scipy import stats

from synthetic_tasks import Cell, accuracy, build_split, example_hashes, stream
from synthetic_tasks.mqar import MQAR
from synthetic_tasks.mqar_overwrite import MQAROverwrite


def cell(length: int, pairs: int) -> Cell:
    return Cell("c", length, 1, {"length": length, "pairs": pairs})


def test_layout():
    task = MQAR(protocol="based_figure2")
    batch = task.sample(cell(64, 8), 500, stream(0))
    keys, values = batch.inputs[:, 0:16:2], batch.inputs[:, 1:16:2]
    assert keys.min() >= 1 and keys.max() <= 4095 and values.min() >= 4096 and values.max() <= 8191
    assert (batch.mask.sum(axis=1) == 8).all() and not batch.mask[:, :16].any() and not batch.mask[:, 17::2].any()
    for row in range(500):
        asked = np.flatnonzero(batch.mask[row])
        table = dict(zip(keys[row], values[row], strict=True))
        assert sorted(batch.inputs[row, asked]) == sorted(table), "each key is asked exactly once"
        assert [table[k] for k in batch.inputs[row, asked]] == batch.targets[row, asked].tolist()


def test_query_law_per_key():
    """The slot of the j-th key has the law of the j-th draw without replacement, a (g+1)^(a-1)."""
    batch = MQAR(protocol="based_figure2").sample(cell(28, 3), 20_000, stream(1))
    slots = np.stack([np.argmax((batch.inputs == batch.inputs[:, [2 * j]]) & batch.mask, axis=1) for j in range(3)], axis=1)
    slots = (slots - 6) // 2
    weights = 0.01 * np.arange(1, 12) ** (0.01 - 1)
    rng = np.random.default_rng(1)
    brute = np.stack([rng.choice(11, size=3, replace=False, p=weights / weights.sum()) for _ in range(20_000)])
    for j in range(3):
        table = np.stack([np.bincount(x[:, j], minlength=11) for x in (slots, brute)])
        assert stats.chi2_contingency(table).pvalue > 1e-3


def test_published_mean_slots():
    """Length 256 with 16 pairs: mean slot 20.5 for the first key and 34.7 for the last."""
    batch = MQAR(protocol="based_figure2", filler="zero").sample(cell(256, 16), 20_000, stream(2))
    for j, mean in [(0, 20.5), (15, 34.7)]:
        slot = (np.argmax((batch.inputs == batch.inputs[:, [2 * j]]) & batch.mask, axis=1) - 32) / 2
        assert abs(slot.mean() - mean) < 0.6


def test_fillers():
    def fill(name: str):
        batch = MQAR(filler=name, vocab_size=256).sample(cell(64, 8), 400, stream(3))
        return batch, ~batch.mask & (np.arange(64) >= 16)

    zero, where = fill("zero")
    assert (zero.inputs[where] == 0).all()
    random, where = fill("random")
    assert stats.chisquare(np.bincount(random.inputs[where], minlength=256)).pvalue > 1e-3
    clean, where = fill("clean")
    for row in range(400):
        assert not set(clean.inputs[row, where[row]]) & set(clean.inputs[row, :16])


def test_protocols():
    based = MQAR(protocol="based_figure2")
    assert [(c.name, c.examples) for c in based.cells("train")] == [
        ("64x4", 100_000), ("128x8", 20_000), ("256x16", 20_000), ("256x32", 20_000), ("256x64", 20_000),
    ]  # fmt: skip
    assert [c.name for c in based.cells("test")] == ["64x4", "64x8", "64x16", "128x32", "256x64", "512x128", "1024x256"]
    zoology = MQAR(protocol="zoology_figure2", setting="512x64")
    assert [c.name for c in zoology.cells("train")] == ["512x64"] and zoology.filler == "zero" and zoology.vocab_size == 8192
    guesses = [based.ceilings(c)["in-context guess"] for c in based.cells("test")]
    assert abs(np.mean(guesses) - 0.071) < 1e-3


@pytest.mark.parametrize(("pairs", "bits"), [(4, 48 + 43), (16, 192 + 148), (64, 767 + 471), (256, 3060 + 1376)])
def test_bits(pairs: int, bits: float):
    assert abs(MQAR(protocol="based_figure2").bits_needed(cell(1024, pairs)) - bits) < 1.5


def test_decay_axis():
    task = MQAR(test_cells="128x8:10", test_powers="0.01,1")
    assert [c.name for c in task.cells("test")] == ["128x8a0p01", "128x8a1"]
    early, late = (task.sample(c, 2000, stream(4)) for c in task.cells("test"))
    assert np.nonzero(early.mask)[1].mean() + 10 < np.nonzero(late.mask)[1].mean()
    assert abs(np.nonzero(late.mask)[1].mean() - 71) < 1.5


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"test_cells": "64x17:1"}, "17 pairs do not fit length 64, which holds 1 to 16"),
        ({"train_cells": "1024x200:1", "vocab_size": 256}, "vocab_size=256 has 127"),
        ({"power_a": 0.0}, "must be positive"),
        ({"test_powers": "1,x"}, "not a list of numbers"),
        ({"test_powers": "1,1"}, "distinct"),
    ],
)
def test_bad_options(options: dict, words: str):
    with pytest.raises(ValueError, match=words):
        MQAR(**options)


@pytest.mark.parametrize("updates", [0.5, 1.0, 2.0])
def test_overwrite(updates: float):
    task = MQAROverwrite(updates=updates, test_cells="128x8:1", train_cells="128x8:1")
    batch = task.sample(cell(128, 8), 1000, stream(5))
    count = int(8 * updates)
    written = batch.inputs[:, 1 : 2 * (8 + count) : 2]
    assert (np.diff(np.sort(written, axis=1), axis=1) > 0).all(), "all values of a sequence differ"
    assert accuracy(task.solve(batch), batch) == 1
    assert np.array_equal(batch.groups["updated"], batch.lures["stale"] >= 0)
    ignoring = task.shortcuts(batch)["ignores updates"]
    assert accuracy(ignoring, batch, "untouched") == 1 and accuracy(ignoring, batch, "updated") == 0
    assert abs(batch.groups["untouched"].sum() / batch.mask.sum() - (7 / 8) ** count) < 0.02


def test_overwrite_as_published_rewards_ignoring_updates():
    task = MQAROverwrite(compat="zoology", vocab_size=8192, train_cells="64x4:1", test_cells="2048x256:1")
    batch = task.sample(task.cells("test")[0], 20, stream(6))
    assert accuracy(task.shortcuts(batch)["ignores updates"], batch) == pytest.approx(1 - 4 / 256)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"test_cells": "64x14:1"}, "need 70 tokens"),
        ({"updates": 0.0}, "must be positive"),
        ({"vocab_size": 64}, "use vocab_size="),
    ],
)
def test_overwrite_bad_options(options: dict, words: str):
    with pytest.raises(ValueError, match=words):
        MQAROverwrite(**options)


@pytest.mark.slow
def test_published_splits_at_full_size():
    """180,000 training examples, all splits disjoint, and the exact solver right on every one of them."""
    task = MQAR(protocol="based_figure2")
    seen: dict[int, np.ndarray] = {}
    for split in ("train", "valid", "test"):
        batches = build_split(task, split, 0)
        assert sum(len(batch.inputs) for batch in batches.values()) == (180_000 if split == "train" else 7_000)
        for batch in batches.values():
            assert accuracy(task.solve(batch), batch) == 1
            hashes = example_hashes(batch)
            length = batch.inputs.shape[1]
            assert not np.isin(hashes, seen.get(length, np.empty(0, np.uint64))).any()
            if split != "test":
                seen[length] = np.concatenate([seen.get(length, np.empty(0, np.uint64)), hashes])
