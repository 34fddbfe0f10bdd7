"""What compiling a fleet costs, what memory it holds meanwhile, and whether it then trains as before.

    python -m tests.benchmarks.fleet_compile OUT.json [--mixer gated_delta_net:n_heads=2] [--width 128] [--members 4]
        [--cells 64x4 256x16 256x64] [--steps 20] [--alone LOCK]

Seconds of each cell's rehearsal, in an order that is given, and where torch spent them; bytes of the GPU that the process holds,
sampled every 20 ms, as the mean over the time of compiling and the most. With --steps, losses of all members over 20 steps of the
first cell, and then milliseconds of a step of each cell, in repeats of so many, while no other process holds LOCK. A compiler's
caches are where TORCHINDUCTOR_CACHE_DIR and TRITON_CACHE_DIR say; empty ones make the seconds those of a first run.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.utils import compilation_time_metrics

from bench.train import FleetTrainer
from tests.benchmarks.facts import facts
from tests.benchmarks.fleet_speed import BATCH, CELLS, specs, timed

PHASES = {
    "dynamo and all below": "_compile.compile_inner",
    "aot and all below": "create_aot_dispatcher_function",
    "inductor forward": "compile_fx.<locals>.fw_compiler_base",
    "inductor backward": "compile_fx.<locals>.bw_compiler",
    "lowering": "GraphLowering.run",
    "scheduling": "Scheduler.__init__",
    "code generation": "Scheduler.codegen",
    "waiting for Triton": "async_compile.wait",
}


LOSSES = 20
"""Steps whose losses are kept."""


class Sampler:
    """Samples the memory that this process holds, in a thread."""

    def __init__(self) -> None:
        self.bytes: list[int] = []
        self.going = True
        threading.Thread(target=self._look, daemon=True).start()

    def _look(self) -> None:
        while self.going:
            self.bytes.append(torch.cuda.memory_reserved())
            time.sleep(0.02)

    def so_far(self) -> dict[str, float]:
        """Mean and most gigabytes held."""
        return {"mean_gb": sum(self.bytes) / len(self.bytes) / 1e9, "most_gb": max(self.bytes) / 1e9, "samples": len(self.bytes)}


def losses(trainer: FleetTrainer, cell: int) -> list[list[float]]:
    """Each step's loss of each member."""
    found = []
    trainer.fleet.rates_E.copy_(torch.tensor([member.spec.train.lr for member in trainer.members]))
    for step in range(LOSSES):
        first = step * BATCH // 8
        trainer.fleet.examples_SB.copy_(torch.arange(first, first + BATCH).expand_as(trainer.fleet.examples_SB))
        trainer.fleet.sums_E3.zero_()
        trainer.advance(cell)
        found.append((trainer.fleet.sums_E3[:, 0] / trainer.fleet.sums_E3[:, 2]).tolist())
    return found


def main() -> None:
    """Parses the command line; writes after every part."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--mixer", default="gated_delta_net:n_heads=2")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--members", type=int, default=4)
    parser.add_argument("--cells", nargs="+", choices=CELLS, default=["64x4", "256x16", "256x64"])
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--alone", type=Path, help="a file to lock while steps are timed")
    given = parser.parse_args()
    places = {name: list(CELLS).index(name) for name in given.cells}
    row: dict[str, Any] = facts("python -m tests.benchmarks.fleet_compile") | {
        "n": "one rehearsal of each cell; losses of one run; steps as in fleet_speed",
        "mixer": given.mixer,
        "width": given.width,
        "members": given.members,
        "seconds": {},
    }

    def write() -> None:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(row, indent=1) + "\n")

    torch.set_float32_matmul_precision("high")
    trainer = FleetTrainer(specs(given.mixer, given.width, given.members), torch.device("cuda"), compiled=True)
    row["seeds"] = sorted({member.spec.seed for member in trainer.members})
    trainer.fleet.examples_SB.copy_(torch.arange(BATCH).expand_as(trainer.fleet.examples_SB))
    torch.cuda.reset_peak_memory_stats()
    sampler = Sampler()
    for name, place in places.items():
        began = time.perf_counter()
        trainer.fleet.rehearse(place)
        torch.cuda.synchronize()
        row["seconds"][name] = time.perf_counter() - began
        torch.cuda.empty_cache()
        row["held"], row["peak_bytes"] = sampler.so_far(), torch.cuda.max_memory_allocated()
        row["phases"] = {label: sum(compilation_time_metrics.get(name, [])) for label, name in PHASES.items()}
        write()
    sampler.going = False
    if given.steps:
        with (given.alone or Path("/dev/null")).open("wb") as lock:
            if given.alone is not None:
                fcntl.flock(lock, fcntl.LOCK_EX)
            row["losses"] = losses(trainer, places[given.cells[0]])
            write()
            row["ms"] = {}
            for name, place in places.items():
                row["ms"][name] = timed(partial(trainer.advance, place), given.steps)
                write()
    print(f"{given.out.stem}: {line(row)}", flush=True)


def line(row: dict[str, Any]) -> str:
    """A row in short."""
    seconds = " ".join(f"{name} {value:.1f}" for name, value in row["seconds"].items())
    ms = " ".join(f"{name} {value['ms']:.3f}" for name, value in row.get("ms", {}).items())
    last = [round(loss, 4) for loss in row["losses"][-1]] if "losses" in row else []
    held = f"held {row['held']['mean_gb']:.1f} GB, most {row['held']['most_gb']:.1f}"
    return f"s {seconds}; {held}; ms {ms or '-'}; last losses {last or '-'}"


if __name__ == "__main__":
    main()
