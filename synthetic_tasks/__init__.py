"""Synthetic tasks: one file each, seeded NumPy generation, exact ceilings."""

from synthetic_tasks._base import (
    SPLITS,
    TASKS,
    Batch,
    Cell,
    Task,
    stream,
    task,
)
from synthetic_tasks._metrics import accuracy, binding_gain, effective_memory_length
from synthetic_tasks._splits import BLOCK_ROWS, blocks, build_split, example_hashes, split_digest, split_hash, training_block

__all__ = [
    "BLOCK_ROWS",
    "SPLITS",
    "TASKS",
    "Batch",
    "Cell",
    "Task",
    "accuracy",
    "binding_gain",
    "blocks",
    "build_split",
    "effective_memory_length",
    "example_hashes",
    "split_digest",
    "split_hash",
    "stream",
    "task",
    "training_block",
]
