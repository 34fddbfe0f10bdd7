"""State tracking, copying, lookup, selective copy, induction and the two regression-like tasks."""

import numpy as np
import pytest
from scipy import stats

from synthetic_tasks import TASKS, accuracy, stream
from synthetic_tasks._groups import commutators, group_table, moved_points
from synthetic_tasks.copying import Copying
from synthetic_tasks.correlated_recall import CorrelatedRecall
from synthetic_tasks.group_word import GroupWord
from synthetic_tasks.in_context_regression import InContextRegression
from synthetic_tasks.induction import Induction
from synthetic_tasks.modular_counting import ModularCounting
from synthetic_tasks.ngram_lookup import NgramLookup
from synthetic_tasks.parity import Parity
from synthetic_tasks.phone_book import PhoneBook
from synthetic_tasks.selective_copy import SelectiveCopy


@pytest.mark.parametrize(
    ("name", "order", "n_commutators"),
    [("Z60", 60, 1), ("S3", 6, 3), ("S4", 24, 12), ("A4", 12, 4), ("A4xZ5", 60, 4), ("A5", 60, 60), ("S5", 120, 60)],
)
def test_groups(name: str, order: int, n_commutators: int):
    table = group_table(name)
    assert table.shape == (order, order)
    everything = np.arange(order)
    assert np.array_equal(table[0], everything) and np.array_equal(table[:, 0], everything)
    assert (np.sort(table, axis=1) == everything).all() and (np.sort(table, axis=0) == everything[:, None]).all()
    a, b, c = stream(0, name).integers(0, order, size=(3, 500))
    assert np.array_equal(table[table[a, b], c], table[a, table[b, c]])
    assert len(commutators(table)) == n_commutators


def test_prefix_products():
    task = GroupWord(group="S5")
    batch = task.sample(task.cells("test")[0], 20, stream(1))
    product = batch.inputs[:, 0]
    for t in range(1, 32):
        product = task.table[batch.inputs[:, t], product]
        assert np.array_equal(batch.targets[:, t], product)


def test_words_of_swaps():
    """Tokens move at most two points, yet their products reach the whole group; both guesses are what brute force finds."""
    task = GroupWord(group="S5", moved=2)
    assert task.tokens.size == 1 + 10 and moved_points("S5")[task.tokens].max() == 2
    batch = task.sample(task.cells("test")[0], 20_000, stream(12))
    assert np.isin(batch.inputs, task.tokens).all()
    assert np.unique(batch.targets[:, -1]).size == 120
    ceilings = task.ceilings(task.cells("test")[0])
    even = np.isin(batch.targets, commutators(task.table))
    chance = ignored = 0.0
    for labels, sign in zip(batch.targets.T, even.T, strict=True):
        chance += np.bincount(labels).max() / labels.size / 32
        ignored += sum(np.bincount(labels[sign == s], minlength=1).max() for s in (True, False)) / labels.size / 32
    assert ceilings["chance"] == pytest.approx(chance, abs=0.003)
    assert ceilings["order ignored"] == pytest.approx(ignored, abs=0.004)
    everything = GroupWord(group="S5")
    assert everything.ceilings(everything.cells("test")[0]) == pytest.approx({"chance": 1 / 120, "order ignored": 1 / 60})


@pytest.mark.parametrize("make", [Parity, ModularCounting, GroupWord])
def test_state_tracking_labels(make):
    last = make(labels="last")
    cell = last.cells("test")[0]
    batch = last.sample(cell, 2000, stream(2))
    assert (batch.mask.sum(axis=1) == 1).all() and batch.mask[:, -1].all()
    assert stats.chisquare(np.bincount(batch.targets[:, -1], minlength=last.vocab_size)).pvalue > 1e-3
    every = make().sample(cell, 10, stream(2))
    assert every.mask.all()


def test_counting_in_unit_steps():
    task = ModularCounting(modulus=7, increments="unit")
    batch = task.sample(task.cells("test")[0], 100, stream(3))
    assert set(np.unique(batch.inputs)) == {0, 1}
    assert np.array_equal(batch.targets[:, -1], batch.inputs.sum(axis=1) % 7)


def test_copying_by_ngram_match():
    task = Copying(alphabet=6)
    batch = task.sample(task.cells("test")[1], 300, stream(4))
    scores = {name: accuracy(guess, batch) for name, guess in task.shortcuts(batch).items()}
    assert scores["1-gram match"] < scores["2-gram match"] < scores["3-gram match"] < 1
    unique = batch.mask & ~batch.groups["repeated"]
    one = task.shortcuts(batch)["1-gram match"]
    after = unique & (np.arange(unique.shape[1]) > 33)
    assert (one[after] == batch.targets[after]).all()


@pytest.mark.parametrize("order", ["suffix", "prefix"])
def test_ngram_lookup(order: str):
    task = NgramLookup(order=order, alphabet=12)
    cell = task.cells("test")[1]
    batch = task.sample(cell, 300, stream(5))
    for row in range(300):
        tokens = batch.inputs[row].tolist()
        string, gram = (tokens[1:33], tokens[34:36]) if order == "suffix" else (tokens[4:36], tokens[1:3])
        places = [i for i in range(31) if string[i : i + 2] == gram]
        assert len(places) == 1
        assert string[places[0] + 2 : places[0] + 6] == batch.targets[row, batch.mask[row]].tolist()
    assert task.bits_needed(cell) == pytest.approx((32 if order == "suffix" else 6) * np.log2(12))


def test_phone_book_ceiling_is_exact():
    task = PhoneBook(names=8)
    cell = task.cells("test")[2]
    batch = task.sample(cell, 20_000, stream(6))
    names = batch.inputs[:, : 16 * 7].reshape(-1, 16, 7)[:, :, :2].astype(np.int64)
    assert (np.diff(np.sort(names[:, :, 0] * 100 + names[:, :, 1], axis=1), axis=1) > 0).all()
    assert (batch.targets[batch.groups["first digit"]] >= 6).all()
    measured = accuracy(task.shortcuts(batch)["last name only"], batch)
    assert abs(measured - task.ceilings(cell)["last name only"]) < 0.012
    assert PhoneBook(digits=10).bits_needed(cell) - PhoneBook(digits=9).bits_needed(cell) == pytest.approx(16 * np.log2(10))


def test_selective_copy_spacing():
    task = SelectiveCopy()
    batch = task.sample(task.cells("test")[0], 2000, stream(7))
    row, at = np.nonzero(batch.inputs >= 2)
    assert (np.bincount(row) == 8).all() and at.max() < 56
    assert stats.chisquare(np.bincount(at, minlength=56)).pvalue > 1e-3
    fixed = SelectiveCopy(spacing="fixed")
    assert (fixed.sample(fixed.cells("test")[0], 5, stream(7)).inputs[:, :8] >= 2).all()
    assert SelectiveCopy().bits_needed(SelectiveCopy().cells("test")[-1]) == pytest.approx(62.5, abs=0.05)


@pytest.mark.parametrize("cue", ["random", "fixed"])
def test_induction_cues_stand_once(cue: str):
    task = Induction(cue=cue)
    cell = task.cells("test")[0]
    batch = task.sample(cell, 300, stream(8))
    cues = int(cell.axes["cues"])
    for tokens, answers in zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True):
        body = tokens[:-cues]
        for cue_token, answer in zip(tokens[-cues:], answers[-cues:], strict=True):
            assert body.count(cue_token) == 1 and body[body.index(cue_token) + 1] == answer


def test_delta_rule_separates_correlated_keys_and_adding_does_not():
    task = CorrelatedRecall()
    cells = {cell.name: task.ceilings(cell) for cell in task.cells("test")}
    for name in ("8x50x16", "8x75x16"):
        assert cells[name]["additive memory"] < 0.7 and cells[name]["delta rule"] > 0.98
        assert cells[name]["least squares"] == 1
    assert cells["8x1x4"]["additive memory"] > 0.97, "without correlation adding is fine"
    keys = task.sample(task.cells("test")[4], 500, stream(9)).features[:, :8, :16]
    cosine = (keys @ keys.transpose(0, 2, 1))[:, ~np.eye(8, dtype=bool)]
    assert abs(cosine.mean() - 0.75) < 0.03


@pytest.mark.parametrize("kind", ["fixed", "nonzero_mean", "piecewise", "switching"])
def test_regression_bayes_predictor(kind: str):
    """Its error reaches the noise floor with many pairs and stays below any other predictor's with few."""
    task = InContextRegression(kind=kind)
    errors = [task.ceilings(cell) for cell in task.cells("test")]
    assert all(error["exact"] < error["additive memory"] < error["predict zero"] for error in errors)
    if kind != "switching":
        assert errors[-1]["exact"] == pytest.approx(0.01 * (1 + 8 / 128), rel=0.15)
    batch = task.sample(task.cells("test")[1], 400, stream(10))
    exact = task.solve(batch)
    worse = [((exact * scale - batch.values)[batch.mask] ** 2).mean() for scale in (1.0, 0.9, 1.1)]
    assert worse[0] == min(worse)


def test_regression_covariance():
    task = InContextRegression(condition=100.0)
    batch = task.sample(task.cells("test")[-1], 200, stream(11))
    spread = batch.features[..., :8].reshape(-1, 8).var(axis=0)
    assert spread[0] / spread[-1] == pytest.approx(100, rel=0.1)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("modular_counting", {"modulus": 1}, "use at least 2"),
        ("group_word", {"group": "Q8"}, "'Q8' is no group"),
        ("group_word", {"group": "S7"}, "too large"),
        ("group_word", {"group": "S5xS4"}, "too large"),
        ("group_word", {"group": "Z1"}, "nothing to predict"),
        ("group_word", {"group": "Z6", "moved": 2}, "Z6 are no permutations"),
        ("group_word", {"group": "A5", "moved": 2}, "use 3 or more"),
        ("copying", {"alphabet": 1}, "use at least 2"),
        ("copying", {"test_cells": "1:1"}, "use at least 2"),
        ("ngram_lookup", {"test_cells": "5:1"}, "use at least 6"),
        ("ngram_lookup", {"ngram": 1, "test_cells": "64:1"}, "use at most 52 letters"),
        ("ngram_lookup", {"answer": 0}, "start at 1"),
        ("phone_book", {"names": 5}, "use names=6"),
        ("phone_book", {"digits": 0}, "at least 1"),
        ("selective_copy", {"test_cells": "64x33:1"}, "use at most 32"),
        ("selective_copy", {"symbols": 1}, "at least 2"),
        ("induction", {"vocab_size": 8}, "8 cues"),
        ("induction", {"test_cells": "8x4:1"}, "use at most 3 cues"),
        ("correlated_recall", {"test_cells": "17x50x1:1"}, "at most key_dim=16"),
        ("correlated_recall", {"values": 1}, "at least 2"),
        ("in_context_regression", {"condition": 0.5}, "condition=0.5 at 1"),
        ("in_context_regression", {"test_cells": "1:1"}, "use at least 2"),
    ],
)
def test_bad_options(name: str, options: dict, words: str):
    with pytest.raises(ValueError, match=words):
        TASKS[name](**options)
