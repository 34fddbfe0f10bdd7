"""Published values: the files, the recipes that stand for them, and the comparison."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench import catalog, published
from bench.build import build_model, build_task
from bench.errors import UserError
from bench.outcome import state_info
from bench.points import Point, points
from bench.records import Metric, Provenance, RunRecord, StateInfo
from bench.selection import published_selection
from bench.spec import SELECTION_SEED, run_id
from bench.sweep import Experiment, Sweep

UNCHARGED_CONV = ("based_figure2",)
"""Figures whose bytes leave out the short convolution of three elements a channel."""


def record(experiment: Experiment, test: float | None, seed: int = 0, lr: float | None = None, **fields: object) -> RunRecord:
    spec = experiment.run(lr or experiment.lrs[0], seed)
    values = [] if test is None else [("test", test), ("valid", test)]
    return RunRecord(
        run_id=run_id(spec, "code"),
        spec=spec,
        role=spec.role,
        mixer=spec.model.mixer(),
        label=spec.model.label(),
        parameters=1,
        state=StateInfo(seq_len=1024, dtype="float32", true_bytes=8, published_bytes=8, read_bytes=8),
        cells=[],
        metrics=[Metric(split=split, name="accuracy", slice="mean", value=value, n=9) for split, value in values],  # type: ignore[arg-type]
        device="cpu",
        precision="fp32",
        backend="torch",
        started="2025-01-01T00:00:00Z",
        provenance=Provenance(
            commit=None, dirty=None, diff_hash=None, code={}, versions={}, hardware={}, command="bench synthetic"
        ),
        **{"status": "done", **fields},
    )


@pytest.fixture(scope="module")
def plot() -> tuple[published.Figure, Sweep]:
    return published.load("readme_plot"), catalog.load("recipe", "readme_plot")()


def as_published(plot: tuple[published.Figure, Sweep], changed: dict[str, tuple[float, ...]] | None = None) -> list[Point]:
    """Points with exactly the published values, but for those of `changed`: values by seed."""
    figure, sweep = plot
    made: list[RunRecord] = []
    for target in figure.targets:
        for experiment in filter(target.fits, sweep.experiments):
            values = (changed or {}).get(target.point, (target.value,))
            made += [record(experiment, value, seed) for seed, value in enumerate(values)]
    return points(made)


def verdicts(comparison: published.Comparison) -> dict[str, str]:
    return {item.target.point: item.verdict for item in comparison.values}


@pytest.mark.parametrize("recipe", published.recipes())
def test_every_target_has_its_models_in_the_recipe_and_none_is_left_over(recipe: str) -> None:
    figure, sweep = published.load(recipe), catalog.load("recipe", recipe)()
    used: list[Experiment] = []
    for target in figure.targets:
        fitting = [experiment for experiment in sweep.experiments if target.fits(experiment)]
        assert len(fitting) == len(target.mixers), target.point
        used += fitting
    assert sorted(map(hash, used)) == sorted(map(hash, sweep.experiments))
    names = [target.point for target in figure.targets]
    assert len(set(names)) == len(names)
    for order in figure.orders:
        assert {name for group in order.order for name in group} <= set(names), order.text


@pytest.mark.parametrize("recipe", published.recipes())
def test_published_orders_follow_from_the_published_values(recipe: str) -> None:
    figure = published.load(recipe)
    values = {target.point: target.value for target in figure.targets}
    for order in figure.orders:
        for above, below in zip(order.order, order.order[1:], strict=False):
            assert min(values[name] for name in above) > max(values[name] for name in below), order.text


@pytest.mark.parametrize("recipe", ["readme_plot", "based_figure2"])
def test_models_have_the_published_bytes(recipe: str) -> None:
    sweep = catalog.load("recipe", recipe)()
    task = build_task(sweep.experiments[0].task)
    for target in published.load(recipe).targets:
        for experiment in filter(target.fits, sweep.experiments):
            model = build_model(experiment.run(1e-3, 0), task, torch.device("meta"))
            has_conv = experiment.model.layers[0].mixer == "base_conv"
            conv = 12 * experiment.model.d_model if has_conv and recipe in UNCHARGED_CONV else 0
            assert state_info(model, task, "fp32").published_bytes - conv == target.state_bytes, target.point


def test_the_protocol_of_the_mixture(plot) -> None:
    for experiment in plot[1].experiments:
        task, train = build_task(experiment.task), experiment.train
        assert (train.batch_size, train.epochs, train.weight_decay, train.shuffle) == (256, 32, 0.1, "none")
        assert (train.schedule, train.warmup_steps, experiment.model.embed_dropout) == ("cosine_epoch", 0, 0.1)
        assert [round(lr, 5) for lr in experiment.lrs] == [0.001, 0.00316, 0.01, 0.03162]
        assert experiment.model.n_layers == 2 and experiment.model.frame == "zoology"
    assert [(cell.name, cell.examples) for cell in task.cells("train")] == [
        ("64x4", 100_000), ("128x8", 20_000), ("256x16", 20_000), ("256x32", 20_000), ("256x64", 20_000),
    ]  # fmt: skip
    assert [cell.name for cell in task.cells("valid")] == [cell.name for cell in task.cells("test")]
    assert {cell.examples for cell in task.cells("test")} == {1000}


def test_published_values_agree_with_themselves(plot) -> None:
    comparison = published.compare(*plot, as_published(plot))
    assert set(verdicts(comparison).values()) == {"agree"}
    assert [item.verdict for item in comparison.orders] == ["agree", "agree"]
    assert comparison.missed == []


def test_a_hard_value_outside_tolerance_and_interval_is_missed(plot) -> None:
    changed = {
        "GLA d=128": (0.71,),
        "GLA d=64": (0.58,),  # 0.048 above
        "Hyena d=64": (0.9,),  # soft
        "DeltaNet d=64": (0.4, 0.7, 0.9),  # the interval holds 0.793
        "RWKV-7 d=128": (0.7, 0.7),  # a range of two seeds is no 95 % interval
    }
    comparison = published.compare(*plot, as_published(plot, changed))
    found = verdicts(comparison)
    assert {name: found[name] for name in changed} == {
        "GLA d=128": "differs", "GLA d=64": "agree", "Hyena d=64": "differs", "DeltaNet d=64": "agree", "RWKV-7 d=128": "differs",
    }  # fmt: skip
    assert comparison.missed == ["GLA d=128", "RWKV-7 d=128"]


def test_a_reversed_order_is_missed_unless_the_interval_leaves_it_open(plot) -> None:
    first = published.compare(*plot, as_published(plot, {"RWKV-7 d=64": (0.9,)})).orders[0]
    assert (first.verdict, first.reversed) == ("differs", ("RWKV-7 d=64 above Gated DeltaNet d=64",))
    noisy = {"RWKV-7 d=64": (0.9, 0.8, 0.95), "Gated DeltaNet d=64": (0.8, 0.95, 0.85)}
    assert published.compare(*plot, as_published(plot, noisy)).orders[0].verdict == "agree"
    clear = {"RWKV-7 d=64": (0.95, 0.96, 0.95), "Gated DeltaNet d=64": (0.88, 0.89, 0.88)}
    assert published.compare(*plot, as_published(plot, clear)).orders[0].verdict == "differs"


def test_an_exact_tie_is_no_reversed_order(plot) -> None:
    tie = {"RWKV-7 d=64": (1.0,), "Gated DeltaNet d=64": (1.0,)}
    order = published.compare(*plot, as_published(plot, tie)).orders[0]
    assert (order.verdict, order.reversed) == ("agree", ())


def test_what_has_not_run_is_said(plot) -> None:
    everything = as_published(plot)
    some = [point for point in everything if point.label != "mamba2:d_state=8*2"]
    comparison = published.compare(*plot, some)
    found = verdicts(comparison)
    assert found["Mamba-2 16 KiB"] == "not run"  # one of its two models is missing
    assert found["Mamba-2 24 KiB"] == "agree"
    assert comparison.orders[0].verdict == "not run"
    assert published.compare(*plot, []).missed == []


def test_reported_runs_that_all_diverged_are_missed_and_not_missing(plot) -> None:
    figure, sweep = plot
    (target,) = (target for target in figure.targets if target.point == "DeltaNet d=64")
    (experiment,) = filter(target.fits, sweep.experiments)
    ended = points([record(experiment, 0.7, SELECTION_SEED), record(experiment, None, 0, status="diverged")])
    comparison = published.compare(figure, sweep, ended)
    assert verdicts(comparison)["DeltaNet d=64"] == "differs" and comparison.missed == ["DeltaNet d=64"]
    chosen_only = points([record(experiment, 0.7, SELECTION_SEED)])
    assert verdicts(published.compare(figure, sweep, chosen_only))["DeltaNet d=64"] == "not run"


def test_the_best_of_two_models_of_one_size_counts(plot) -> None:
    figure, sweep = plot
    (target,) = (target for target in figure.targets if target.point == "Mamba-2 16 KiB")
    small, large = (next(e for e in sweep.experiments if target.fits(e) and e.model.d_model == width) for width in (64, 128))
    (item,) = (
        item
        for item in published.compare(figure, sweep, points([record(small, 0.69), record(large, 0.4)])).values
        if item.target == target
    )
    assert item.point is not None and item.point.spec.model.d_model == 64
    assert item.verdict == "agree" and item.difference == pytest.approx(0.0)


def test_labels_do_not_matter_but_settings_do(plot) -> None:
    figure, sweep = plot
    experiment = next(e for e in sweep.experiments if e.model.label() == "gla:n_heads=2" and e.model.d_model == 64)
    renamed = record(experiment, 0.532).model_copy(update={"label": "base_conv+gla"})
    assert verdicts(published.compare(figure, sweep, points([renamed])))["GLA d=64"] == "agree"
    shorter = experiment.model_copy(update={"train": experiment.train.model_copy(update={"epochs": 8})})
    other = record(shorter, 0.532)
    assert published.reproductions(points([other])) == []
    assert [c.figure.recipe for c in published.reproductions(points([renamed, other]))] == ["readme_plot"]
    both = sweep.model_copy(update={"experiments": (*sweep.experiments, shorter)})
    with pytest.raises(UserError, match="GLA d=64 would be trained under several settings"):
        published.compare(figure, both, [])


def test_recipes_without_published_values_and_damaged_files_are_one_sentence(tmp_path: Path, monkeypatch) -> None:
    with pytest.raises(UserError, match=r"Unknown recipe with published values 'readme_plit'.*Did you mean 'readme_plot'"):
        published.load("readme_plit")
    text = (published.FOLDER / "readme_plot.csv").read_text()
    (tmp_path / "bad.csv").write_text(text.replace("525056,1.000", "525056,many"))
    monkeypatch.setattr(published, "FOLDER", tmp_path)
    with pytest.raises(UserError, match=r"bad.csv, row 2 is not a published value \(.*valid number.*\)"):
        published.load("bad")


def test_published_selection_is_the_best_rate_of_each_seed_on_the_test(plot) -> None:
    experiment = plot[1].experiments[0]
    low, high = experiment.lrs[:2]
    selection = [
        record(experiment, 0.5, SELECTION_SEED, low),
        record(experiment, 0.7, SELECTION_SEED, high),
        record(experiment, 0.6, SELECTION_SEED + 1, low),
        record(experiment, None, SELECTION_SEED + 1, high, status="diverged"),
        record(experiment, 0.9, SELECTION_SEED + 2, low),  # not at every rate
    ]
    reported = [record(experiment, 0.55, 0, low), record(experiment, 0.65, 1, low)]
    (point,) = points([*selection, *reported])
    found = published_selection(point)
    assert (found.rates, found.accuracy.n) == (2, 2)
    assert found.accuracy.mean == pytest.approx((0.7 + 0.6) / 2)
    assert point.accuracy.mean == pytest.approx(0.6)
    assert found.bias == pytest.approx(0.05)
    (single,) = points(reported)
    assert (published_selection(single).accuracy.mean, published_selection(single).bias) == (None, None)
