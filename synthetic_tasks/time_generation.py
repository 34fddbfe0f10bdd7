"""Times the generators: `python -m synthetic_tasks.time_generation --task mqar` prints examples per second of each cell."""

from __future__ import annotations

import argparse
import importlib
import time
from pathlib import Path

from synthetic_tasks._base import BLOCK_ROWS, TASKS, Cell, Task, stream


def load_all() -> None:
    """Imports every task module of this package, which registers its task."""
    for path in sorted(Path(__file__).parent.glob("[a-z]*.py")):
        if path.stem != "time_generation":
            importlib.import_module(f"synthetic_tasks.{path.stem}")


def seconds(task: Task, cell: Cell, examples: int) -> float:
    """Wall time of drawing `examples` examples of `cell` in blocks, in seconds."""
    start = time.perf_counter()
    for index in range(0, examples, BLOCK_ROWS):
        task.sample(cell, min(BLOCK_ROWS, examples - index), stream(0, "timing", cell.name, index))
    return time.perf_counter() - start


def main() -> None:
    """Prints one line a cell of the test split (or of `--cells`)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", default="all", help="name of a task, or all")
    parser.add_argument("--examples", type=int, default=10_000, help="examples of each cell")
    parser.add_argument("--cells", default="", help="cells in place of the task's own, e.g. 256x64:1")
    args = parser.parse_args()
    load_all()
    for name in sorted(TASKS) if args.task == "all" else [args.task]:
        made = TASKS[name](**({"test_cells": args.cells} if args.cells else {}))
        for cell in made.cells("test"):
            made.sample(cell, 2, stream(0, "warm-up"))
            spent = seconds(made, cell, args.examples)
            print(f"{name:24s} {cell.name:16s} length {cell.length:5d}  {args.examples / spent:10,.0f} examples/s")


if __name__ == "__main__":
    main()
