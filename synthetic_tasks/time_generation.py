"""Times the generators: `python -m synthetic_tasks.time_generation --task mqar` prints examples per second of each cell.

With `--long` every task is timed on one cell of about 512 positions. The floor is 10,000 examples a second on two cores, so
5,000 a second of one core's time, which is what is printed, so that a busy machine changes little.
"""

from __future__ import annotations

import argparse
import importlib
import time
from pathlib import Path
from typing import Any

from synthetic_tasks._base import TASKS, Cell, Task, stream
from synthetic_tasks._splits import BLOCK_ROWS

LONG = {
    "compositional_mqar": "512x36:1", "copying": "255:1", "correlated_recall": "16x50x31:1", "group_word": "512:1",
    "in_context_regression": "410:1", "induction": "512x16:1", "joint_recall": "14x29:1", "joint_recall_hax": "11x11:1",
    "mad_compression": "512:1", "mad_fuzzy_recall": "512:1", "mad_in_context_recall": "512:1", "mad_memorization": "512:1",
    "mad_noisy_recall": "512:1", "mad_selective_copy": "512x32:1", "modular_counting": "512:1", "mqar": "512x64:1",
    "mqar_multihop": "112x3:1", "mqar_overwrite": "512x64:1", "ngram_lookup": "505:1", "parity": "512:1", "phone_book": "72:1",
    "selective_copy": "512x16:1", "selectivity_t1": "256:1", "selectivity_t2": "128x3:1", "selectivity_t3": "256:1",
    "selectivity_t4": "128x3:1",
}  # fmt: skip


def load_all() -> None:
    """Imports every task module of this package, which registers its task."""
    for path in sorted(Path(__file__).parent.glob("[a-z]*.py")):
        if path.stem != "time_generation":
            importlib.import_module(f"synthetic_tasks.{path.stem}")


OPTIONS: dict[str, dict[str, Any]] = {"mqar": {"vocab_size": 8192}}
"""Options that a task needs for its long cell."""


def long_task(name: str) -> Task:
    """A task whose test split is its long cell."""
    return TASKS[name](**OPTIONS.get(name, {}) | {"test_cells": LONG[name]})


def seconds(task: Task, cell: Cell, examples: int) -> float:
    """Processor time of drawing `examples` examples of `cell` in blocks, in seconds."""
    task.sample(cell, 2, stream(0, "warm-up"))
    start = time.process_time()
    for index in range(0, examples, BLOCK_ROWS):
        task.sample(cell, min(BLOCK_ROWS, examples - index), stream(0, "timing", cell.name, index))
    return time.process_time() - start


def main() -> None:
    """Prints one line a cell of the test split (or of `--cells`)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", default="all", help="name of a task, or all")
    parser.add_argument("--examples", type=int, default=10_000, help="examples of each cell")
    parser.add_argument("--cells", default="", help="cells in place of the task's own, e.g. 256x64:1")
    parser.add_argument("--long", action="store_true", help="one cell of about 512 positions a task")
    args = parser.parse_args()
    load_all()
    for name in sorted(TASKS) if args.task == "all" else [args.task]:
        made = long_task(name) if args.long else TASKS[name](**({"test_cells": args.cells} if args.cells else {}))
        for cell in made.cells("test"):
            rate = args.examples / seconds(made, cell, args.examples)
            print(f"{name:24s} {cell.name:16s} length {cell.length:5d}  {rate:10,.0f} examples a core second")


if __name__ == "__main__":
    main()
