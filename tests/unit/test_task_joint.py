"""Joint recall and conjunctive keys: the published faults, reproduced, and their repair."""

import numpy as np
import pytest
from scipy import stats

from synthetic_tasks import Cell, accuracy, binding_gain, effective_memory_length, stream
from synthetic_tasks._latin import COUNTS, latin_squares, latin_tables, log2_squares
from synthetic_tasks._metrics import measured
from synthetic_tasks.compositional_mqar import CompositionalMQAR
from synthetic_tasks.joint_recall import JointRecall
from synthetic_tasks.joint_recall_hax import JointRecallHAX
from synthetic_tasks.mqar_multihop import MQARMultihop


def test_latin_squares_are_uniform_over_the_576_of_order_4():
    squares = latin_squares(stream(0, "latin"), 40_000, 4)
    # The pool fixes the share of each isotopy class to within its own sampling error; inside a class the law is uniform.
    squares, counts = np.unique(squares.reshape(-1, 16), axis=0, return_counts=True)
    assert counts.size == COUNTS[4]
    klein = np.array([_is_klein(square.reshape(4, 4)) for square in squares])
    assert klein.sum() == 144 and abs(counts[klein].sum() / 40_000 - 144 / 576) < 0.05
    assert stats.chisquare(counts[klein]).pvalue > 1e-3 and stats.chisquare(counts[~klein]).pvalue > 1e-3


def _is_klein(square: np.ndarray) -> bool:
    """Whether a square of order 4 is isotopic to the Klein group's table: every row is an involution of the first."""
    steps = square[:, np.argsort(square[0])]
    return bool((np.take_along_axis(steps, steps, axis=1) == np.arange(4)).all())


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_tables_hold_every_symbol_once_a_line(dims: int):
    tables = latin_tables(stream(1), 50, 5, dims)
    for axis in range(1, dims + 1):
        assert (np.moveaxis(np.sort(tables, axis=axis), axis, -1) == np.arange(5)).all()


def test_latin_counts():
    assert log2_squares(4) == pytest.approx(np.log2(576))
    assert log2_squares(11) < log2_squares(12) < 12**2 * np.log2(12)


def test_published_marginal_solvers():
    """Mean over the published 144 cells: 81.1 % with elimination, and the other solvers' published-task scores."""
    task = JointRecallHAX(protocol="published")
    scores = [measured(task, cell, 12) for cell in task.cells("test")]
    expected = {
        "bag": 11.2, "bag, elimination": 16.7, "one marginal": 23.7, "one marginal, elimination": 39.3,
        "both marginals": 52.4, "both marginals, elimination": 81.1,
    }  # fmt: skip
    for name, percent in expected.items():
        assert abs(100 * np.mean([score[name] for score in scores]) - percent) < 2, name


def test_published_layout():
    task = JointRecallHAX(protocol="published", pad=True)
    cells = task.cells("train")
    assert len(cells) == 144 and {c.length for c in cells} == {1058} and sum(c.examples for c in cells) == 1_440_000
    cell = cells[-1]
    assert task.bits_needed(cell) == 1024
    batch = task.sample(cells[0], 50, stream(2))
    assert (batch.inputs[:, 0] == 1).all() and ((batch.inputs == 4).sum(axis=1) == 1).all()
    assert (batch.mask.sum(axis=1) == 25).all()
    row, at = np.nonzero(batch.mask)
    assert (batch.inputs[row, at] >= 26).all() and (batch.inputs[row, at] < 42).all()
    assert np.array_equal(batch.inputs[row, at + 1], batch.targets[row, at]), "the answer is shown after the key"


def test_conflict_subset_is_where_the_marginal_solver_fails():
    for task in (JointRecallHAX(), JointRecall()):
        batch = task.sample(task.cells("test")[1], 200, stream(3))
        name = "marginals" if isinstance(task, JointRecall) else "both marginals, elimination"
        assert accuracy(task.shortcuts(batch)[name], batch, "conflict") == 0
        assert accuracy(task.solve(batch), batch, "conflict") == 1


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_repaired_marginals_are_at_chance(levels: int):
    task = JointRecall(levels=levels, train_cells="4x16:1", test_cells="4x64:1")
    cell = task.cells("test")[0]
    batch = task.sample(cell, 1500, stream(4))
    assert accuracy(task.solve(batch), batch) == 1
    score = accuracy(task.shortcuts(batch)["marginals"], batch)
    assert abs(score - 1 / 4) < 0.01
    assert not np.isin(batch.targets[batch.mask].reshape(1500, -1)[:, :1], batch.inputs[:, -1:]).any()


def test_repaired_binding_at_the_published_size():
    task = JointRecall(train_cells="16x16:1", test_cells="16x64:1")
    cell = task.cells("test")[0]
    assert measured(task, cell, 300)["marginals"] <= 1 / 16 + 0.01
    independent = JointRecall(tables="iid", train_cells="16x16:1", test_cells="16x64:1")
    assert abs(measured(independent, cell, 300)["marginals"] - 0.35) < 0.02


def test_answers_are_hidden():
    task = JointRecall()
    batch = task.sample(task.cells("test")[2], 100, stream(5))
    tail = batch.inputs[:, -16 * 3 :].reshape(100, 16, 3)
    assert (tail[:, :, 2] == 3).all()
    assert (batch.mask[:, -16 * 3 :].reshape(100, 16, 3) == [False, True, False]).all()


@pytest.mark.parametrize(("values", "rate"), [("distinct", 1.0), ("latin", 1 / 3)])
def test_two_additive_memories(values: str, rate: float):
    """They solve the published compositional task and guess on the repaired one."""
    task = CompositionalMQAR(values=values)
    batch = task.sample(Cell("c", 128, 1, {"length": 128, "pairs": 9}), 3000, stream(6))
    assert accuracy(task.solve(batch), batch) == 1
    assert abs(accuracy(task.shortcuts(batch)["two additive memories"], batch) - rate) < 0.01


def test_multihop_follows_links():
    task = MQARMultihop()
    batch = task.sample(task.cells("test")[3], 20, stream(7))
    for row in range(20):
        link = dict(zip(batch.inputs[row, 0:16:2], batch.inputs[row, 1:16:2], strict=True))
        for at in np.flatnonzero(batch.mask[row]):
            key = batch.inputs[row, at]
            for _ in range(4):
                key = link[key]
            assert key == batch.targets[row, at]


def test_metrics():
    assert binding_gain(0.8, 0.6) == pytest.approx(0.5)
    assert np.isnan(binding_gain(1.0, 1.0))
    curve = {"chance": 0.05, "bayes 1": 0.1, "bayes 2": 0.3, "bayes 4": 0.7}
    assert effective_memory_length(0.5, curve) == pytest.approx(3)
    assert effective_memory_length(0.9, curve) == 4 and effective_memory_length(0.01, curve) == 0


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: JointRecallHAX(test_cells="17x5:1"), "use at most 16"),
        (lambda: JointRecall(test_cells="20x5:1"), "use a size of at most 16"),
        (lambda: JointRecall(levels=4), "use 1 .a dictionary"),
        (lambda: CompositionalMQAR(test_cells="64x8:1"), "use 4 or 9 pairs"),
        (lambda: CompositionalMQAR(test_cells="64x16:1"), "use at most 9 pairs"),
        (lambda: CompositionalMQAR(test_cells="1024x81:1", values="distinct"), "vocab_size=243"),
        (lambda: MQARMultihop(test_cells="4x4:1"), "must be fewer than its 4 pairs"),
        (lambda: MQARMultihop(test_cells="200x2:1"), "use at most 112 pairs"),
    ],
)
def test_bad_options(make, words: str):
    with pytest.raises(ValueError, match=words):
        make()
