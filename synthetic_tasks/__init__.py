"""Synthetic tasks: one file each, seeded NumPy generation, exact ceilings."""

from synthetic_tasks._base import (
    SPLITS,
    TASKS,
    Batch,
    Cell,
    Task,
    accuracy,
    blocks,
    build_split,
    example_hashes,
    split_digest,
    stream,
    task,
)

__all__ = [
    "SPLITS",
    "TASKS",
    "Batch",
    "Cell",
    "Task",
    "accuracy",
    "blocks",
    "build_split",
    "example_hashes",
    "split_digest",
    "stream",
    "task",
]
