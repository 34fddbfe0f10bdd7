"""What does stacking bring on a CPU, at the default command's size? Command: `python -m tests.benchmarks.cpu_fleets`.

Each model of the default command trains for some steps as before fleets (one module, its own optimiser), as a fleet of one, and
as a fleet of three; interleaved, on one thread. Processor time of the process is measured, which other processes on the machine
hardly change. Prints milliseconds of a step and member, median of repeats, and writes a record below results/measured/.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch.nn import functional as F

from bench import catalog, provenance
from bench.build import build_model, build_task
from bench.data import device_split
from bench.outcome import hardware
from bench.sweep import Experiment
from bench.train import FleetTrainer

REPEATS, STEPS, MEMBERS = 5, 6, 3
CPU = torch.device("cpu")
CELL = 1
"""The cell of 16 tokens and 4 pairs, which stands for the four."""
OUT = Path("results/measured/cpu_fleets.json")


def plain(experiment: Experiment) -> Callable[[], None]:
    """A step of one module with its own optimiser."""
    spec = experiment.run(experiment.lrs[0], 0)
    task = build_task(spec.task)
    model, cell = build_model(spec, task, CPU), device_split(task, "train", 0, CPU)[CELL]
    optimizer = torch.optim.AdamW(model.parameters(), lr=spec.train.lr, weight_decay=spec.train.weight_decay, fused=True)
    chosen = torch.arange(spec.train.batch_size)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        logits = model(cell.inputs[chosen].long(), cell.rows_NM[chosen])
        F.cross_entropy(logits.flatten(0, 1), cell.labels_NM[chosen].flatten(), ignore_index=-100).backward()
        optimizer.step()

    return step


def stacked(experiment: Experiment, members: int) -> Callable[[], None]:
    """A step of a fleet."""
    trainer = FleetTrainer([experiment.run(experiment.lrs[0], seed) for seed in range(members)], CPU)
    trainer.fleet.examples_SB[:] = torch.arange(trainer.train.batch_size)
    trainer.fleet.rates_E.fill_(experiment.lrs[0])
    return lambda: trainer.advance(CELL)


def measure(experiment: Experiment) -> dict[str, object]:
    """Milliseconds of processor time of a step and member, each way."""
    ways = {"plain": (plain(experiment), 1), "fleet of 1": (stacked(experiment, 1), 1)}
    ways[f"fleet of {MEMBERS}"] = (stacked(experiment, MEMBERS), MEMBERS)
    found: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(REPEATS + 1):
        for name, (step, members) in ways.items():
            began = time.process_time()
            for _ in range(STEPS):
                step()
            if repeat:  # the first warms up
                found[name].append(1e3 * (time.process_time() - began) / STEPS / members)
    milliseconds = {name: statistics.median(values) for name, values in found.items()}
    return {"model": experiment.model.label(), "milliseconds": milliseconds, "repeats": found}


def main() -> None:
    """Measures every model of the default command."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    sweep = catalog.load("recipe", "mqar")()
    rows = []
    for experiment in sweep.experiments:
        rows.append(measure(experiment))
        print(rows[-1]["model"], {name: round(value, 1) for name, value in rows[-1]["milliseconds"].items()}, flush=True)
    commit, dirty, diff = provenance.git_state()
    record = {
        "what": "processor time of a training step and member, milliseconds, median of repeats; one thread",
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
        "seeds": list(range(MEMBERS)),
        "repeats": REPEATS,
        "steps": STEPS,
        "commit": commit,
        "dirty": dirty,
        "diff_hash": diff,
        "versions": provenance.versions(),
        "hardware": hardware(CPU),
        "rows": rows,
    }
    OUT.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
