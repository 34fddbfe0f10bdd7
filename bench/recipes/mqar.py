"""MQAR on a laptop: what each kind of mixer's memory buys, in under three minutes on two CPU cores.

Command: `bench synthetic --task mqar`

Twelve points: softmax attention, whose memory grows with the text; windows, gated, delta, BASED and state-space memories of
constant size, each at two sizes; and a long convolution. Two layers of width 64, the first a short convolution, in Zoology's
frame; 9,000 training examples of 2 and 4 pairs in 16 tokens and 8 pairs in 32; the test adds a cell of twice the length and
load. Two learning rates are tried on one selection seed and three other seeds are reported: 60 runs of at most 564 steps.

Expect attention at 1.0; Gated DeltaNet at 0.98 with three fifths of attention's bytes and 0.90 with a third, BASED at 0.96 with
a third and 0.78 with an eighth; windows exactly as good as their reach; GLA and Mamba-2 between and seed-dependent, because
they have not finished learning in 564 steps; and Hyena, which has no content-based addressing, at 0.2. The step budget is part
of the result: these are capacities learnt in seconds, not bounds. Record: results/measured/mqar_laptop.
"""

from bench.grammar import named_layers
from bench.recipes import recipe
from bench.spec import ModelSpec, TaskSpec, TrainSpec
from bench.sweep import Experiment, Sweep

MIXERS = (
    "gated_delta_net:n_heads=4",
    "gated_delta_net:n_heads=2",
    "gla:n_heads=8",
    "gla:n_heads=4",
    "mamba2:d_state=8",
    "mamba2:d_state=32",
    "hyena",
    "based:feature_dim=4",
    "based:feature_dim=8",
    "sliding_window:window=12",
    "sliding_window:window=24",
    "attention",
)
"""Slowest first, so that the cores finish together."""


@recipe("mqar")
def mqar() -> Sweep:
    """The default of `bench synthetic --task mqar`."""
    train = TrainSpec(batch_size=32, epochs=2, shuffle="batches", schedule="cosine", stop_at=0.995)
    experiments = tuple(
        Experiment(
            task=TaskSpec(name="mqar"),
            model=ModelSpec(**named_layers(mixer), d_model=64, embed_dropout=0.0),
            train=train,
            lrs=(5e-3, 1e-2),
        )
        for mixer in MIXERS
    )
    return Sweep(experiments=experiments, select_seeds=1, seeds=3)
