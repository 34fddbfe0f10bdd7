"""Families of tasks: every task of a family with the same few mixers, scored by family.

Command: `bench synthetic --suite all --preset quick`

The quick preset trains one seed at one learning rate on cells small enough for two CPU cores to finish all families in
15 minutes; it tells mixers of different kinds apart, not good ones from better ones. The laptop preset is the laptop recipe
of every task, with learning rates selected and two seeds.
"""

from collections.abc import Iterable
from typing import Literal

from bench import catalog
from bench.grammar import named_layers
from bench.recipes import recipe
from bench.recipes.laptop import laptop
from bench.spec import ModelSpec, TaskSpec, TrainSpec
from bench.sweep import Experiment, Sweep

MIXERS = ("gated_delta_net:n_heads=2", "mamba2:d_state=16", "hyena", "attention")
TOKENS = 800_000
"""Training tokens of a quick run."""
MAX_EXAMPLES = 16_000
"""Training examples of a cell of a quick run."""
CELLS = {
    "compositional_mqar": ("32x4 64x9", "32x4 64x9 128x16"),
    "copying": ("8 16", "8 16 32"),
    "correlated_recall": ("4x1x2 4x50x4", "4x1x2 4x50x4 8x50x4"),
    "group_word": ("16", "16 32"),
    "in_context_regression": ("8 16 32", "8 16 32 64"),
    "induction": ("32x4", "32x4 64x8"),
    "joint_recall": ("2x8 3x8", "2x8 3x8 4x8"),
    "joint_recall_hax": ("2x2 3x3", "2x2 3x3 4x4"),
    "mad_compression": ("16", "16"),
    "mad_fuzzy_recall": ("64", "64 128"),
    "mad_in_context_recall": ("32", "32 64"),
    "mad_memorization": ("32", "32 64"),
    "mad_noisy_recall": ("32", "32 64"),
    "mad_selective_copy": ("64x8", "64x8 128x8"),
    "modular_counting": ("16", "16 32"),
    "mqar": ("16x2 16x4 32x8", "16x4 32x8 64x16"),
    "mqar_multihop": ("4x1 4x2", "4x1 4x2 8x1 8x2"),
    "mqar_overwrite": ("16x2 32x4", "16x2 32x4 64x8"),
    "ngram_lookup": ("16", "16 32"),
    "parity": ("24", "24 48"),
    "phone_book": ("4 8", "4 8 16"),
    "selective_copy": ("32x4", "32x4 64x4 64x8"),
    "selectivity_t1": ("16", "16 32"),
    "selectivity_t2": ("8x4", "8x4 16x4"),
    "selectivity_t3": ("16", "16 32"),
    "selectivity_t4": ("8x4", "8x4 8x8 8x16"),
}
"""Training and test cells of each task's quick version; the test reaches beyond the training wherever the task can."""


def members(suite: str) -> list[str]:
    """The tasks of a family, or of all."""
    return [name for name in CELLS if suite in ("all", catalog.load("task", name).suite)]


@recipe("suite")
def suite(
    *,
    suite: Literal["all", "recall", "selectivity", "mad", "state_tracking"] = "all",
    preset: Literal["quick", "laptop"] = "quick",
) -> Sweep:
    """The tasks of a family."""
    if preset == "laptop":
        sweeps = [laptop(task=name) for name in members(suite)]
        return sweeps[0].model_copy(update={"experiments": tuple(item for sweep in sweeps for item in sweep.experiments)})
    train = TrainSpec(batch_size=32, epochs=1, shuffle="batches", schedule="cosine", stop_at=None)
    models = [ModelSpec(**named_layers(mixer), d_model=64, embed_dropout=0.0) for mixer in MIXERS]
    tasks = [quick_task(name) for name in members(suite)]
    experiments = tuple(Experiment(task=task, model=model, train=train, lrs=(5e-3,)) for model in models for task in tasks)
    return Sweep(experiments=experiments, seeds=1)


def quick_task(name: str) -> TaskSpec:
    """A task on its small cells, with as many training examples of each as the token budget allows."""
    train, test = (cells.split() for cells in CELLS[name])
    probe = catalog.load("task", name)(train_cells=_text(train, 1), test_cells=_text(test, 1))
    examples = min(MAX_EXAMPLES, TOKENS // sum(cell.length for cell in probe.cells("train")))
    options = {"train_cells": _text(train, examples), "valid_cells": _text(test, 50), "test_cells": _text(test, 200)}
    return TaskSpec(name=name, options=options)


def _text(cells: Iterable[str], examples: int) -> str:
    """Cells as the tasks' options write them."""
    return "+".join(f"{cell}:{examples}" for cell in cells)
