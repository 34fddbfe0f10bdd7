"""Zoology, Figure 2: accuracy against width, one model a cell, for attention and three kinds of convolution.

Command: `bench synthetic --recipe zoology_figure2 --check --device cuda`

Attention, Hyena, H3 and BaseConv (a short filter, then an implicit one of full length) at widths 64, 128, 256 and 512, each
trained on one cell: 4 pairs in 64 tokens, 8 in 128, 16 in 256, 64 in 512. Four learning rates on one selection seed, three
reported seeds: 448 runs of 64 epochs of 100,000 sequences, 0.4 to 3.3 billion tokens a run, fewer where validation passes 0.99:
by far the longest recipe.
Cost: not measured yet.

As published: generator with token 0 as filler, 100,000 training and 3,000 test sequences, batch 512, 512, 256 and 128, epochs,
learning rates, block, learned positions for attention only, shuffled training. Changed: the learning rate is chosen, and
training stopped, on 500 validation sequences instead of the test set; test scores come from fresh seeds; bf16 autocast on a GPU
instead of fp32; attention weights are not dropped out. RWKV-4 is missing, because the zoo has no such mixer.

Expect attention at 1.0 in every cell and above every convolution wherever those stay below 0.95; convolutions improve with
width and lose with length. Others who reran the figure got better values for Hyena and H3, so the convolutions' own values are
soft targets.
"""

from bench.grammar import named_layers
from bench.recipes import recipe
from bench.spec import ModelSpec, TaskSpec, TrainSpec
from bench.sweep import Experiment, Sweep

BATCHES = {"64x4": 512, "128x8": 512, "256x16": 256, "512x64": 128}
"""Batch size of each cell."""
WIDTHS = (64, 128, 256, 512)
LRS = (1e-4, 10 ** (-10 / 3), 10 ** (-8 / 3), 1e-2)
"""logspace(-4, -2, 4)."""


@recipe("zoology_figure2")
def zoology_figure2() -> Sweep:
    """Four mixers at four widths on four cells."""
    experiments = tuple(
        Experiment(
            task=TaskSpec(name="mqar", options={"protocol": "zoology_figure2", "setting": cell, "valid_cells": f"{cell}:500"}),
            model=model,
            train=TrainSpec(batch_size=batch, epochs=64, weight_decay=0.1, shuffle="examples", stop_at=0.99),
            lrs=LRS,
        )
        for cell, batch in BATCHES.items()
        for model in _models(length=int(cell.partition("x")[0]))
    )
    return Sweep(experiments=experiments, select_seeds=1, seeds=3)


def _models(length: int) -> list[ModelSpec]:
    """The models of a cell; H3's state has as many elements a channel as the sequence has tokens."""
    convolutions = ("hyena:train_features=true*2", f"h3:d_state={length}*2", "base_conv+base_conv:implicit=true")
    return [
        *(ModelSpec(**named_layers("attention*2"), d_model=width, positions="learned") for width in WIDTHS),
        *(ModelSpec(**named_layers(mixer), d_model=width) for mixer in convolutions for width in WIDTHS),
    ]
