"""Runs small enough to train in a test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from bench import runner
from bench.grammar import named_layers
from bench.records import RunRecord
from bench.spec import ModelSpec, RunSpec, TaskSpec, TrainSpec
from bench.store import Store
from bench.train import FleetTrainer

CPU = torch.device("cpu")
CELLS = {"vocab_size": 32, "train_cells": "16x2:64+24x3:40", "valid_cells": "16x2:32", "test_cells": "16x2:32+24x3:16"}


def spec(mixer: str = "attention", *, seed: int = 0, model: dict | None = None, **train: object) -> RunSpec:
    settings = {"lr": 1e-2, "batch_size": 16, "epochs": 3, "stop_at": None, **train}
    return RunSpec(
        task=TaskSpec(name="mqar", options=CELLS),
        model=ModelSpec(**named_layers(mixer), d_model=16, **(model or {})),
        train=TrainSpec(**settings),  # type: ignore[arg-type]
        seed=seed,
    )


def weights(trainer: FleetTrainer, index: int = 0) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in trainer.fleet.model.member(index).state_dict().items()}


def finish(trainer: FleetTrainer) -> list[tuple[dict[str, torch.Tensor], list[dict]]]:
    """Trains to the end; each member's weights and curve without times, in the order of its specs."""
    specs, found = [member.spec for member in trainer.members], {}
    for index in trainer.run():
        member = trainer.members[index]
        curve = [{key: value for key, value in point.items() if key != "seconds"} for point in member.curve]
        found[member.spec] = weights(trainer, index), curve
    return [found[spec] for spec in specs]


def execute(store: Path, *runs: RunSpec) -> list[RunRecord]:
    """Trains runs into a store, and prints what is noted; their records."""
    found: list[RunRecord] = []

    def tell(kind: str, content: Any) -> None:
        if kind == "record":
            found.append(content)
        elif kind == "note":
            print(content)

    assert runner.execute(list(runs), CPU, Store(store), tell=tell)
    return found
