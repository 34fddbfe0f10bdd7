"""How much faster is a training step when the head sees labelled rows only? Command: `python -m tests.benchmarks.labelled_head`.

Both sides are the same model, data, optimiser and loss; one computes logits at every position, as peers do, and lets the
loss ignore the unlabelled ones. Gradients are equal (tests/unit/test_train.py). Prints examples per second, median of
repeats, and writes a record below results/measured/.
"""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from bench import provenance
from bench.build import build_model, build_task
from bench.data import device_split
from bench.grammar import named_layers
from bench.model import LanguageModel
from bench.spec import ModelSpec, RunSpec, TaskSpec, TrainSpec

REPEATS, STEPS = 5, 5
OUT = Path("results/measured/labelled_head.json")


@dataclass(frozen=True)
class Setting:
    """A model and a batch to time."""

    name: str
    mixer: str
    d_model: int
    vocab_size: int
    cell: str
    batch: int


SETTINGS = (
    Setting("default command", "attention", 64, 64, "32x8:64", 32),
    Setting("default command", "based:feature_dim=8", 64, 64, "32x8:64", 32),
    Setting("published vocabulary, T=64", "attention", 64, 8192, "64x4:64", 32),
    Setting("published vocabulary, T=64", "based:feature_dim=8", 64, 8192, "64x4:64", 32),
    Setting("published vocabulary, T=256", "attention", 64, 8192, "256x16:64", 32),
    Setting("published vocabulary, T=256, every slot a query", "attention", 64, 8192, "256x64:64", 32),
)


def all_positions_loss(model: LanguageModel, inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
    """The peers' loss: logits of every position, ignored where there is no label."""
    logits_BTV = model(inputs_BT)
    return F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten(), ignore_index=-100)


def measure(setting: Setting) -> dict[str, object]:
    """Examples per second of both ways, interleaved."""
    options = {"vocab_size": setting.vocab_size, "train_cells": setting.cell, "test_cells": "16x2:8"}
    spec = RunSpec(
        task=TaskSpec(name="mqar", options=options),
        model=ModelSpec(**named_layers(setting.mixer), d_model=setting.d_model, embed_dropout=0.0),
        train=TrainSpec(batch_size=setting.batch),
    )
    device = torch.device("cpu")
    task = build_task(spec.task)
    model, cell = build_model(spec, task, device), device_split(task, "train", spec.seed, device)[0]
    optimizer = torch.optim.AdamW(model.parameters(), lr=spec.train.lr, weight_decay=spec.train.weight_decay, fused=True)
    chosen = torch.arange(setting.batch)
    inputs_BT = cell.inputs[chosen].long()
    targets_BT = torch.full_like(inputs_BT, -100).scatter(1, cell.rows_NM[chosen], cell.labels_NM[chosen])

    def labelled() -> None:
        logits = model(inputs_BT, cell.rows_NM[chosen])
        F.cross_entropy(logits.flatten(0, 1), cell.labels_NM[chosen].flatten()).backward()

    def everywhere() -> None:
        all_positions_loss(model, inputs_BT, targets_BT).backward()

    seconds: dict[str, list[float]] = {"labelled": [], "everywhere": []}
    for repeat in range(REPEATS + 1):
        for name, loss in (("labelled", labelled), ("everywhere", everywhere)):
            began = time.perf_counter()
            for _ in range(STEPS):
                loss()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            if repeat:
                seconds[name].append((time.perf_counter() - began) / STEPS)
    speed = {name: setting.batch / statistics.median(times) for name, times in seconds.items()}
    spread = {name: [setting.batch / t for t in (max(times), min(times))] for name, times in seconds.items()}
    ratio = speed["labelled"] / speed["everywhere"]
    return {**asdict(setting), "examples_per_second": speed, "min_max": spread, "ratio": ratio}


def main() -> None:
    """Measures every setting, prints a table, writes the record."""
    torch.set_num_threads(provenance.usable_cores())
    rows = []
    print(f"{'setting':48} {'mixer':22} {'labelled':>10} {'all rows':>10} {'ratio':>6}   (examples/s)")
    for setting in SETTINGS:
        row = measure(setting)
        rows.append(row)
        speed = row["examples_per_second"]
        assert isinstance(speed, dict)
        print(f"{setting.name:48} {setting.mixer:22} {speed['labelled']:10.0f} {speed['everywhere']:10.0f} {row['ratio']:6.2f}")
    commit, dirty, _ = provenance.git_state()
    record = {
        "what": "training step, head on labelled rows against head on all positions",
        "command": "python -m tests.benchmarks.labelled_head",
        "commit": commit,
        "dirty": dirty,
        "versions": provenance.versions(),
        "hardware": provenance.cpu_name(),
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "n": f"median of {REPEATS} repeats of {STEPS} steps; min_max is the range over the repeats",
        "rows": rows,
    }
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps(record, indent=1) + "\n")
    print(f"Record: {OUT}")


if __name__ == "__main__":
    main()
