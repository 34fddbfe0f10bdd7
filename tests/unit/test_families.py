"""Families of tasks: their sweeps, their scores, and what is refused."""

from __future__ import annotations

import pytest

from bench import catalog
from bench.build import build_task
from bench.commands.suite import suite_sweep
from bench.errors import UserError
from bench.families import OVERALL, cell_score, family_table, task_score
from bench.points import points
from bench.recipes.laptop import laptop
from bench.recipes.suite import CELLS, quick_task, suite
from bench.report.families import family_map, shortcut_lines
from bench.report.frames import task_rows
from tests.unit.test_points import run


def made(mixer: str, task: str, family: str, value: float):
    record = run(cells={"easy": value, "hard": value / 2})
    spec = record.spec.model_copy(update={"task": record.spec.task.model_copy(update={"name": task})})
    cells = [record.cells[0], record.cells[1].model_copy(update={"trained": False})]
    update = {"spec": spec, "family": family, "cells": cells, "mixer": mixer, "label": mixer}
    spec = spec.model_copy(update={"model": spec.model.model_copy(update={"alias": mixer, "d_model": len(mixer)})})
    return record.model_copy(update={**update, "spec": spec})


def test_every_task_has_a_quick_version_that_can_be_built():
    assert set(CELLS) == set(catalog.names("task"))
    for name in CELLS:
        task = build_task(quick_task(name))
        tokens = sum(cell.length * cell.examples for cell in task.cells("train"))
        assert 100_000 < tokens <= 800_000, name
        beyond = any(not task.trained(cell) for cell in task.cells("test"))
        assert beyond or name == "mad_compression", name


def test_suites_hold_the_tasks_of_their_family():
    for family in ("recall", "selectivity", "mad", "state_tracking"):
        names = {experiment.task.name for experiment in suite(suite=family).experiments}
        assert names and {catalog.load("task", name).suite for name in names} == {family}
    everything = suite(suite="all", preset="laptop")
    assert {experiment.task.name for experiment in everything.experiments} == set(CELLS)


def test_the_laptop_recipe_reads_small_sets_more_than_once():
    assert laptop(task="mad_memorization").experiments[0].train.epochs > 50
    assert laptop(task="parity").experiments[0].train.epochs == 1


@pytest.mark.parametrize(
    ("suite_name", "preset", "others", "words"),
    [
        ("mda", None, (None, None), "Did you mean 'mad'"),
        ("mad", "fast", (None, None), "allowed: laptop, quick"),
        ("mad", None, ("mqar", None), "leave out --task and --recipe"),
        (None, "quick", ("mqar", None), "add --suite"),
    ],
)
def test_what_makes_no_sense_is_refused(suite_name, preset, others, words):
    with pytest.raises(UserError, match=words):
        suite_sweep(suite_name, preset, others=others)


def test_scores_run_from_chance_to_the_exact_solver():
    assert cell_score(0.1, {"chance": 0.2}) == 0
    assert cell_score(0.6, {"chance": 0.2}) == pytest.approx(0.5)
    assert cell_score(0.9, {"chance": 0.1, "exact": 0.9}) == 1
    assert cell_score(0.5, {"chance": 1.0}) == 0


def test_means_over_tasks_families_and_ranges():
    records = [made("gla", "mqar", "recall", 1.0), made("gla", "parity", "state_tracking", 0.1)]
    records += [made("hyena", "mqar", "recall", 0.55)]
    shown = points(records)
    table = family_table(shown)
    easy, hard = 1.0, (0.5 - 0.1) / 0.9
    assert table.names == ["gla", "hyena"]
    assert table.scores["gla", "mqar"] == pytest.approx((easy + hard) / 2)
    assert table.means["gla", "recall"] == table.scores["gla", "mqar"]
    assert table.means["gla", OVERALL] == pytest.approx(table.means["gla", "recall"] / 2)
    assert table.means["hyena", "state_tracking"] is None and table.means["hyena", OVERALL] is None
    best = next(point for point in shown if (point.name, point.task) == ("gla", "mqar"))
    assert (task_score(best, trained=True), task_score(best, trained=False)) == (easy, pytest.approx(hard))
    drawn = family_map(shown, task_rows(shown))
    assert drawn is not None
    assert [column["label"] for column in drawn["columns"]][-1] == f"mean of {OVERALL}"
    assert len(drawn["rows"][0]["scores"]) == len(drawn["columns"]) == 5


def test_lines_are_chance_and_the_best_shortcut():
    assert shortcut_lines({"chance": 0.1, "bayes 1": 0.4, "bayes 8": 0.9, "exact": 1.0}) == {"chance": 0.1, "bayes 8": 0.9}
    found = shortcut_lines({"predict zero": 0.0, "additive memory": 0.5, "exact": 0.95})
    assert found == {"additive memory": 0.5, "best possible": 0.95}
