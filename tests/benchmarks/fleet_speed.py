"""How fast do fleets train on this GPU, beside Zoology's own loop? It trains attention and BASED on the mixture of Based, figure 2.

    python -m tests.benchmarks.fleet_speed OUT.json [--zoology CHECKOUT] [--widths 64 128] [--members 1 4]

Milliseconds of a step and of a member at every training cell, in captured and compiled form, median of repeats; examples a
second over the mixture's own proportion of steps; time to the first step, which is mostly compilation; and the ratio to Zoology's
training loop, timed in the same process on the same GPU. Checks first that a compiled fleet learns what single runs learn.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from bench import provenance
from bench.grammar import named_layers
from bench.spec import ModelSpec, RunSpec, TaskSpec, TrainSpec
from bench.train import FleetTrainer
from tests.benchmarks import zoology_loop

CELLS = {"64x4": 391, "128x8": 79, "256x16": 79, "256x32": 79, "256x64": 79}
"""Training cells and their steps in an epoch."""
MIXERS = {"attention": "attention", "based": "based:feature_dim=16"}
LRS = (1e-3, 10**-2.5, 1e-2, 10**-1.5)
WARM_UP, TIMED, REPEATS = 3, 20, 5
BATCH = 256


def specs(mixer: str, width: int, members: int) -> list[RunSpec]:
    """The members: the published learning rates at one seed, then the next seed."""
    options = {
        "protocol": "based_figure2",
        "train_cells": "+".join(f"{cell}:{4 * BATCH}" for cell in CELLS),
        "valid_cells": "64x4:256",
        "test_cells": "64x4:256",
    }
    train = TrainSpec(batch_size=BATCH, epochs=32, weight_decay=0.1, schedule="cosine_epoch", shuffle="none")
    model = ModelSpec(**named_layers(MIXERS[mixer]), d_model=width)
    pairs = [(LRS[index % 4], index // 4) for index in range(members)]
    task = TaskSpec(name="mqar", options=options)
    return [RunSpec(task=task, model=model, train=train.model_copy(update={"lr": lr}), seed=seed) for lr, seed in pairs]


def timed(trainer: FleetTrainer, cell: int) -> dict[str, float]:
    """Milliseconds of a step on one cell: median, least and most of the repeats, and seconds until the first steps were over."""
    began = time.perf_counter()
    for _ in range(WARM_UP):
        trainer.advance(cell)
    torch.cuda.synchronize()
    first = time.perf_counter() - began
    found = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        for _ in range(TIMED):
            trainer.advance(cell)
        torch.cuda.synchronize()
        found.append(1e3 * (time.perf_counter() - began) / TIMED)
    return {"ms": statistics.median(found), "ms_min": min(found), "ms_max": max(found), "first_steps_seconds": first}


def fleet(mixer: str, width: int, members: int, *, compiled: bool) -> dict[str, Any]:
    """Times one fleet on every cell."""
    torch.set_float32_matmul_precision("high")
    torch.cuda.reset_peak_memory_stats()
    trainer = FleetTrainer(specs(mixer, width, members), torch.device("cuda"), compiled=compiled)
    trainer.rates_E.copy_(torch.tensor([member.spec.train.lr for member in trainer.members]))
    trainer.examples_SB.copy_(torch.arange(BATCH).expand_as(trainer.examples_SB))
    cells = {name: timed(trainer, index) for index, name in enumerate(CELLS)}
    epoch = sum(CELLS[name] * cell["ms"] for name, cell in cells.items()) / 1e3
    return {
        "mixer": mixer,
        "width": width,
        "members": members,
        "execution": trainer.execution,
        "cells": cells,
        "ms_per_member": {name: cell["ms"] / members for name, cell in cells.items()},
        "examples_per_second": members * BATCH * sum(CELLS.values()) / epoch,
        "peak_bytes": torch.cuda.max_memory_allocated(),
    }


def kernels_of(mixer: str, width: int, members: int, cell: str) -> dict[str, float]:
    """Device microseconds of a step by kernel, the costliest first."""
    torch.set_float32_matmul_precision("high")
    trainer = FleetTrainer(specs(mixer, width, members), torch.device("cuda"), compiled=True)
    trainer.examples_SB.copy_(torch.arange(BATCH).expand_as(trainer.examples_SB))
    index = list(CELLS).index(cell)
    for _ in range(WARM_UP):
        trainer.advance(index)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(TIMED):
            trainer.advance(index)
        torch.cuda.synchronize()
    table = sorted(profile.key_averages(), key=lambda event: -event.self_device_time_total)
    return {f"{event.key[:70]} x{event.count / TIMED:g}": event.self_device_time_total / TIMED for event in table[:40]}


def peer(checkout: Path, mixer: str, width: int) -> dict[str, Any]:
    """Zoology's loop on the same mixture; a run is one model, so its learning rates run one after another."""
    ms = zoology_loop.milliseconds(checkout, mixer, width, {64: 4, 128: 8, 256: 32})
    epoch = sum(steps * ms[int(cell.split("x")[0])] for cell, steps in CELLS.items()) / 1e3
    return {"mixer": mixer, "width": width, "ms": ms, "examples_per_second": BATCH * sum(CELLS.values()) / epoch}


def check(mixer: str) -> float:
    """Largest difference of the training losses of a compiled fleet of two and of its members trained alone, eagerly."""

    def losses(members: list[RunSpec], *, compiled: bool) -> torch.Tensor:
        trainer = FleetTrainer(members, torch.device("cuda"), compiled=compiled)
        trainer.rates_E.fill_(1e-3)
        found = []
        for step in range(12):
            trainer.examples_SB.copy_(torch.arange(step * 64, step * 64 + BATCH).expand_as(trainer.examples_SB))
            trainer.sums_E3.zero_()
            trainer.advance(0)
            found.append(trainer.sums_E3[:, 0] / trainer.sums_E3[:, 2])
        return torch.stack(found, 1)

    both = specs(mixer, 64, 2)
    together = losses(both, compiled=True)
    alone = torch.cat([losses([spec], compiled=False) for spec in both])
    return float((together - alone).abs().max())


def main() -> None:
    """Checks, times, prints a table, writes the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--zoology", type=Path)
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--members", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--profile", metavar="CELL", nargs="+", help="only show the kernels of a step on these cells")
    parser.add_argument("--captured", action="store_true", help="time uncompiled fleets too")
    given = parser.parse_args()
    if given.profile:
        for mixer, cell, width, members in itertools.product(MIXERS, given.profile, given.widths, given.members):
            print(f"{mixer} {cell} d={width} E={members}, microseconds a step")
            print("\n".join(f"{us:10.1f}  {name}" for name, us in kernels_of(mixer, width, members, cell).items()), flush=True)
        return
    errors = {mixer: check(mixer) for mixer in MIXERS}
    print("largest loss difference, fleet against single runs:", errors, flush=True)
    if not all(error < 5e-2 for error in errors.values()):  # bf16 losses near 8.3 are 0.03 apart
        raise SystemExit("fleets do not learn what single runs learn; nothing was timed")
    peers, rows = [], []
    for mixer in MIXERS:
        for width in given.widths:
            if given.zoology is not None:
                peers.append(peer(given.zoology, mixer, width))
                print(json.dumps(peers[-1]), flush=True)
            for compiled in (True, False) if given.captured else (True,):
                for members in given.members:
                    rows.append(fleet(mixer, width, members, compiled=compiled))
                    print(_line(rows[-1], peers), flush=True)
                    torch.cuda.empty_cache()
    commit, dirty, _ = provenance.git_state()
    record = {
        "what": "training steps of fleets on the mixture of Based, figure 2, beside Zoology's own loop in the same process",
        "commit": commit,
        "dirty": dirty,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": provenance.versions(),
        "hardware": torch.cuda.get_device_name(),
        "repeats": REPEATS,
        "steps_a_repeat": TIMED,
        "check": errors,
        "fleets": rows,
        "zoology": peers,
    }
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(record, indent=1) + "\n")


def _line(row: dict[str, Any], peers: list[dict[str, Any]]) -> str:
    ms = " ".join(f"{name} {value:.3f}" for name, value in row["ms_per_member"].items())
    beside = [p for p in peers if (p["mixer"], p["width"]) == (row["mixer"], row["width"])]
    ratio = f", {row['examples_per_second'] / beside[0]['examples_per_second']:.1f} x Zoology" if beside else ""
    name = f"{row['mixer']} d={row['width']} E={row['members']} {row['execution']}"
    return f"{name}: ms a member {ms}; {row['examples_per_second']:,.0f} examples/s{ratio}"


if __name__ == "__main__":
    main()
