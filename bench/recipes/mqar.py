"""MQAR on a laptop: what each kind of mixer's memory buys, in three minutes on two CPU cores.

Command: `bench synthetic --task mqar`
"""

from bench.grammar import parse_layers
from bench.recipes import recipe
from bench.spec import ModelSpec, TaskSpec, TrainSpec
from bench.sweep import Experiment, Sweep

MIXERS = (
    "attention",
    "sliding_window:window=8",
    "sliding_window:window=32",
    "hyena",
)


@recipe("mqar")
def mqar() -> Sweep:
    """The default of `bench synthetic --task mqar`."""
    train = TrainSpec(batch_size=64, epochs=2, shuffle="batches", schedule="cosine", weight_decay=0.1, stop_at=0.995)
    return Sweep(
        experiments=tuple(
            Experiment(
                task=TaskSpec(name="mqar"),
                model=ModelSpec(layers=parse_layers(mixer), d_model=32, embed_dropout=0.0),
                train=train,
                lrs=(3e-3, 1e-2),
            )
            for mixer in MIXERS
        ),
        select_seeds=1,
        seeds=2,
    )
