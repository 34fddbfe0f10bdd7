"""Any task on a laptop: six kinds of memory on the task's own cells, in five to ten minutes on two CPU cores.

Command: `bench synthetic --task NAME`, for every task without a recipe of its own

Two layers of width 64, the first a short convolution, in Zoology's frame and without positions. Every run reads about a
million training tokens, in as many passes over the training split as that takes, and at least one. Two learning rates are
tried on one selection seed, two other seeds are reported: 24 runs.

Expect the order of mixers rather than solved tasks: the budget is small, and the hardest test cells lie beyond the training.
"""

from functools import cache

from bench import catalog
from bench.grammar import named_layers
from bench.recipes import recipe
from bench.spec import ModelSpec, TaskSpec, TrainSpec
from bench.sweep import Experiment, Sweep

MIXERS = ("gated_delta_net:n_heads=2", "gla:n_heads=2", "mamba2:d_state=16", "hyena", "sliding_window:window=16", "attention")
"""Slowest first, so that the cores finish together."""
TOKENS = 1_000_000
"""Training tokens of a run."""
MAX_EPOCHS = 200


@cache
def models() -> tuple[ModelSpec, ...]:
    """The models compared."""
    return tuple(ModelSpec(**named_layers(mixer), d_model=64, embed_dropout=0.0) for mixer in MIXERS)


@recipe("laptop")
def laptop(*, task: str = "mqar") -> Sweep:
    """The default of `bench synthetic --task NAME`."""
    cells = catalog.load("task", task)().cells("train")
    epochs = round(TOKENS / sum(cell.length * cell.examples for cell in cells))
    train = TrainSpec(batch_size=32, epochs=min(MAX_EPOCHS, max(1, epochs)), shuffle="batches", schedule="cosine", stop_at=0.995)
    experiments = tuple(Experiment(task=TaskSpec(name=task), model=model, train=train, lrs=(3e-3, 1e-2)) for model in models())
    return Sweep(experiments=experiments, select_seeds=1, seeds=2)
