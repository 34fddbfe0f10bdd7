"""How fast does every task draw sequences of 512 positions? Command: `python -m tests.benchmarks.task_generation`.

Each task draws 10,000 examples of its long cell (`synthetic_tasks.time_generation`), three times; what counts is the
processor time of one thread, median of the three. The floor is 10,000 examples a second on two cores, 5,000 on one. Writes
results/measured/task_generation.json.
"""

from __future__ import annotations

import json
import statistics
from datetime import UTC, datetime
from pathlib import Path

from bench import provenance
from synthetic_tasks import TASKS
from synthetic_tasks.time_generation import load_all, long_task, seconds

EXAMPLES, REPEATS, FLOOR = 10_000, 3, 5_000
OUT = Path("results/measured/task_generation.json")


def main() -> None:
    """Times all tasks and writes the record."""
    load_all()
    rows = []
    for name in sorted(TASKS):
        made = long_task(name)
        (cell,) = made.cells("test")
        times = [seconds(made, cell, EXAMPLES) for _ in range(REPEATS)]
        rate = EXAMPLES / statistics.median(times)
        rows.append({"task": name, "cell": cell.name, "length": cell.length, "seconds": times, "examples_per_core_second": rate})
        print(f"{name:24s} {cell.length:5d} {rate:12,.0f} a core second{'' if rate >= FLOOR else '  below the floor'}", flush=True)
    commit, dirty, _ = provenance.git_state()
    record = {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit,
        "dirty": dirty,
        "versions": provenance.versions(),
        "cpu": provenance.cpu_name(),
        "examples": EXAMPLES,
        "repeats": REPEATS,
        "floor_per_core_second": FLOOR,
        "rows": rows,
    }
    OUT.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
