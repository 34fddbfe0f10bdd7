"""Small sweeps in processes of their own, which write down when a record is stored and when a checkpoint is read."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from bench.records import RunRecord
from bench.store import Store
from tests.cli.conftest import TINY

ROOT = Path(__file__).parents[2]

LISTENER = """
import io, os

def write(word, path):
    with real_open(os.environ["HEARD"], "a") as file:
        file.write(f"{word} {os.path.basename(os.path.dirname(path))}\\n")

def hearing_open(file, mode="r", *arguments, **options):
    if mode == "rb" and str(file).endswith("checkpoint.pt"):
        write("resumed", file)
    return real_open(file, mode, *arguments, **options)

def hearing_replace(source, target, **options):
    real_replace(source, target, **options)
    if str(target).endswith("record.json"):
        write("stored", target)

real_open, io.open = io.open, hearing_open
real_replace, os.replace = os.replace, hearing_replace
"""
"""Every Python process that has it on its path tells of itself, whoever started it."""


def environment(folder: Path, **changes: str) -> dict[str, str]:
    """Variables of a sweep in a folder; checkpoints are saved often."""
    listener = folder / "listener"
    listener.mkdir(exist_ok=True)
    (listener / "sitecustomize.py").write_text(LISTENER)
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "BENCH_CHECKPOINT_SECONDS": "0.3",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{listener}",
        "HEARD": str(folder / "heard"),
        **changes,
    }


def heard(folder: Path, word: str) -> list[int]:
    """How often each run was "stored" or "resumed"."""
    lines = (folder / "heard").read_text().splitlines() if (folder / "heard").exists() else []
    return sorted(Counter(line for line in lines if line.startswith(word)).values())


def start(folder: Path, *arguments: str, largest_file: str = "unlimited", **changes: str) -> subprocess.Popen[str]:
    """`bench synthetic` on the tiny sweep, in a folder; the system refuses to write files of more KiB than the largest."""
    limited = ["bash", "-c", f'ulimit -f {largest_file}; exec "$0" "$@"']
    tiny = [*TINY, "--mixer=attention", "--set=train.lr=1e-3", "--set=train.stop_at=none", "--no-report"]
    command = [*limited, sys.executable, "-m", "bench.cli", "synthetic", *tiny, *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=folder, stdout=pipe, stderr=pipe, text=True, env=environment(folder, **changes))


def finish(process: subprocess.Popen[str], seconds: float = 300.0) -> tuple[int, str, str]:
    """Exit code and what a process printed."""
    out, err = process.communicate(timeout=seconds)
    return process.returncode, out, err


def wait_for(condition: Callable[[], object], seconds: float = 90.0) -> None:
    """Waits until something is so."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.05)


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoints in the store."""
    return list(folder.glob("results/runs/*/checkpoint.pt"))


def complete(folder: Path) -> list[RunRecord]:
    """The records of the store: sound, trained to the end without a gap, nothing left beside them, and each stored once."""
    store = Store(folder / "results/runs")
    records, warnings = store.load()
    assert warnings == []
    for record in records:
        assert record.status == "done"
        left = {path.name for path in store.path(record.run_id).iterdir()}
        assert left <= {"record.json", "curve.parquet", "influence.npz"}, left
        curve = store.curve(record.run_id)
        assert curve is not None and list(curve["epoch"]) == list(range(1, record.spec.train.epochs + 1))
    assert heard(folder, "stored") == [1] * len(records)
    return records
