"""How much faster is a sweep on several GPUs of one host? The same fleets on one of them and on all, by the sweep's own workers.

    python -m tests.benchmarks.two_gpus OUT.json [--fleets 8] [--seconds 30]

A fleet is attention of width 128 at four learning rates on MQAR, each fleet with a seed of its own. Workers are started and train
one fleet each that is not counted, so that imports, contexts and kernels are there; then the clock runs from handing out the first
fleet to storing the last record, data generation included. Epochs are so many that one GPU takes about `--seconds`, which the time
of two short fleets tells. Fleets run without `torch.compile`: compiling takes processors, of which two GPUs have no more than one.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from bench.grammar import named_layers
from bench.launch.local import LocalWorkers
from bench.spec import ModelSpec, RunSpec, TaskSpec, TrainSpec
from tests.benchmarks.facts import facts

LRS = (1e-3, 10**-2.5, 1e-2, 10**-1.5)
CELLS = {"train_cells": "64x4:25600+256x16:5120", "valid_cells": "64x4:256", "test_cells": "64x4:256"}


def fleet(seed: int, epochs: int) -> tuple[RunSpec, ...]:
    """Four learning rates at a seed."""
    train = TrainSpec(batch_size=256, epochs=epochs, weight_decay=0.1, schedule="cosine_epoch", shuffle="none", stop_at=None)
    model = ModelSpec(**named_layers("attention"), d_model=128)
    task = TaskSpec(name="mqar", options={"protocol": "based_figure2", **CELLS})
    return tuple(RunSpec(task=task, model=model, train=train.model_copy(update={"lr": lr}), seed=seed) for lr in LRS)


def train(workers: LocalWorkers, fleets: list[tuple[RunSpec, ...]]) -> int:
    """Trains all fleets; the number of records that say so."""
    waiting, done = list(fleets), 0
    while waiting or workers.busy():
        while waiting and workers.idle():
            workers.submit(waiting.pop(0), {})
        for event in workers.events(0.05):
            if event.kind in ("died", "broken"):
                raise SystemExit(f"a worker said {event.kind}: {event.content}")
            done += event.kind == "record" and event.content.status == "done"
    return done


def seconds_of(workers: LocalWorkers, fleets: list[tuple[RunSpec, ...]]) -> tuple[float, int]:
    """Seconds of training fleets, and the number of runs."""
    began = time.perf_counter()
    done = train(workers, fleets)
    return time.perf_counter() - began, done


def epochs_for(workers: LocalWorkers, seconds: float) -> int:
    """Epochs after which a fleet takes so long on a warm worker; at least two."""
    (short, _), (long, _) = (seconds_of(workers, [fleet(2000 + epochs, epochs)]) for epochs in (1, 5))
    an_epoch = max((long - short) / 4, 1e-3)
    return max(2, round(1 + (seconds - short) / an_epoch))


def timed(devices: list[str], fleets: int, seconds: float, epochs: int | None) -> dict[str, Any]:
    """Seconds of the sweep on some GPUs; without a number of epochs it takes about so many seconds."""
    with tempfile.TemporaryDirectory() as folder, LocalWorkers(devices, Path(folder)) as workers:
        train(workers, [fleet(1000 + index, 1) for index in range(len(devices))])
        epochs = epochs or epochs_for(workers, seconds / fleets)
        seconds, done = seconds_of(workers, [fleet(index, epochs) for index in range(fleets)])
    if done != len(LRS) * fleets:
        raise SystemExit(f"{done} of {len(LRS) * fleets} runs were trained")
    examples = epochs * sum(int(cell.split(":")[1]) for cell in CELLS["train_cells"].split("+")) * done
    row = {"devices": len(devices), "epochs": epochs, "seconds": seconds, "runs": done, "examples_per_second": examples / seconds}
    print(json.dumps(row), flush=True)
    return row


def main() -> None:
    """One GPU, then all; writes the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--fleets", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=30.0)
    given = parser.parse_args()
    os.environ["BENCH_COMPILE"] = "0"
    gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    if len(gpus) < 2:
        raise SystemExit(f"{len(gpus)} GPU here; this compares one with several")
    one = timed(gpus[:1], given.fleets, given.seconds, None)
    every = timed(gpus, given.fleets, given.seconds, one["epochs"])
    ratio = every["examples_per_second"] / one["examples_per_second"]
    record = facts("python -m tests.benchmarks.two_gpus") | {
        "n": f"one sweep each: {given.fleets} fleets of {len(LRS)} runs, {one['epochs']} epochs, seeds 0 to {given.fleets - 1}",
        "devices": [torch.cuda.get_device_name(index) for index in range(len(gpus))],
        "compiled": False,
        "rows": [one, every],
        "ratio": ratio,
    }
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(record, indent=1) + "\n")
    print(f"{len(gpus)} GPUs: {ratio:.2f} x one")


if __name__ == "__main__":
    main()
