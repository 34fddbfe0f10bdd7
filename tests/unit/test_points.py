"""Grouping of runs into points and the choice of the learning rate, on hand-made records."""

from __future__ import annotations

import math
from typing import Any

import pytest

from bench.points import choose_lr, points
from bench.records import CellInfo, Metric, Provenance, RunRecord, StateInfo
from bench.spec import LayerSpec, ModelSpec, RunSpec, TaskSpec, TrainSpec, run_id


def run(
    lr: float = 1e-3,
    seed: int = 0,
    *,
    valid: float | None = 0.5,
    loss: float | None = 1.0,
    test: float | None = 0.5,
    status: Any = "done",
    code: str = "a",
    shared: str = "s",
    started: str = "2025-01-01T00:00:00Z",
    device: str = "cpu",
    model: dict[str, Any] | None = None,
    cells: dict[str, float] | None = None,
) -> RunRecord:
    spec = RunSpec(
        task=TaskSpec(name="mqar"),
        model=ModelSpec(layers=(LayerSpec(mixer="gla"),), **(model or {})),
        train=TrainSpec(lr=lr),
        seed=seed,
    )
    values = [("valid", "accuracy", "mean", valid), ("valid", "loss", "mean", loss), ("test", "accuracy", "mean", test)]
    values += [("test", "accuracy", name, value) for name, value in (cells or {}).items()]
    return RunRecord(
        run_id=run_id(spec, code),
        spec=spec,
        role=spec.role,
        status=status,
        mixer="gla",
        label="gla",
        parameters=10,
        state=StateInfo(seq_len=64, dtype="float32", true_bytes=100, published_bytes=90, read_bytes=80),
        cells=[
            CellInfo(name="easy", axes={}, ceilings={"chance": 0.1}, bits_needed=8),
            CellInfo(name="hard", axes={}, ceilings={"chance": 0.1}, bits_needed=80),
        ],
        metrics=[Metric(split=split, name=name, slice=part, value=v, n=9) for split, name, part, v in values if v is not None],
        device=device,
        precision="fp32",
        backend="torch",
        started=started,
        train_seconds=2.0,
        examples_per_second=100.0,
        provenance=Provenance(
            commit=None,
            dirty=None,
            diff_hash=None,
            code={"mixer:gla": code, "shared:trainer": shared},
            versions={},
            hardware={},
            command="bench",
        ),
    )


def test_best_validation_accuracy_wins():
    choice = choose_lr([run(0.1, 1000, valid=0.4), run(0.1, 1001, valid=0.6), run(0.2, 1000, valid=0.55)])
    assert choice.lr == 0.2
    assert choice.scores[0.1].accuracy == pytest.approx(0.5)
    assert choice.scores[0.1].n == 2


def test_test_scores_of_selection_runs_choose_nothing():
    records = [run(0.1, 1000, valid=0.4, test=0.9), run(0.2, 1000, valid=0.5, test=0.1), run(0.2, 0, test=0.2)]
    (point,) = points(records)
    assert (point.lr, point.accuracy.mean, point.seeds) == (0.2, 0.2, {0: 0.2})


def test_ties_go_to_the_lower_loss_and_then_to_the_smaller_rate():
    assert choose_lr([run(0.1, 1000, loss=2.0), run(0.2, 1000, loss=1.0)]).lr == 0.2
    assert choose_lr([run(0.2, 1000), run(0.1, 1000)]).lr == 0.1


def test_diverged_counts_as_zero_and_failed_not_at_all():
    diverged = [run(0.1, 1000, valid=0.9), run(0.1, 1001, status="diverged", valid=None), run(0.2, 1000, valid=0.5)]
    choice = choose_lr(diverged)
    assert (choice.lr, choice.scores[0.1].accuracy, choice.scores[0.1].loss) == (0.2, 0.45, math.inf)
    failed = [run(0.1, 1000, valid=0.9), run(0.1, 1001, status="failed", valid=None), run(0.2, 1000, valid=0.5)]
    assert choose_lr(failed).lr == 0.1
    assert choose_lr([run(0.1, 1000, status="oom", valid=None)]).lr is None


def test_a_rate_that_lost_runs_gives_way_to_a_more_complete_one():
    lucky = [run(0.1, 1000, valid=0.9), *(run(0.1, seed, status="failed", valid=None) for seed in (1001, 1002))]
    whole = [run(0.2, 1000 + seed, valid=0.5) for seed in range(3)]
    choice = choose_lr([*lucky, *whole])
    assert (choice.lr, choice.scores[0.1].n, choice.scores[0.2].n) == (0.2, 1, 3)
    equal = [run(0.2, 1000, valid=0.5), *(run(0.2, seed, status="oom", valid=None) for seed in (1001, 1002))]
    assert choose_lr([*lucky, *equal]).lr == 0.1


def test_point_reports_the_test_split_at_the_chosen_rate():
    records = [run(0.1, 1000, valid=0.3), run(0.2, 1000, valid=0.8)]
    records += [run(0.2, seed, test=value) for seed, value in enumerate((0.6, 0.7, 0.8))]
    records.append(run(0.1, 0, test=1.0))
    (point,) = points(records)
    assert point.lr == 0.2
    assert point.lr_source == "validation accuracy of 1 selection seed"
    assert point.seeds == {0: 0.6, 1: 0.7, 2: 0.8}
    assert point.accuracy.mean == pytest.approx(0.7)
    assert point.accuracy.low == pytest.approx(0.7 - 0.2484138, abs=1e-6)
    assert point.statuses == {"done": 6}
    assert [(trial.lr, trial.seed) for trial in point.trials] == [(0.1, 0), (0.1, 1000), (0.2, 0), (0.2, 1), (0.2, 2), (0.2, 1000)]
    assert (point.bits_needed, point.train_seconds, point.examples_per_second) == (80, 2.0, 100.0)
    assert point.warnings == []


def test_slices_are_means_over_the_reported_seeds():
    (point,) = points([run(seed=0, cells={"easy": 1.0, "hard": 0.2}), run(seed=1, cells={"easy": 0.8, "hard": 0.4})])
    assert point.slices == pytest.approx({"easy": 0.9, "hard": 0.3})
    assert point.accuracy.kind == "range of 2 seeds"


def test_a_single_rate_needs_no_selection():
    (point,) = points([run(seed=0), run(seed=1)])
    assert (point.lr, point.lr_source) == (1e-3, "the only rate tried")


def test_rates_without_selection_seeds_are_chosen_with_a_warning():
    (point,) = points([run(0.1, valid=0.2), run(0.2, valid=0.9)])
    assert point.lr == 0.2
    assert any("chosen on the reported seeds" in text for text in point.warnings)


def test_selection_alone_has_no_accuracy():
    (point,) = points([run(0.1, 1000, valid=0.3), run(0.2, 1000, valid=0.8)])
    assert point.accuracy.mean is None
    assert point.warnings == ["no reported run at the chosen learning rate yet"]


def test_lost_seeds_are_left_out_and_said():
    (point,) = points([run(seed=0, test=0.4), run(seed=1, test=None, valid=None, status="diverged")])
    assert (point.accuracy.mean, point.accuracy.n) == (0.4, 1)
    assert point.warnings == ["the mean leaves out reported seeds that did not finish (1 diverged)"]
    assert [record.spec.seed for record in point.failures] == [1]


def test_the_newest_record_of_a_spec_counts():
    old = run(code="a", test=0.1, started="2025-01-01T00:00:00Z")
    new = run(code="b", test=0.9, started="2025-01-02T00:00:00Z")
    (point,) = points([new, old])
    assert (point.accuracy.mean, point.accuracy.n) == (0.9, 1)
    assert any("set aside" in text for text in point.warnings)


def test_runs_of_an_older_mixer_count_nowhere():
    old = [run(0.1, seed, code="a", test=0.9, started="2025-01-01T00:00:00Z") for seed in range(5)]
    old.append(run(0.3, 1000, code="a", valid=0.99, started="2025-01-01T00:00:00Z"))  # at a rate that is not tried any more
    new = [run(lr, 1000, code="b", valid=lr, started="2025-01-02T00:00:00Z") for lr in (0.1, 0.2)]
    new += [run(0.2, seed, code="b", test=0.1, started="2025-01-02T00:00:00Z") for seed in range(3)]
    (point,) = points([*old, *new])
    assert (point.lr, point.seeds) == (0.2, {0: 0.1, 1: 0.1, 2: 0.1})
    assert point.warnings == ["6 run(s) of older mixer or task code were set aside for newer ones"]


def test_mixed_code_and_devices_are_said():
    (point,) = points([run(seed=0, shared="s"), run(seed=1, shared="t", device="cuda")])
    assert point.accuracy.n == 2
    assert any("different versions of the code" in text for text in point.warnings)
    assert any("different devices: cpu, cuda" in text for text in point.warnings)


def test_names_say_what_tells_points_apart():
    small, large = points([run(model={"d_model": 64}), run(model={"d_model": 128})])
    assert {small.name, large.name} == {"gla d_model=64", "gla d_model=128"}
    (alone,) = points([run()])
    assert alone.name == "gla"
    first, second = points([run(), run(model={"frame": "prenorm", "n_layers": 4})])
    assert {first.name, second.name} == {"gla frame=zoology n_layers=2", "gla frame=prenorm n_layers=4"}
