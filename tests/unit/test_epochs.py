"""What a run sees and when: learning rates, the plan of an epoch, splits that are streamed."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from bench import streamed
from bench.data import epoch_plan
from bench.member import learning_rate
from bench.spec import TaskSpec, TrainSpec
from bench.train import FleetTrainer
from synthetic_tasks import _splits
from tests.unit.small_runs import CELLS, CPU, finish, spec


def test_schedules() -> None:
    epoch_wise = TrainSpec(lr=1.0, epochs=4)
    assert [learning_rate(epoch_wise, step, 10) for step in (0, 9, 10, 39)] == pytest.approx(
        [1.0, 1.0, 0.5 + 0.5 * math.cos(math.pi / 4), 0.5 + 0.5 * math.cos(3 * math.pi / 4)]
    )
    step_wise = TrainSpec(lr=1.0, epochs=4, schedule="cosine", warmup_steps=4)
    assert learning_rate(step_wise, 0, 10) == pytest.approx(0.2)
    assert learning_rate(step_wise, 20, 10) == pytest.approx(0.5)
    assert learning_rate(TrainSpec(lr=0.3, schedule="constant"), 77, 10) == 0.3


@pytest.mark.parametrize("shuffle", ["none", "batches", "examples"])
def test_epoch_plan_covers_every_example_once_and_never_mixes_cells(shuffle: str) -> None:
    train = TrainSpec(batch_size=16, shuffle=shuffle)  # type: ignore[arg-type]
    cells, examples = epoch_plan([64, 40], train, [0, 1], 0)
    assert sorted(cells) == [0] * 4 + [1] * 3
    for column in (0, 1):
        for index, size in enumerate((64, 40)):
            chosen = examples[np.array(cells) == index, column]
            assert sorted(chosen[chosen >= 0].tolist()) == list(range(size))
    again, later = epoch_plan([64, 40], train, [1], 0), epoch_plan([64, 40], train, [1], 1)
    assert again[0] == cells and np.array_equal(again[1][:, 0], examples[:, 1])
    assert (np.array_equal(examples[:, 0], examples[:, 1])) == (shuffle == "none")
    assert (again[0] == later[0] and np.array_equal(again[1], later[1])) == (shuffle == "none")


@pytest.mark.parametrize("name", ["mqar", "mad_noisy_recall", "in_context_regression"])
@pytest.mark.parametrize("shuffle", ["none", "batches", "examples"])
def test_a_streamed_split_gives_the_examples_of_the_whole(monkeypatch: pytest.MonkeyPatch, name: str, shuffle: str) -> None:
    """Each batch equals that of a resident split, blocks follow one another, and an epoch shows every example once."""
    cells = {"mqar": CELLS["train_cells"], "mad_noisy_recall": "16:64+24:40", "in_context_regression": "8:64+9:40"}[name]
    test = {"mqar": "16x2:8", "mad_noisy_recall": "16:8", "in_context_regression": "8:8"}[name]
    task = TaskSpec(name=name, options={"train_cells": cells, "valid_cells": test, "test_cells": test})
    runs = [spec(shuffle=shuffle, seed=seed).model_copy(update={"task": task}) for seed in (0, 1)]
    whole = FleetTrainer(runs, CPU)
    monkeypatch.setattr(_splits, "BLOCK_ROWS", 24)
    monkeypatch.setattr(streamed, "BLOCK_ROWS", 24)
    resident = FleetTrainer(runs, CPU).train_cells
    monkeypatch.setattr(streamed, "STREAMED_BYTES", 0)
    trainer = FleetTrainer(runs, CPU)
    assert not whole.streams and [len(cell) for cell in trainer.train_cells] == [24, 24]
    cells, firsts, plan_PSB, _ = trainer._plan_epoch()
    turns: list[list[int]] = [[], []]
    for cell, first, examples_SB in zip(cells, firsts, plan_PSB, strict=True):
        trainer.streams[cell].hold(first)
        picked, expected = (found[cell].pick(trainer.fleet.sets_E, examples_SB) for found in (trainer.train_cells, resident))
        real, rows = examples_SB >= 0, expected.rows_EBM.shape[2]
        assert torch.equal(picked.inputs[real], expected.inputs[real])
        assert torch.equal(picked.labels_EBM[:, :, :rows], expected.labels_EBM) and (picked.labels_EBM[:, :, rows:] == -100).all()
        assert torch.equal(picked.rows_EBM[:, :, :rows][real], expected.rows_EBM[real])
        if expected.values_EBMK is not None and picked.values_EBMK is not None:
            assert torch.equal(picked.values_EBMK[real], expected.values_EBMK[real])
        turns[cell] += [first // 24] * (first // 24 not in turns[cell][-1:])
    assert [sorted(turn) for turn in turns] == [[0, 1, 2], [0, 1]], "a block is drawn once"
    for column in (0, 1):
        for cell, size in enumerate((64, 40)):
            shown = plan_PSB[np.array(cells) == cell, column].flatten().tolist()
            assert sorted(example for example in shown if example >= 0) == list(range(size))
    assert all(math.isfinite(point["train_loss"]) for _, curve in finish(trainer) for point in curve)
