"""Scores of every kind of task: features, real labels, decoding from the last position, votes, metrics of a task's own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from bench import catalog, evaluate, outcome, runner
from bench.build import build_model, build_task
from bench.data import DeviceCell, device_split
from bench.ends import LastDecoder
from bench.grammar import named_layers
from bench.model import LanguageModel
from bench.records import CellInfo, RunRecord
from bench.spec import ModelSpec, RunSpec, TaskSpec, TrainSpec
from bench.store import Store
from bench.train import FleetTrainer, Interrupted
from synthetic_tasks import Batch, Cell, Task, build_split

CPU = torch.device("cpu")


def spec(task: str, **train: object) -> RunSpec:
    """A run of a few steps on the task's two easiest cells."""
    made = catalog.load("task", task)()
    sizes = {"train": 48, "valid": 8, "test": 8}
    options = {f"{split}_cells": "+".join(f"{c.name}:{n}" for c in made.cells(split)[:2]) for split, n in sizes.items()}
    model = ModelSpec(**named_layers("gla:n_heads=2"), d_model=16)
    settings = {"lr": 1e-2, "batch_size": 16, "epochs": 1, "stop_at": None, **train}
    return RunSpec(task=TaskSpec(name=task, options=options), model=model, train=TrainSpec(**settings))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", list(catalog.names("task")))
def test_every_task_trains_and_is_recorded(name: str, tmp_path: Path) -> None:
    found: list[RunRecord] = []
    runner.execute(
        [spec(name), spec(name).model_copy(update={"seed": 1})],
        CPU,
        Store(tmp_path),
        tell=lambda kind, content: found.append(content) if kind == "record" else None,
    )
    record = found[0]
    assert [record.status for record in found] == ["done", "done"], found
    assert record.family == catalog.load("task", name).suite
    accuracy = record.metric("test", "accuracy")
    assert accuracy is not None and 0 <= accuracy <= 1
    assert all(0 <= value <= 1 for cell in record.cells for value in cell.ceilings.values())
    assert Store(tmp_path).read(record.run_id) == record


def exact_scores(name: str) -> evaluate.Scores:
    """Scores of outputs that are the exact solver's predictions, on the test split."""
    task = build_task(spec(name).task)
    scores = evaluate.Scores()
    for cell, batch in zip(task.cells("test"), build_split(task, "test", 0).values(), strict=True):
        solved = task.solve(batch)
        found = DeviceCell.from_batch(cell, batch, CPU, votes_NT=task.votes(batch))
        rows = found.rows_NM.numpy()
        if batch.values is None:
            picked = np.take_along_axis(solved, rows, axis=1)
            outputs = 50 * torch.nn.functional.one_hot(torch.from_numpy(picked).long(), task.vocab_size).float()
        else:
            outputs = torch.from_numpy(np.take_along_axis(solved, rows[..., None], axis=1))
        loss, predicted = evaluate.loss_and_predictions(outputs, found.labels_NM, found.values_NMK)
        votes = None if found.votes_NM is None else evaluate.vote_accuracy(outputs, found.votes_NM, found.labels_NM)
        evaluate.add_scores(scores, found, evaluate.measure(found, evaluate.CellOutputs(loss, predicted, votes)).tolist())
        evaluate.add_extra(scores, task, cell, batch, predicted)
    return scores


@pytest.mark.parametrize("name", ["joint_recall", "mad_noisy_recall", "mad_compression", "selectivity_t1", "correlated_recall"])
def test_the_exact_solver_has_every_metric_at_its_best(name: str) -> None:
    scores = exact_scores(name)
    assert min(scores.accuracy.values()) > 0.98
    best = {"binding gain": 1, "conflict accuracy": 1, "macro accuracy": 1, "symbol accuracy": 1}
    for (metric, cell), value in scores.extra.items():
        if metric in best:
            assert value == pytest.approx(best[metric], abs=0.05), (metric, cell)
    if name == "selectivity_t1":
        assert all(value == 8 for (metric, _), value in scores.extra.items() if metric == "effective memory length")


def test_real_labels_are_scored_against_predicting_zero() -> None:
    scores = exact_scores("in_context_regression")
    for (metric, cell), value in scores.extra.items():
        if metric == "excess error":
            assert value == pytest.approx(0, abs=1e-6)
        else:
            assert metric == "mse" and value == pytest.approx(scores.loss[cell])
    batch = Batch(*(np.zeros((3, 4), dtype) for dtype in (np.int32, np.int32)), np.ones((3, 4), bool), values=_ramp())
    cell = DeviceCell.from_batch(Cell("a", 4, 3), batch, CPU)
    labels, values = cell.labels_NM, cell.values_NMK
    zero = evaluate.row_scores(torch.zeros(3, 4, 1), labels, values, cell.zero_error)
    assert float(evaluate.example_scores(zero, labels).mean()) == pytest.approx(0, abs=1e-6)
    assert torch.allclose(evaluate.row_scores(torch.from_numpy(_ramp()), labels, values, cell.zero_error), torch.ones(3, 4))
    assert float(evaluate.loss_and_predictions(torch.zeros(3, 4, 1), labels, values)[0]) == pytest.approx(
        float((_ramp() ** 2).sum())
    )


@pytest.mark.parametrize("name", ["mqar_overwrite", "selectivity_t3", "mqar"])
def test_scores_of_a_cell_are_those_of_a_loop_over_its_rows(name: str) -> None:
    task = build_task(spec(name).task)
    cell, batch = task.cells("test")[0], build_split(task, "test", 0)[task.cells("test")[0].name]
    found, rng = DeviceCell.from_batch(cell, batch, CPU), np.random.default_rng(3)
    labels = found.labels_NM.numpy()
    answers = [labels, *(wrong.numpy() for wrong in found.lures.values()), np.full_like(labels, -7)]
    predicted = np.choose(rng.integers(len(answers), size=labels.shape), answers)
    scores = evaluate.Scores()
    outputs = evaluate.CellOutputs(torch.tensor(3.0), torch.from_numpy(predicted))
    evaluate.add_scores(scores, found, evaluate.measure(found, outputs).tolist())
    hits = [[p == label for p, label in zip(*rows, strict=True) if label >= 0] for rows in zip(predicted, labels, strict=True)]
    means = [np.mean(row) for row in hits]
    assert scores.accuracy == {cell.name: pytest.approx(np.mean(means))}
    assert scores.stderr == {cell.name: pytest.approx(np.std(means, ddof=1) / len(means) ** 0.5)}
    assert scores.loss == {cell.name: pytest.approx(3.0 / sum(map(len, hits)))}
    in_groups = {key: (predicted == labels)[rows.numpy()].mean() for key, rows in found.groups.items()}
    assert scores.groups == {f"{cell.name}/{key}": pytest.approx(value) for key, value in in_groups.items()}
    lured = {key: (predicted == wrong.numpy())[wrong.numpy() >= 0].mean() for key, wrong in found.lures.items()}
    assert scores.lures == {(key, cell.name): pytest.approx(value) for key, value in lured.items()}


def _ramp() -> np.ndarray:
    return np.linspace(-1, 2, 12, dtype=np.float32).reshape(3, 4, 1)


def test_recorded_ceilings_of_real_labels_are_scores() -> None:
    task = build_task(TaskSpec(name="in_context_regression"))
    info = outcome.cell_info(task, task.cells("test")[1])
    assert info.ceilings["predict zero"] == 0
    assert 0.3 < info.ceilings["additive memory"] < info.ceilings["exact"] < 1


def test_a_vote_sums_probabilities_of_its_rows() -> None:
    logits = torch.log(torch.tensor([[[0.6, 0.4], [0.1, 0.9], [0.9, 0.1], [0.5, 0.5]]]))
    labels, votes = torch.tensor([[1, 1, 0, -100]]), torch.tensor([[0, 0, 1, 0]])
    assert evaluate.vote_accuracy(logits, votes, labels).tolist() == [1.0]
    assert evaluate.vote_accuracy(logits, votes, torch.tensor([[0, 0, 1, -100]])).tolist() == [0.0]


def test_the_last_position_decodes_every_label() -> None:
    run = spec("mad_compression")
    task = build_task(run.task)
    model, cell = build_model(run, task, CPU), device_split(task, "valid", 0, CPU)[0]
    assert isinstance(model.head, LastDecoder)
    inputs = cell.inputs[:2].clone()
    before = model(inputs, cell.rows_NM[:2])
    assert not torch.allclose(before[:, 0], before[:, 1]), "places are told apart"
    x_BTD = model.embed(inputs).detach().requires_grad_(True)
    model.head(model.norm(model.hidden(x_BTD)[:, -1]), cell.rows_NM[:2])[:, 0].sum().backward()
    assert x_BTD.grad is not None and bool((x_BTD.grad[:, -1].abs() > 0).any()), "the first label reads the last position"


@pytest.mark.parametrize(("name", "tied"), [("mqar", True), ("correlated_recall", False), ("in_context_regression", False)])
def test_heads_are_tied_only_between_tokens(name: str, tied: bool) -> None:
    task = build_task(TaskSpec(name=name))
    model = LanguageModel(spec(name).model, task)
    assert (model.head is None) == tied
    width = task.value_dim if task.target_kind == "real" else task.vocab_size
    cell = task.cells("test")[0]
    batch = task.sample(cell, 2, np.random.default_rng(0))
    read = torch.from_numpy(batch.inputs if batch.features is None else batch.features)
    assert model(read).shape == (2, cell.length, width)


@pytest.mark.parametrize("name", ["in_context_regression", "mad_compression"])
def test_checkpoints_continue_other_kinds_of_tasks_exactly(name: str) -> None:
    whole = FleetTrainer([spec(name, epochs=2)], CPU)
    list(whole.run())
    first = FleetTrainer([spec(name, epochs=2)], CPU)
    with pytest.raises(Interrupted) as stop:
        list(first.run(should_stop=lambda: first.step == 3))
    second = FleetTrainer([spec(name, epochs=2)], CPU, checkpoints=stop.value.checkpoints)
    list(second.run())
    assert torch.equal(second.fleet.model.flat_EP, whole.fleet.model.flat_EP)


class Ranged(Task):
    """Two training cells and nothing else."""

    def cells(self, split: str) -> tuple[Cell, ...]:
        del split
        return (Cell("a", 8, 1, {"length": 8, "jitter": 1}), Cell("b", 32, 1, {"length": 32, "jitter": 1}))

    def sample(self, cell: Cell, examples: int, rng: np.random.Generator) -> Batch:
        raise NotImplementedError

    solve = ceilings = bits_needed = sample  # type: ignore[assignment]


def test_trained_range_is_between_the_training_cells() -> None:
    lengths = {4: False, 8: True, 16: True, 32: True, 64: False}
    assert {n: Ranged().trained(Cell("c", n, 1, {"length": n, "other": 9})) for n in lengths} == lengths


def test_old_cells_count_as_trained() -> None:
    old = CellInfo.model_validate({"name": "a", "axes": {}, "ceilings": {}, "bits_needed": 1})
    assert old.trained
