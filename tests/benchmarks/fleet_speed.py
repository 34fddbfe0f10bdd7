"""How fast do fleets train on this GPU, beside Zoology's own loop? It trains attention and BASED on the mixture of Based, figure 2.

    python -m tests.benchmarks.fleet_speed OUT.json [--zoology CHECKOUT] [--mixers attention based] [--widths 128] [--members 1 4]
        [--cells 64x4 256x16] [--steps 40] [--validation]

Milliseconds of a step and of a member at every training cell, median of repeats; examples a second over the mixture's own
proportion of steps; time to the first steps, which is mostly compilation; and the ratio to Zoology's training loop, timed between
them on the same GPU. A fleet of one is a single run. Every fleet compiles in a process of its own, all at the same time; nothing
is timed before the last one is done, and then one after the other. Each result is written at once: the same command goes on
where it was stopped, as long as commit and GPU are the same. A mixer is timed if its fleets learn what its single runs learn.
With --validation also milliseconds of the scores of every member on the validation cells of the published figures, which a fleet
takes at the end of an epoch.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from bench.grammar import named_layers
from bench.recipes._mixture import VALID_CELLS
from bench.spec import ModelSpec, RunSpec, TaskSpec, TrainSpec
from bench.train import FleetTrainer
from tests.benchmarks import zoology_loop
from tests.benchmarks.facts import facts

CELLS = {"64x4": 391, "128x8": 79, "256x16": 79, "256x32": 79, "256x64": 79}
"""Training cells and their steps in an epoch."""
MIXERS = {"attention": "attention", "based": "based:feature_dim=16"}
LRS = (1e-3, 10**-2.5, 1e-2, 10**-1.5)
WARM_UP, REPEATS = 3, 5
BATCH = 256


def specs(mixer: str, width: int, members: int, valid_cells: str = "64x4:256") -> list[RunSpec]:
    """The members: the published learning rates at one seed, then the next seed."""
    options = {
        "protocol": "based_figure2",
        "train_cells": "+".join(f"{cell}:{4 * BATCH}" for cell in CELLS),
        "valid_cells": valid_cells,
        "test_cells": "64x4:256",
    }
    train = TrainSpec(batch_size=BATCH, epochs=32, weight_decay=0.1, schedule="cosine_epoch", shuffle="none")
    model = ModelSpec(**named_layers(MIXERS.get(mixer, mixer)), d_model=width)
    pairs = [(LRS[index % 4], index // 4) for index in range(members)]
    task = TaskSpec(name="mqar", options=options)
    return [RunSpec(task=task, model=model, train=train.model_copy(update={"lr": lr}), seed=seed) for lr, seed in pairs]


def warmed(members: list[RunSpec], cells: list[str]) -> tuple[FleetTrainer, dict[str, float]]:
    """A compiled fleet that has taken its first steps on the cells, and the seconds that those took."""
    torch.set_float32_matmul_precision("high")
    trainer = FleetTrainer(members, torch.device("cuda"), compiled=True)
    trainer.fleet.rates_E.copy_(torch.tensor([member.spec.train.lr for member in trainer.members]))
    trainer.fleet.examples_SB.copy_(torch.arange(BATCH).expand_as(trainer.fleet.examples_SB))
    seconds = {}
    for name in cells:
        began = time.perf_counter()
        for _ in range(WARM_UP):
            trainer.advance(list(CELLS).index(name))
        torch.cuda.synchronize()
        seconds[name] = time.perf_counter() - began
    return trainer, seconds


def timed(work: Callable[[], Any], steps: int) -> dict[str, float]:
    """Milliseconds of a step, or other work: median, least and most of the repeats."""
    found = []
    for repeat in range(REPEATS + 1):
        began = time.perf_counter()
        for _ in range(steps):
            work()
        torch.cuda.synchronize()
        if repeat:  # the first one brings the clocks up
            found.append(1e3 * (time.perf_counter() - began) / steps)
    return {"ms": statistics.median(found), "ms_min": min(found), "ms_max": max(found)}


def fleet(
    mixer: str, width: int, members: int, names: list[str], steps: int, profiled: list[str], validated: bool
) -> Callable[[], dict[str, Any]]:
    """Compiles a fleet; what is returned times it on the cells named, and its validation if asked to."""
    trainer, first = warmed(specs(mixer, width, members, *([VALID_CELLS] if validated else [])), names)
    scorer = trainer._scorer
    if validated:
        scorer.rehearse()

    def measure() -> dict[str, Any]:
        places = {name: list(CELLS).index(name) for name in names}
        cells = {
            name: timed(partial(trainer.advance, place), steps) | {"first_steps_seconds": first[name]}
            for name, place in places.items()
        }
        epoch = sum(CELLS[name] * cell["ms"] for name, cell in cells.items()) / 1e3
        found = {
            "mixer": mixer,
            "width": width,
            "members": members,
            "seeds": sorted({member.spec.seed for member in trainer.members}),
            "learning_rates": [member.spec.train.lr for member in trainer.members],
            "execution": trainer.execution,
            "cells": cells,
            "ms_per_member": {name: cell["ms"] / members for name, cell in cells.items()},
            "examples_per_second": members * BATCH * sum(CELLS[name] for name in names) / epoch,
            "peak_bytes": torch.cuda.max_memory_allocated(),
        }
        if validated:
            found["validation"] = timed(scorer.scores, 3)
        if profiled:
            found["kernels"] = {cell: kernels_of(trainer, list(CELLS).index(cell)) for cell in profiled}
        return found

    return measure


def kernels_of(trainer: FleetTrainer, cell: int) -> dict[str, float]:
    """Device microseconds of a step by kernel, the costliest first."""
    steps = 10
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(steps):
            trainer.advance(cell)
        torch.cuda.synchronize()
    table = sorted(profile.key_averages(), key=lambda event: -event.self_device_time_total)
    return {f"{event.key[:90]} x{event.count / steps:g}": round(event.self_device_time_total / steps, 2) for event in table[:60]}


def check(mixer: str) -> Callable[[], dict[str, Any]]:
    """Compares a compiled fleet of two with its members trained alone, eagerly: the largest difference of their training losses."""

    def losses(members: list[RunSpec], *, compiled: bool) -> torch.Tensor:
        trainer = FleetTrainer(members, torch.device("cuda"), compiled=compiled)
        trainer.fleet.rates_E.fill_(1e-3)
        found = []
        for step in range(12):
            trainer.fleet.examples_SB.copy_(torch.arange(step * 64, step * 64 + BATCH).expand_as(trainer.fleet.examples_SB))
            trainer.fleet.sums_E3.zero_()
            trainer.advance(0)
            found.append(trainer.fleet.sums_E3[:, 0] / trainer.fleet.sums_E3[:, 2])
        return torch.stack(found, 1)

    both = specs(mixer, 64, 2)
    together = losses(both, compiled=True)
    alone = torch.cat([losses([spec], compiled=False) for spec in both])
    difference = float((together - alone).abs().max())
    # bf16 losses near 8.3 are 0.03 apart
    return lambda: {"mixer": mixer, "loss_difference": difference, "passed": difference < 5e-2}


def peer(checkout: Path, mixer: str, width: int) -> dict[str, Any]:
    """Zoology's loop on the same mixture; a run is one model, so its learning rates run one after another."""
    ms = zoology_loop.milliseconds(checkout, mixer, width, {64: 4, 128: 8, 256: 32})
    epoch = sum(steps * ms[int(cell.split("x")[0])] for cell, steps in CELLS.items()) / 1e3
    return {"mixer": mixer, "width": width, "ms": ms, "examples_per_second": BATCH * sum(CELLS.values()) / epoch}


class Piece:
    """A process that prepares at once, and measures when it is asked to.

    Args:
        prepare: returns what measures.
        arguments: its arguments.
    """

    def __init__(self, prepare: Callable[..., Callable[[], dict[str, Any]]], *arguments: Any) -> None:
        self.arguments = arguments
        context = get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, prepare, arguments), daemon=True)
        self.process.start()
        theirs.close()

    def ready(self) -> bool:
        """Waits until it is prepared; whether it got there."""
        try:
            return self.pipe.recv() == "ready"
        except EOFError:
            return False

    def result(self) -> dict[str, Any] | None:
        """What it measures, or None if it fails; the process ends."""
        try:
            self.pipe.send("go")
            return self.pipe.recv()
        except (EOFError, BrokenPipeError):
            return None
        finally:
            self.process.join()


def _work(pipe: Connection, prepare: Callable[..., Callable[[], dict[str, Any]]], arguments: tuple[Any, ...]) -> None:
    measure = prepare(*arguments)
    pipe.send("ready")
    pipe.recv()
    pipe.send(measure())


def record_at(path: Path, steps: int) -> dict[str, Any]:
    """The record as far as it has come, or a new one if that is of another commit or GPU."""
    how = f"median of {REPEATS} repeats of {steps} steps, wall clock; data of the seeds named, weights from the same seeds"
    fresh = facts("python -m tests.benchmarks.fleet_speed") | {
        "n": how,
        "batch": BATCH,
        "steps_an_epoch": CELLS,
        "checks": [],
        "fleets": [],
        "validation": [],
        "zoology": [],
    }
    if path.exists():
        old = json.loads(path.read_text())
        if all(old.get(key) == fresh[key] for key in ("commit", "device", "n", "versions")):
            return old
    return fresh


def main() -> None:
    """Prepares all that is missing at once, then measures piece by piece."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--zoology", type=Path)
    parser.add_argument("--mixers", nargs="+", default=list(MIXERS))
    parser.add_argument("--widths", type=int, nargs="+", default=[128])
    parser.add_argument("--members", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--cells", nargs="+", choices=CELLS, default=list(CELLS))
    parser.add_argument("--steps", type=int, default=40, help="of a repeat")
    parser.add_argument("--profile", metavar="CELL", nargs="+", default=[], help="record the kernels of a step on these cells")
    parser.add_argument("--validation", action="store_true", help="time the scores of an epoch's end too")
    given = parser.parse_args()
    record = record_at(given.out, given.steps)

    def done(key: str, **wanted: Any) -> bool:
        return any(all(row[name] == value for name, value in wanted.items()) for row in record[key])

    def add(key: str, row: dict[str, Any]) -> None:
        record[key].append(row)
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(record, indent=1) + "\n")
        print(_line(key, row, record), flush=True)

    checks = [Piece(check, mixer) for mixer in given.mixers if not done("checks", mixer=mixer)]
    shapes = itertools.product(given.mixers, given.widths, given.members)
    fleets = [
        Piece(fleet, mixer, width, members, given.cells, given.steps, given.profile, given.validation)
        for mixer, width, members in shapes
        if not done("fleets", mixer=mixer, width=width, members=members)
    ]
    for piece in checks:
        row = piece.result() if piece.ready() else None
        add("checks", row or {"mixer": piece.arguments[0], "loss_difference": None, "passed": False})
    wrong = {row["mixer"] for row in record["checks"] if not row["passed"]}
    missing = []
    for piece, ready in [(piece, piece.ready()) for piece in fleets]:
        row = piece.result() if ready and piece.arguments[0] not in wrong else None
        if row is None:
            missing.append(piece.arguments[:3])
            continue
        validation = row.pop("validation", None)
        add("fleets", row)
        if validation is not None:
            add("validation", {name: row[name] for name in ("mixer", "width", "members")} | validation)
    if given.zoology is not None:
        for mixer, width in itertools.product(given.mixers, given.widths):
            if mixer in MIXERS and not done("zoology", mixer=mixer, width=width):
                add("zoology", peer(given.zoology, mixer, width))
    for row in record["fleets"]:
        print(_line("fleets", row, record))
    if wrong or missing:
        raise SystemExit(f"fleets that do not learn what single runs learn: {sorted(wrong)}; not timed: {missing}")


def _line(key: str, row: dict[str, Any], record: dict[str, Any]) -> str:
    if key != "fleets":
        return json.dumps(row)
    ms = " ".join(f"{name} {value:.3f}" for name, value in row["ms_per_member"].items())
    beside = [p for p in record["zoology"] if (p["mixer"], p["width"]) == (row["mixer"], row["width"])]
    ratio = f", {row['examples_per_second'] / beside[0]['examples_per_second']:.1f} x Zoology" if beside else ""
    name = f"{row['mixer']} d={row['width']} E={row['members']} {row['execution']}"
    return f"{name}: ms a member {ms}; {row['examples_per_second']:,.0f} examples/s{ratio}"


if __name__ == "__main__":
    main()
