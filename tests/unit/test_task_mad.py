"""MAD's six tasks: published sizes and laws, and what the faithful switch changes."""

import numpy as np
import pytest
from scipy import stats

from synthetic_tasks import TASKS, accuracy, stream
from synthetic_tasks._mad import seen_before
from synthetic_tasks.mad_compression import MADCompression
from synthetic_tasks.mad_fuzzy_recall import MADFuzzyRecall
from synthetic_tasks.mad_in_context_recall import MADInContextRecall
from synthetic_tasks.mad_memorization import MADMemorization
from synthetic_tasks.mad_noisy_recall import MADNoisyRecall
from synthetic_tasks.mad_selective_copy import MADSelectiveCopy


@pytest.mark.parametrize(
    ("name", "bits", "chance"),
    [
        ("mad_in_context_recall", 24, 0.125),
        ("mad_noisy_recall", 24, 0.125),
        ("mad_selective_copy", 60.9, 1 / 14),
        ("mad_compression", 121, 1 / 15),
    ],
)
def test_published_bits_and_chance(name: str, bits: float, chance: float):
    task = TASKS[name]()
    cell = task.cells("test")[0]
    assert abs(task.bits_needed(cell) - bits) < 0.2
    assert task.ceilings(cell)["chance"] == pytest.approx(chance)
    assert task.cells("train")[0].examples == 12_800 and cell.examples == 1_280


def test_seen_before_by_brute_force():
    rng = np.random.default_rng(0)
    ids, valid = rng.integers(0, 5, size=(40, 12)), rng.random((40, 12)) < 0.7
    first = seen_before(ids, valid)
    for row in range(40):
        for j in range(12):
            same = [i for i in range(j) if valid[row, i] and valid[row, j] and ids[row, i] == ids[row, j]]
            assert first[row, j] == (same[0] if same else j)


@pytest.mark.parametrize("make", [MADInContextRecall, MADNoisyRecall])
def test_recall_labels_every_repeat_and_the_probe(make):
    task = make()
    batch = task.sample(task.cells("test")[0], 200, stream(0))
    for row in range(200):
        seen: dict[int, int] = {}
        for t in range(0, 128, 2):
            key, value = batch.inputs[row, t : t + 2]
            if key >= task.keys + task.values:
                assert not batch.mask[row, t]
                continue
            assert batch.mask[row, t] == (key in seen)
            assert seen.setdefault(key, value) == value
        assert batch.mask[row, 126] and not batch.mask[row, 1::2].any()


def test_noise_rate():
    task = MADNoisyRecall(noise=0.4)
    batch = task.sample(task.cells("test")[0], 2000, stream(1))
    assert abs((batch.inputs[:, ::2] >= 16).mean() - 0.4 * 62 / 64) < 0.01


@pytest.mark.parametrize("name", ["mad_in_context_recall", "mad_noisy_recall", "mad_fuzzy_recall"])
def test_faithful_training_labels_every_next_token(name: str):
    task = TASKS[name](compat="mad")
    train = task.sample(task.cells("train")[0], 50, stream(2))
    assert train.mask[:, :-1].all() and not train.mask[:, -1].any()
    assert np.array_equal(train.targets[:, :-1], train.inputs[:, 1:])
    test = task.sample(task.cells("test")[0], 50, stream(2))
    assert test.mask.mean() < 0.6
    assert accuracy(task.solve(train), train, "answer") == 1


def test_fuzzy_motifs():
    task = MADFuzzyRecall()
    batch = task.sample(task.cells("test")[0], 400, stream(3))
    key_runs = []
    for tokens in batch.inputs.tolist():
        kinds = "".join("p" if t == 15 else "k" if t < 7 else "v" for t in tokens)
        kinds = kinds.lstrip("p")
        assert "p" not in kinds, "pads stand on the left only"
        key_runs += [len(run) for run in kinds.replace("v", " ").split()]
    lengths = np.bincount(key_runs, minlength=4)[1:4] / len(key_runs)
    assert max(key_runs) <= 3 and abs(lengths - 1 / 3).max() < 0.03
    assert (batch.inputs[:, 0] == 15).mean() > 0.5
    faithful = MADFuzzyRecall(compat="mad")
    few = faithful.sample(faithful.cells("test")[0], 400, stream(3)).mask.sum(axis=1).mean()
    assert few < 0.5 * batch.mask.sum(axis=1).mean(), "three-token keys are hardly ever repeated"


@pytest.mark.parametrize(("compat", "always"), [("mad", True), ("none", False)])
def test_published_selective_copy_ends_in_a_letter(compat: str, always: bool):
    task = MADSelectiveCopy(compat=compat)
    batch = task.sample(task.cells("test")[0], 500, stream(4))
    assert (batch.inputs[:, 256 - 18] < 14).all() == always
    places = np.nonzero(batch.inputs[:, :239] < 14)[1]
    if not always:
        assert stats.kstest((places + 0.5) / 239, "uniform").pvalue > 1e-3


def test_compression_reads_out_at_the_last_position():
    assert MADCompression.readout == "last"
    faithful = MADCompression(compat="mad")
    batch = faithful.sample(faithful.cells("test")[0], 10, stream(5))
    assert batch.mask.all() and (batch.inputs[:, -1] == 15).all()
    assert not MADCompression().sample(faithful.cells("test")[0], 10, stream(5)).mask[:, -1].any()


def test_memorisation_has_one_dictionary():
    first, other = MADMemorization(), MADMemorization(map_seed=1)
    assert np.array_equal(first.dictionary, MADMemorization().dictionary)
    assert not np.array_equal(first.dictionary, other.dictionary)
    assert len(set(MADMemorization(compat="mad").dictionary)) == first.keys
    assert first.dictionary.min() >= first.keys and first.dictionary.max() < 255


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("mad_in_context_recall", {"test_cells": "127:1"}, "must be even"),
        ("mad_noisy_recall", {"vocab_size": 17}, "use at least 18"),
        ("mad_noisy_recall", {"noise": 1.0}, "below 1"),
        ("mad_fuzzy_recall", {"vocab_size": 6}, "use at least 7"),
        ("mad_fuzzy_recall", {"test_cells": "8:1"}, "use at least 12"),
        ("mad_selective_copy", {"test_cells": "32x16:1"}, "use at most 15 letters"),
        ("mad_selective_copy", {"vocab_size": 3}, "use at least 4"),
        ("mad_compression", {"test_cells": "1:1"}, "use at least 2"),
        ("mad_memorization", {"vocab_size": 4}, "use at least 5"),
        ("mad_memorization", {"test_cells": "31:1"}, "must be even"),
    ],
)
def test_bad_options(name: str, options: dict, words: str):
    with pytest.raises(ValueError, match=words):
        TASKS[name](**options)
