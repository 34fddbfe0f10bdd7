"""How long do `bench --help` and `bench list` take? Command: `python -m tests.benchmarks.startup`."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

from bench import provenance

REPEATS = 9
OUT = Path("results/measured/startup.json")
COMMANDS = (["--help"], ["list"], ["status", "--help"])


def main() -> None:
    """Times whole processes, prints medians, writes the record."""
    bench = Path(sys.executable).with_name("bench")
    rows = []
    for arguments in COMMANDS:
        seconds = []
        for _ in range(REPEATS):
            began = time.perf_counter()
            subprocess.run([bench, *arguments], check=True, capture_output=True)
            seconds.append(time.perf_counter() - began)
        row = {"command": "bench " + " ".join(arguments), "median_seconds": statistics.median(seconds)}
        rows.append({**row, "min_max": [min(seconds), max(seconds)]})
        print(f"{row['command']:24} {row['median_seconds']:.3f} s (min {min(seconds):.3f}, max {max(seconds):.3f}, n={REPEATS})")
    commit, dirty, _ = provenance.git_state()
    record = {
        "what": "wall time of whole processes",
        "command": "python -m tests.benchmarks.startup",
        "commit": commit,
        "dirty": dirty,
        "versions": provenance.versions(),
        "hardware": provenance.cpu_name(),
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "n": REPEATS,
        "rows": rows,
    }
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps(record, indent=1) + "\n")
    print(f"Record: {OUT}")


if __name__ == "__main__":
    main()
