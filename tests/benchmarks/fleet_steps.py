"""Times training steps of fleets on a CUDA device: `python -m tests.benchmarks.fleet_steps OUT.json CASES.json`.

A case names a task with its cells, a mixer, a frame and a number of members; every case is a process, and all live side by
side. Each builds, compiles and captures its fleet; then they are timed one after another, and at last all at once, which
tells what workers gain by sharing the device. Training sets are a few hundred examples: only shapes matter here.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

from bench import provenance
from bench.grammar import named_layers
from bench.spec import ModelSpec, RunSpec, TaskSpec, TrainSpec
from bench.train import FleetTrainer

STEPS = 60
SHARED_SECONDS = 4.0
BUILD_SECONDS = 100.0


def build(case: dict[str, Any]) -> FleetTrainer:
    """The fleet of a case."""
    options = dict(case["options"]) | {"train_cells": "+".join(f"{cell}:512" for cell in case["cells"])}
    options |= {"valid_cells": f"{case['cells'][-1]}:64", "test_cells": f"{case['cells'][-1]}:64"}
    frame = {"d_model": case["width"], "frame": case["frame"], "mlp_ratio": case.get("mlp_ratio", 4.0), "embed_dropout": 0.0}
    model = ModelSpec(**named_layers(case["mixer"]), **frame)
    train = TrainSpec(batch_size=case["batch"], shuffle="batches", epochs=10_000, stop_at=None, precision=case["precision"])
    task = TaskSpec(name=case["task"], options=options)
    specs = [RunSpec(task=task, model=model, train=train, seed=seed) for seed in range(case["members"])]
    trainer = FleetTrainer(specs, torch.device("cuda"), compiled=case["compiled"])
    trainer.rates_E.fill_(1e-4)
    trainer.examples_SB.copy_(torch.arange(case["batch"], device="cuda"))
    return trainer


def time_steps(step: Any, seconds: float | None = None) -> float:
    """Milliseconds of a step: of `STEPS` of them, or of as many as take `seconds`."""
    torch.cuda.synchronize()
    began, done = time.perf_counter(), 0
    while done < STEPS if seconds is None else time.perf_counter() - began < seconds:
        step()
        done += 1
        if done % 20 == 0:
            torch.cuda.synchronize()
    torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - began) / done


def work(case: dict[str, Any], ready: Any, alone: Any, pipe: Any) -> None:
    """One case's process."""
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high" if case["precision"] != "fp32" else "highest")
    began = time.perf_counter()
    found: dict[str, Any] = dict(case)
    try:
        trainer = build(case)
        for step in trainer._steps:
            for _ in range(3):
                step()
        torch.cuda.synchronize()
        found["build_seconds"] = time.perf_counter() - began
    except Exception as error:
        found["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    try:
        ready.wait(BUILD_SECONDS)
    except threading.BrokenBarrierError:
        found["late"] = True
    if "error" not in found:
        with alone:
            found["ms"] = [time_steps(step) for step in trainer._steps]
        found["memory_mib"] = torch.cuda.max_memory_allocated() / 2**20
        try:
            ready.wait(60)
            found["shared_ms"] = time_steps(trainer._steps[-1], SHARED_SECONDS)
        except threading.BrokenBarrierError:
            found["late"] = True
    else:
        try:
            ready.wait(60)
        except threading.BrokenBarrierError:
            pass
    pipe.put(found)


def main() -> None:
    """Runs all cases side by side and writes what they measured."""
    out, cases = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
    context = multiprocessing.get_context("spawn")
    ready, alone, queue = context.Barrier(len(cases)), context.Lock(), context.Queue()
    processes = [context.Process(target=work, args=(case, ready, alone, queue)) for case in cases]
    for process in processes:
        process.start()
    rows = []
    for _ in cases:
        row = queue.get()
        rows.append(row)
        numbers = " ".join(f"{ms:.2f}" for ms in row.get("ms", []))
        print(
            f"{row['task']:24s} {row['mixer']:44s} E={row['members']:<3d} B={row['batch']:<4d} "
            f"{'compiled' if row['compiled'] else 'graph':9s} build {row.get('build_seconds', 0):5.1f} s  ms {numbers}  "
            f"shared {row.get('shared_ms', 0):.2f}  {row.get('error', '')}",
            flush=True,
        )
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
        content = {"device": device, "versions": provenance.versions(), "commit": provenance.git_state()[0], "cases": rows}
        out.write_text(json.dumps(content, indent=1) + "\n")
    for process in processes:
        process.join()


if __name__ == "__main__":
    main()
