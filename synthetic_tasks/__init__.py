"""Synthetic tasks: one file each, seeded NumPy generation, exact ceilings."""

from synthetic_tasks._base import SPLITS, TASKS, Batch, Cell, Task, build_split, row_hashes, stream, task

__all__ = ["SPLITS", "TASKS", "Batch", "Cell", "Task", "build_split", "row_hashes", "stream", "task"]
