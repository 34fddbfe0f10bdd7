"""Prints the seconds that a report over 500 stored runs takes: python tests/report/time_report.py."""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path

import fake_store

from bench.report.build import build_report

COPIES = 3


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = fake_store.build(Path(folder) / "runs", report_seeds=12)
        for copy in range(1, COPIES):
            fake_store.build(store.root, report_seeds=12, task=f"mqar_{copy}")
        out = Path(folder) / "report.html"
        began = time.perf_counter()
        summary = build_report(store, out)
        seconds = time.perf_counter() - began
        print(f"{summary.runs} runs, {summary.points} points: {seconds:.1f} s, {summary.bytes / 1e6:.2f} MB")
        shutil.rmtree(store.root)


if __name__ == "__main__":
    main()
